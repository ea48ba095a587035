"""Rows made ready: tokens, what is supervised, and where auxiliary targets sit.

A row is rendered and tokenised once, before the first step, so that lengths are known and a row
that cannot be used is left out with its reason instead of ending a run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..attention import SHORT_QUERIES
from ..config import ModelConfig
from ..errors import DataError, VLMError
from ..images.picture import Cut
from ..merge import spelling
from ..prompts import Prompt, normalize_messages, render
from ..prompts.layout import render_many
from ..prompts.pieces import Spelling
from .records import Record

if TYPE_CHECKING:
    from ..language.tokenizer import Tokenizer


# Rows tokenised in one call.
TOGETHER = 1024


@dataclass
class Target:
    """At `position`, a hidden state should name `words` (token ids) with these `masses` (sum 1)."""

    position: int
    words: np.ndarray
    masses: np.ndarray


class Skipped(NamedTuple):
    """A row that is left out: where it is, why, and the kind of that (`VLMError.kind`)."""

    where: str
    reason: str
    kind: str


class Sample:
    """One row: int32 tokens [L], bool supervised [L], the pictures' names, and `prefix`, the length
    of the part that ends with the last picture and holds nothing supervised (0 without pictures).

    cuts: how each picture is cut. source: which of a run's sources it is from, and so where its
    pictures are. where: its place in that, "train.jsonl:12". time: 2 where an epoch has it for the
    second time.

    The visual tokens of `slots`, (start, length) each, are kept as those numbers alone: of 600,000
    rows with 729 visual tokens each that leaves 0.6 GB in memory, instead of 2.7. Where other
    tokens stand among a picture's, its slot is several runs.
    """

    __slots__ = (
        "_learnt",
        "_runs",
        "_slots",
        "_text",
        "cuts",
        "images",
        "length",
        "prefix",
        "source",
        "targets",
        "time",
        "where",
    )

    def __init__(
        self,
        tokens: np.ndarray,
        supervised: np.ndarray,
        images: list[str],
        prefix: int = 0,
        targets: dict[str, list[Target]] | None = None,
        slots: Sequence[tuple[int, int]] = (),
        source: int = 0,
        where: str = "",
        cuts: Sequence[Cut] = (),
    ):
        self.source, self.where, self.time = source, where, 1
        self.images, self.prefix, self.targets = images, prefix, targets or {}
        self.length, self.cuts = len(tokens), tuple(cuts)
        self._slots = [(start, length, int(tokens[start])) for start, length in slots if length]
        self._runs = [run for slot in self._slots for run in _runs(tokens, *slot)]
        if self._runs == self._slots:
            self._runs = self._slots
        kept = np.ones(len(tokens), np.bool_)
        for start, length, _ in self._runs:
            kept[start : start + length] = False
        self._text, self._learnt = tokens[kept], supervised[kept]

    @property
    def tokens(self) -> np.ndarray:
        """int32 [length]"""
        return self._whole(self._text, [token for *_, token in self._runs])

    @property
    def supervised(self) -> np.ndarray:
        """bool [length]; a visual token never is."""
        return self._whole(self._learnt, [False] * len(self._runs))

    @property
    def num_supervised(self) -> int:
        return int(self._learnt.sum())

    @property
    def num_visual(self) -> int:
        return self.length - len(self._text)

    @property
    def num_views(self) -> int:
        return sum(cut.views for cut in self.cuts)

    @property
    def slots(self) -> list[tuple[int, int]]:
        """(start, length) of each picture, as `Prompt.slots`."""
        return [(start, length) for start, length, _ in self._slots]

    def again(self, time: int) -> Sample:
        """The same row once more in an epoch, for the `time`-th time; arrays are shared."""
        other = copy.copy(self)
        other.where, other.time = f"{self.where} #{time}", time
        return other

    def packed(self) -> bytes:
        """Everything that this row is, as bytes."""
        targets = {
            name: [(t.position, t.words.tolist(), t.masses.tolist()) for t in found]
            for name, found in self.targets.items()
        }
        rest = repr((self._slots, self.images, self.prefix, targets, self.source)).encode()
        return self._text.tobytes() + self._learnt.tobytes() + rest

    def _whole(self, text: np.ndarray, fills: Sequence[int]) -> np.ndarray:
        pieces, done, behind = [], 0, 0
        for (start, length, _), fill in zip(self._runs, fills, strict=True):
            pieces += [text[done : start - behind], np.full(length, fill, text.dtype)]
            done, behind = start - behind, behind + length
        return np.concatenate([*pieces, text[done:]])


def _runs(tokens: np.ndarray, start: int, length: int, image: int) -> list[tuple[int, int, int]]:
    """(start, length, token) of each unbroken run of visual tokens of a picture."""
    visual = np.pad(tokens[start : start + length] == image, 1)
    edges = (np.flatnonzero(np.diff(visual)) + start).tolist()
    return [(a, b - a, image) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def prepare(
    records: Iterable[tuple[str, Record | VLMError]],
    tokenizer: Tokenizer,
    config: ModelConfig,
    cut_of: Callable[[str, int], Cut],
    max_seq_length: int,
    targets: Iterable[str] = (),
    source: int = 0,
) -> tuple[list[Sample], list[Skipped]]:
    """Samples of all usable rows of a source, and what is left out.

    cut_of: how the encoder cuts (or the cache has) a picture, one of so many in its row; a VLMError
    from it costs the row. `targets` are the names of auxiliary targets to keep.
    """
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    words = _Words(tokenizer)
    known: dict[Cut, Cut] = {}  # few among many pictures: each is held once
    rest = iter(records)
    while stretch := list(islice(rest, TOGETHER)):
        rows: list[_Row] = []
        for where, record in stretch:
            try:
                if isinstance(record, VLMError):
                    raise record
                parts, images = normalize_messages(record.messages, record.images)
                found = [cut_of(name, len(images)) for name in images]
                cuts = [known.setdefault(cut, cut) for cut in found]
                counts = [spelling(config, cut) for cut in cuts]
                rows.append(_Row(where, record, parts, list(images), cuts, counts))
            except VLMError as error:
                skipped.append(skip(where, error))
        for row, prompt in zip(rows, _render(rows, tokenizer, config), strict=True):
            try:
                if isinstance(prompt, VLMError):
                    raise prompt
                samples.append(_sample(row, prompt, max_seq_length, targets, words, source))
            except VLMError as error:
                skipped.append(skip(row.where, error))
    return samples, skipped


def skip(where: str, error: VLMError) -> Skipped:
    """What leaves a row out; an error begins with the row's place already if it was read there."""
    return Skipped(where, str(error).removeprefix(f"{where}: "), error.kind)


