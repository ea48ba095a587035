"""`mlxvlm chat --vote`: several sampled answers to one question, and what most of them come to."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from mlxvlm.cli.talk import note

if TYPE_CHECKING:
    from mlxvlm.model import VLM


def tell(
    vlm: VLM,
    question: str,
    system: str,
    shown: tuple[dict[str, Any], int | None],
    as_json: bool,
    **options: Any,
) -> None:
    """Prints the answer, and how the samples voted; as one JSON object, each sample too.

    shown: pictures and videos by the names that the JSON has for them, and the frames of a video.
    options: as in `vlm.vote`.
    """
    about, frames = shown
    sampled = {} if frames is None else {"frames": frames}
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in about["images"]]
    parts += [{"type": "video", "video": one, **sampled} for one in about.get("videos", [])]
    parts.append({"type": "text", "text": question})
    messages = [{"role": "user", "content": parts}]
    if system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    found = vlm.vote(messages, about["images"], **options)
    if as_json:
        each = []
        for reply, answer in zip(found.replies, found.answers, strict=True):
            told = asdict(reply)
            del told["tokens"]
            each.append({"answer": answer, **told})
        told = {**about, "answer": found.answer, "counts": found.counts, "samples": each}
        typer.echo(json.dumps(told))
        return
    typer.echo(found.answer)
    votes = ", ".join(f"{answer!r} {count}" for answer, count in found.counts.items())
    none = found.answers.count(None) + found.answers.count("")
    note(f"(votes of {len(found.replies)}: {votes}{f'; {none} came to none' if none else ''})")
