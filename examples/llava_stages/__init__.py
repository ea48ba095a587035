"""A LoRA that teaches the demo model to answer as JSON when asked to."""
