"""Checkpoints in and out: hub, load, save, check, families."""
