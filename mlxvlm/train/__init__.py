"""Training: stages, losses, one loop, checkpoints."""