@dataclass
class _Row:
    where: str
    record: Record
    parts: list[dict[str, Any]]
    images: list[str]
    cuts: list[Cut]
    counts: list[Spelling]


def _render(rows: list[_Row], tokenizer: Tokenizer, config: ModelConfig) -> list[Prompt | VLMError]:
    """All rows at once, on all cores; where one of them fails, one by one."""
    try:
        return [*render_many([(r.parts, r.counts) for r in rows], tokenizer, config.prompt, False)]
    except VLMError:
        found: list[Prompt | VLMError] = []
        for row in rows:
            try:
                found.append(render(row.parts, row.counts, tokenizer, config.prompt, False))
            except VLMError as error:
                found.append(error)
        return found


def _sample(
    row: _Row,
    prompt: Prompt,
    max_seq_length: int,
    targets: Iterable[str],
    words: _Words,
    source: int,
) -> Sample:
    length = len(prompt.tokens)
    if length > max_seq_length:
        visual = sum(n for count in row.counts for n in count if isinstance(n, int))
        raise DataError(
            f"{length} tokens are more than --max-seq-length {max_seq_length} "
            f"({visual} of them visual).",
            kind="too long",
        )
    # Nothing predicts the first token.
    if not prompt.supervised[1:].any():
        raise DataError(
            "nothing is supervised: no assistant turn has an answer.", kind="nothing supervised"
        )
    end = max((start + n for start, n in prompt.slots), default=0)
    # A shared part of so few positions would meet the trap that `attention` describes.
    alone = end <= SHORT_QUERIES or prompt.supervised[:end].any()
    raw = row.record.targets or {}
    found: dict[str, list[Target]] = {}
    for name in targets:
        each = raw.get(name, [])
        if not isinstance(each, list):
            raise DataError(f"targets {name!r} must be a list, not {each!r:.60}.", kind="target")
        found[name] = [_target(one, prompt, words) for one in each]
    return Sample(
        tokens=prompt.tokens,
        supervised=prompt.supervised,
        images=row.images,
        prefix=0 if alone else end,
        targets={name: kept for name, kept in found.items() if kept},
        slots=prompt.slots,
        source=source,
        where=row.where,
        cuts=row.cuts,
    )


def _target(raw: dict[str, Any], prompt: Prompt, words: _Words) -> Target:
    """A target names its place as (image, token) or as (turn, end), end being just past a word."""
    try:
        if "image" in raw:
            start, length = prompt.slots[raw["image"]]
            span = prompt.tokens[start : start + length]
            visual = np.flatnonzero(span == span[0])
            if not 0 <= raw["token"] < len(visual):
                raise DataError(
                    f"target {raw} lies outside its picture's {len(visual)} tokens.", kind="target"
                )
            position = start + int(visual[raw["token"]])
        else:
            last = raw["end"] - 1
            hits = np.flatnonzero(
                (prompt.turns == raw["turn"])
                & (prompt.chars[:, 0] <= last)
                & (prompt.chars[:, 1] > last)
            )
            if not len(hits):
                raise DataError(f"target {raw} points at no token of its turn.", kind="target")
            position = int(hits[-1])
        named = raw["words"]
        masses = dict.fromkeys(named, 1.0) if isinstance(named, list) else dict(named)
        total = sum(masses.values())
        good = all(mass >= 0 for mass in masses.values()) and 0 < total < math.inf
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"target {raw} lacks or misstates {error}.", kind="target") from None
    if not good:
        raise DataError(f"target {raw} must give its words masses from 0 up.", kind="target")
    return Target(
        position,
        np.array([words[word] for word in masses], dtype=np.int32),
        np.array([mass / total for mass in masses.values()], dtype=np.float32),
    )


class _Words(dict):
    """Token ids of words as they stand inside a sentence, each exactly one token."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, word: str) -> int:
        for text in (" " + word, word):
            ids, _ = self.tokenizer.encode(text)
            if len(ids) == 1:
                self[word] = ids[0]
                return ids[0]
        raise DataError(f"target word {word!r} is not one token of this tokenizer.", kind="target")
