"""The language model. The one package that imports mlx-lm."""
