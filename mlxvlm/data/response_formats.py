"""LLaVA-1.5's response-format prompts (Liu et al. 2023).

Short answers are asked for as such, so that a model which learns from them still answers at length
where nobody asks for less.
"""

from __future__ import annotations

from typing import Any

FORMATS = {
    "short": "Answer the question using a single word or phrase.",
    "choice": "Answer with the option's letter from the given choices directly.",
    "caption": "Provide a one-sentence caption for the provided image.",
    "region": "Provide a short description for this region.",
}


def ask_for(messages: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The messages with format `name` as the last line of each user's turn that lacks it."""
    return [
        {**message, "content": _with(message["content"], FORMATS[name])}
        if message["role"] == "user"
        else message
        for message in messages
    ]


def _with(content: Any, line: str) -> Any:
    if isinstance(content, str):
        return content if line in content else f"{content.rstrip()}\n{line}".lstrip()
    texts = [part for part in content if part["type"] == "text"]
    if any(line in part["text"] for part in texts):
        return content
    if not texts:
        return [*content, {"type": "text", "text": line}]
    last = max(at for at, part in enumerate(content) if part["type"] == "text")
    text = _with(content[last]["text"], line)
    return [*content[:last], {**content[last], "text": text}, *content[last + 1 :]]
