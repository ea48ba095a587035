"""Grounding at tiny size: a model of MM1.5's kind learns to say where things are, in boxes."""
