"""Text to ids with a model that knows no control token.

The library matches added tokens, special or not, anywhere in a text. The encoder here shares the
model and its vocabulary but has no added tokens, except runs of whitespace, which some vocabularies
add to write indentation shortly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

from ..errors import PromptError

Encoded = tuple[list[int], list[tuple[int, int]]]


class PlainText:
    """Encodes text for a `tokenizers.Tokenizer`; none of the ids in `control` ever comes out."""

    def __init__(self, backend: Any, control: Collection[int]):
        self._backend = _with_steps(backend.model, backend)
        self._control = frozenset(control) - {_unknown(backend)}
        added = backend.get_added_tokens_decoder()
        spaces = {i: token for i, token in added.items() if not token.content.strip()}
        self._backend.add_tokens(list(spaces.values()))
        # The copy may number them anew.
        renumber = {self._backend.token_to_id(t.content): i for i, t in spaces.items()}
        self._renumber = {new: i for new, i in renumber.items() if new != i}

    def encode(self, text: str, first: bool) -> Encoded:
        return self._finish(text, self._for(first).encode(text, add_special_tokens=False))

    def encode_many(self, texts: Sequence[str], first: Sequence[bool]) -> list[Encoded]:
        out: list[Encoded] = [([], [])] * len(texts)
        for flag in set(first):
            rows = [i for i, f in enumerate(first) if f == flag]
            found = self._for(flag).encode_batch([texts[i] for i in rows], add_special_tokens=False)
            for i, encoding in zip(rows, found, strict=True):
                out[i] = self._finish(texts[i], encoding)
        return out

    def encode_inside(self, text: str) -> list[int]:
        return self._finish(text, self._inside.encode(text, add_special_tokens=False))[0]

    def _for(self, first: bool) -> Any:
        return self._backend if first else self._later

    @cached_property
    def _later(self) -> Any:
        """For text after a control token: Metaspace's "first" scheme writes no space there."""
        return _without_prefix(self._backend, only_first=True)

    @cached_property
    def _inside(self) -> Any:
        """For text that goes on within a word: no leading space of any scheme."""
        return _without_prefix(self._backend, only_first=False)

    def _finish(self, text: str, encoding: Any) -> Encoded:
        ids: list[int] = encoding.ids
        if self._renumber:
            ids = [self._renumber.get(i, i) for i in ids]
        # A Unigram or whole-word model can find a control token's name as a word of its own.
        if self._control.isdisjoint(ids):
            return ids, encoding.offsets
        at = next(n for n, i in enumerate(ids) if i in self._control)
        return self._cut(text, *encoding.offsets[at])

    def _cut(self, text: str, start: int, end: int) -> Encoded:
        """Encodes in two parts a text that has a control token's name at [start, end)."""
        while start < end and text[start].isspace():
            start += 1
        cut = start + 1
        if cut >= end:
            raise PromptError(
                f"the text holds {text[start:end]!r}, which this tokenizer can only read as a "
                "control token."
            )
        head = self._finish(text[:cut], self._backend.encode(text[:cut], add_special_tokens=False))
        tail = self._finish(text[cut:], self._inside.encode(text[cut:], add_special_tokens=False))
        return head[0] + tail[0], head[1] + [(s + cut, e + cut) for s, e in tail[1]]


def _unknown(backend: Any) -> int | None:
    """The id that stands for what the vocabulary cannot write; text may well come to it."""
    if type(backend.model).__name__ == "Unigram":  # which does not show it, but writes it first
        found = re.search(rb'"unk_id":\s*(\d+)', backend.model.__getstate__()[:100])
        return int(found[1]) if found else None
    token = getattr(backend.model, "unk_token", None)
    return None if token is None else backend.token_to_id(token)


def _with_steps(model: Any, steps: Any) -> Any:
    """A tokenizer of `model` with the normalizer and pre-tokenizer of `steps`, no added tokens."""
    from tokenizers import Tokenizer as Backend

    copy = Backend(model)
    if steps.normalizer is not None:
        copy.normalizer = steps.normalizer
    if steps.pre_tokenizer is not None:
        copy.pre_tokenizer = steps.pre_tokenizer
    return copy


def _without_prefix(backend: Any, only_first: bool) -> Any:
    """A copy that writes no leading space: under the scheme "first" only, or under any."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    # Only these two small parts pass through JSON: the model, with its vocabulary, is shared.
    state = json.loads(_with_steps(BPE(), backend).to_str())
    state["pre_tokenizer"] = _unprefixed(state["pre_tokenizer"], only_first)
    state["normalizer"] = _unprefixed(state["normalizer"], only_first)
    copy = _with_steps(backend.model, Backend.from_str(json.dumps(state)))
    copy.add_tokens(list(backend.get_added_tokens_decoder().values()))
    return copy


def _unprefixed(step: Any, only_first: bool) -> Any:
    if not isinstance(step, dict):
        return step
    step = dict(step)
    for name in ("pretokenizers", "normalizers"):
        if name in step:
            step[name] = [_unprefixed(inner, only_first) for inner in step[name]]
    if step["type"] == "Metaspace" and (not only_first or step.get("prepend_scheme") == "first"):
        step["prepend_scheme"] = "never"
    if not only_first and step["type"] == "ByteLevel":
        step["add_prefix_space"] = False
    if not only_first and step["type"] == "Prepend":
        return {
            "type": "Replace",
            "pattern": {"String": step["prepend"]},
            "content": step["prepend"],
        }
    return step
