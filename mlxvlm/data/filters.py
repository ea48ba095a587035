"""Rows that do more harm than good, left out where a source asks for it.

repetition   an answer of which over `MOST_REPEATED` of its 10-word stretches were there before,
             over half of whose lines were, or with one letter or digit `LONGEST_RUN` times on end
lengths      supervised tokens far out of their source's quartiles, as Tukey (1977) calls it
duplicates   the same text about the same pictures, by their content; the first one stays

InternVL 2.5 filters for repetition, abnormal lengths, runs of zeros and duplicate lines. Its code
rejects where distinct repeated 10-grams exceed 0.4 of all, a share that falls again the more often
something repeats; ours, at the same threshold, does not.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..errors import DataError, VLMError
from ..prompts.messages import DOCUMENT
from .records import Record
from .samples import Sample, Skipped

WORDS = 10
MOST_REPEATED = 0.4
LEAST_LINES = 6
LONGEST_RUN = 50
# Times the distance of the quartiles; of a source whose rows are all alike, that counts as ln 2.
FAR_OUT = 3.0
LEAST_SPREAD = math.log(2)
# Of fewer rows quartiles say nothing.
LEAST_ROWS = 20

# Chinese, Japanese and Korean have no spaces: each character is taken as a word.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(f"[{_CJK}]|[^\\s{_CJK}]+")
_RUN = re.compile(rf"([^\W_])\1{{{LONGEST_RUN - 1},}}")

Rows = Iterator[tuple[str, Record | VLMError]]


def repeated(text: str) -> float:
    """The share of a text's stretches of 10 words that occurred in it before; 0 of a short one."""
    words = _WORD.findall(text)
    stretches = [tuple(words[at : at + WORDS]) for at in range(len(words) - WORDS + 1)]
    return 1 - len(set(stretches)) / len(stretches) if stretches else 0.0


def why_repetitive(text: str) -> str:
    """What is wrong with an answer; empty if nothing is."""
    share = repeated(text)
    if share > MOST_REPEATED:
        return f"{share:.0%} of its stretches of {WORDS} words repeat (over {MOST_REPEATED:.0%})"
    if run := _RUN.search(text):
        return f"it has {run[1]!r} {len(run[0])} times on end (from {LONGEST_RUN})"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) >= LEAST_LINES and len(set(lines)) < len(lines) / 2:
        return f"{len(lines) - len(set(lines))} of its {len(lines)} lines repeat (over half)"
    return ""


def screen(rows: Rows, filters: Sequence[str], digest: Callable[[str], str]) -> Rows:
    """The rows, with a DataError in the place of each that a filter leaves out.

    digest: sha256 of a picture's content by its name; only asked where texts agree.
    """
    same = Same(digest) if "duplicates" in filters else None
    for where, row in rows:
        if not isinstance(row, VLMError):
            try:
                if "repetition" in filters:
                    _refuse_repetition(row)
                if same is not None and (first := same.met(where, row)):
                    raise DataError(f"the same text and pictures as {first}.", kind="duplicate")
            except DataError as error:
                yield where, error
                continue
        yield where, row


def lengths(samples: Sequence[Sample]) -> Iterator[tuple[Sample, Skipped | None]]:
    """Each sample, and what leaves it out if its supervised tokens are far out of the quartiles."""
    logs = np.log([max(1, sample.num_supervised) for sample in samples] or [1])
    low, high = np.quantile(logs, [0.25, 0.75])
    reach = FAR_OUT * max(high - low, LEAST_SPREAD)
    few = len(samples) < LEAST_ROWS
    for sample, log in zip(samples, logs, strict=False):
        if few or low - reach <= log <= high + reach:
            yield sample, None
            continue
        reason = (
            f"{sample.num_supervised:,} supervised tokens are far from its source's, of which half "
            f"lie between {math.exp(low):,.0f} and {math.exp(high):,.0f}."
        )
        yield sample, Skipped(sample.where, reason, "abnormal length")


class Same:
    """Rows met, by text; and where texts agree, by the content of pictures."""

    def __init__(self, digest: Callable[[str], str]):
        self.digest = digest
        # text -> names -> where; and content -> where, once a second row has the text
        self.rows: dict[bytes, dict[tuple[str, ...], str]] = {}
        self.contents: dict[bytes, dict[tuple[str, ...], str]] = {}

    def met(self, where: str, row: Record) -> str:
        """Where the same row was met first; empty if it was not."""
        text = json.dumps([(message["role"], message["content"]) for message in row.messages])
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        names = tuple(row.images)
        named = self.rows.setdefault(key, {})
        if names in named:
            return named[names]
        first = ""
        if named:
            if key not in self.contents:
                ((others, place),) = named.items()
                self.contents[key] = {self._content(others): place}
            content = self._content(names)
            first = self.contents[key].setdefault(content, where)
            first = "" if first == where else first
        if not first:
            named[names] = where
        return first

    def _content(self, names: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return tuple(map(self.digest, names))
        except (VLMError, OSError):  # what cannot be read is left out for that, as its name
            return names


def _refuse_repetition(row: Record) -> None:
    for message in row.messages:
        if message["role"] not in ("assistant", DOCUMENT):
            continue
        content = message["content"]
        text = (
            content
            if isinstance(content, str)
            else "".join(part.get("text", "") for part in content)
        )
        if reason := why_repetitive(text):
            raise DataError(f"an answer repeats itself: {reason}.", kind="repetition")
