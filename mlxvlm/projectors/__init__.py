"""Projectors: encoder tokens in, language-model embeddings out. A projector a file."""
