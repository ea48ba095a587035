"""The embedding cache: what a frozen encoder says of each picture, computed once and kept on disk.

DIR/cache.json   what the features are: encoder, codec, how they were batched
DIR/shards/      the features and everything needed to find them; the truth
DIR/index.sqlite where each picture and name is; derived from the shards, disposable
"""

from __future__ import annotations

from .reader import EmbeddingCache

__all__ = ["EmbeddingCache"]
