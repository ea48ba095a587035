"""Prompts that a decoder has read, and the state that each left it in.

    <bos> system user [picture] What is this? assistant A cat. <eot> ...
    |------------------------ a prefix ------------------------------|

A prefix is tokens and the contents of the pictures among them: two prompts agree up to the first
token that differs, or up to the first picture that differs in content.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .language.kv import KVSettings, arrays_of, cut, is_free, nbytes

# So many last tokens are read again rather than kept in two branches: an answer written out and
# tokenised anew may differ in its end from what was sampled.
TAIL = 8

# A picture among the tokens: where its first token stands, and what its embeddings depend on.
Place = tuple[int, str]


class Read(Protocol):
    """Tokens [L] that were read, and the pictures among them."""

    tokens: np.ndarray
    places: list[Place]


@dataclass
class Prefix:
    """Tokens [L], pictures among them, and the caches after the last of them."""

    tokens: np.ndarray
    places: list[Place]
    kv: KVSettings
    caches: list[Any]
    nbytes: int

    def __len__(self) -> int:
        return len(self.tokens)


class Prefixes:
    """The prefixes used last, in at most `limit` bytes of keys and values."""

    def __init__(self, limit: int):
        self.limit = limit
        self._kept: list[Prefix] = []  # the one used last comes last

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(prefix.nbytes for prefix in self._kept)

    def clear(self) -> None:
        self._kept.clear()

    def reach(
        self, tokens: np.ndarray, places: list[Place], kv: KVSettings, most: int
    ) -> tuple[int, Prefix | None, list[Any]]:
        """How many tokens of a prompt, at most `most`, are known, by which prefix, and a copy of
        its caches as they were after them."""
        agreed = [
            (min(agreement(prefix, tokens, places), most), at)
            for at, prefix in enumerate(self._kept)
            if prefix.kv == kv
        ]
        for shared, at in sorted(agreed, reverse=True):
            prefix = self._kept[at]
            caches = cut(prefix.caches, len(prefix), shared) if shared else None
            if caches is not None:
                return shared, prefix, caches
        return 0, None, []

    def take(
        self, tokens: np.ndarray, places: list[Place], kv: KVSettings, most: int
    ) -> tuple[list[Any], int] | None:
        """The caches of a prompt's longest prefix that is kept, and its length, at most `most`.

        They are the caller's to write to. A prefix that is used but for its last few tokens is
        handed over, lest its memory be held twice, and is the caller's to put back, longer.
        """
        shared, prefix, caches = self.reach(tokens, places, kv, most)
        if prefix is None:
            return None
        self._kept = [kept for kept in self._kept if kept is not prefix]
        if not is_free(prefix.caches) or len(prefix) - shared > TAIL:
            self._kept.append(prefix)
        elif shared == len(prefix):
            caches = prefix.caches  # with their room for more tokens
        return caches, shared

    def put(
        self, tokens: np.ndarray, places: list[Place], kv: KVSettings, caches: list[Any]
    ) -> None:
        """Keeps a state after `tokens`, in place of those that it can be cut back to."""
        import mlx.core as mx

        mx.eval(arrays_of(caches))
        size = nbytes(caches)
        if size > self.limit:
            return
        tokens = np.array(tokens)
        places = [place for place in places if place[0] < len(tokens)]
        self._kept = [
            kept
            for kept in self._kept
            if kept.kv != kv
            or (shared := agreement(kept, tokens, places)) < len(kept) - TAIL
            or cut(caches, len(tokens), shared) is None
        ]
        self._kept.append(Prefix(tokens, places, kv, caches, size))
        while self.nbytes > self.limit:
            del self._kept[0]


def agreement(prefix: Read, tokens: np.ndarray, places: list[Place]) -> int:
    """How many tokens a prefix and a prompt have in common from the start, pictures compared."""
    length = min(len(prefix.tokens), len(tokens))
    different = np.flatnonzero(prefix.tokens[:length] != tokens[:length])
    shared = int(different[0]) if len(different) else length
    for (start, content), (other_start, other) in zip(prefix.places, places, strict=False):
        if (start, content) != (other_start, other):
            shared = min(shared, start, other_start)
            break
    return shared
