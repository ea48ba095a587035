"""Several sampled answers to one question, and what most of them come to.

vote = vlm.vote([{"role": "user", "content": "How many chairs are there?"}], ["room.jpg"])
vote.answer, vote.counts

Each sample is asked for its steps first (chain of thought, Wei et al. 2022), and the final answers
are counted (self-consistency, Wang et al. 2023), as InternVL 2.5 does at test time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .batch import samples as draw
from .errors import ConfigError, VLMError
from .reply import Reply, with_defaults

if TYPE_CHECKING:
    from .model import VLM

SAMPLES = 8
# Where neither the caller nor the model samples: greedy samples would all be one.
TEMPERATURE = 0.7
# Steps take room.
MAX_TOKENS = 1024
ASK = "\nThink step by step, then give the answer alone on the last line, in the form:\nAnswer: ..."

MARKED = re.compile(r"answer(?:\s+is)?\s*[*_]*\s*[:\uff1a]\s*(.+)", re.IGNORECASE)
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
# "(B)", "B.", "B: a cat"
CHOICE = re.compile(r"\(?([a-z])\)?(?:[.:)]\s.*|[.:)]?)")
# What a number has at its end for nothing: 3.0, 2.50.
ZEROS = re.compile(r"(?<=\d)(?:\.0+|(\.\d*[1-9])0+)(?!\d)")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")


@dataclass
class Vote:
    """What samples came to.

    answer: as the first sample said it whose final answer has the most votes; of answers with as
        many, the one that came first. counts: votes by normalised answer, the most first.
    answers: each sample's normalised answer; None where it was cut short before it had one.
    """

    answer: str
    counts: dict[str, int]
    answers: list[str | None]
    replies: list[Reply]


def vote(
    vlm: VLM,
    messages: Sequence[dict[str, Any]],
    images: Sequence[Any] = (),
    *,
    samples: int = SAMPLES,
    reason: bool = True,
    **options: Any,
) -> Vote:
    """Asks `samples` times and counts the answers; VLMError where no sample came to one.

    reason: whether the last question asks for steps before the answer. options: as in
    `batch.samples`; where nothing says otherwise, temperature 0.7 and at most 1,024 tokens.
    """
    given = {name: value for name, value in options.items() if value is not None}
    options = {"max_tokens": MAX_TOKENS, **given}
    asked = with_defaults(vlm, _settings(options))
    if samples > 1 and not asked.get("temperature"):
        if "temperature" in options:
            raise ConfigError("temperature 0 gives the same answer every time: vote above 0.")
        options["temperature"] = TEMPERATURE
    if reason:
        messages = with_steps(messages)
    return count(draw(vlm, messages, images, samples, **options))


def count(replies: Sequence[Reply]) -> Vote:
    """The vote of replies that are there already."""
    said = [final(reply.text, reply.finish_reason == "stop") for reply in replies]
    answers = [None if text is None else normalise(text) for text in said]
    # In order of first appearance, which most_common keeps among equals.
    counts = dict(Counter(one for one in answers if one).most_common())
    if not counts:
        raise VLMError(
            f"none of {len(replies)} samples came to an answer: allow longer ones (max_tokens)."
        )
    best = next(iter(counts))
    return Vote(str(said[answers.index(best)]), counts, answers, list(replies))


def with_steps(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose last question asks for steps and an answer after them."""
    *before, last = messages
    content = last["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    if parts and parts[-1].get("type") == "text":
        parts[-1] = parts[-1] | {"text": parts[-1]["text"] + ASK}
    else:
        parts.append({"type": "text", "text": ASK.lstrip()})
    whole = parts[0]["text"] if isinstance(content, str) else parts
    return [*before, {**last, "content": whole}]


def final(text: str, whole: bool = True) -> str | None:
    """The answer that a text ends in: behind its last "Answer:", in its last box, or else, of a
    whole text, its last line. None where there is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if found := MARKED.search(line):
            return found[1].strip()
        if found := BOXED.findall(line):
            return found[-1].strip()
    return lines[-1] if whole and lines else None


def normalise(answer: str) -> str:
    """What answers that mean the same have in common: no case, mark-up, end stop or article; a
    choice is its letter, a number has no commas and no zeros at its end."""
    text = BOXED.sub(r"\1", answer).strip().strip("*_`$\"' ").strip()
    text = re.sub(r"\s+", " ", text).casefold()
    if found := CHOICE.fullmatch(text):
        return found[1]
    text = text.rstrip(".!;,").strip("*_`$\"' ")
    text = THOUSANDS.sub("", re.sub(r"^(?:the|an?) (?=\S)", "", text))
    return ZEROS.sub(lambda found: found[1] or "", text)


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    names = ("batch_size", "allow_urls", "reuse", "stop")
    return {name: value for name, value in options.items() if name not in names}
