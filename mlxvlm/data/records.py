"""A row of data, whichever of the common forms it was written in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, PromptError
from ..prompts.messages import normalize_messages

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
PLACEHOLDER = "<image>"


@dataclass
class Record:
    """One row.

    images: names as the row has them. messages: user turns that place images are in parts form, the
    others as written; images that nothing places go to the first user turn. targets: auxiliary
    targets, untouched.
    """

    images: list[str]
    messages: list[dict[str, Any]]
    id: str | None = None
    targets: dict[str, Any] | None = None


def parse_record(raw: Any, where: str) -> Record:
    """Reads a row of one of these forms; `where` ("train.jsonl:12") begins every error.

        {"image": "a.jpg" | "images": [...], "messages": [{"role", "content"}]}
        {"image": ..., "conversations": [{"from": "human" | "gpt", "value"}]}      LLaVA
        {"image": ..., "text": "a caption"}

    `<image>` in LLaVA's human turns places an image, and there must be as many as images. In the
    strings of `messages` it does so only if there are as many; otherwise it is text. Whitespace
    beside a placeholder that begins or ends a turn goes with it. An image part may name its own
    file, {"type": "image", "image": "a.jpg"}. A row without images is fine.
    """
    try:
        return _parse(raw)
    except (DataError, PromptError) as error:
        raise DataError(f"{where}: {error}") from None


def _parse(raw: Any) -> Record:
    if not isinstance(raw, dict):
        raise DataError(f"a row must be a JSON object, not a {type(raw).__name__}.")
    forms = [form for form in ("messages", "conversations", "text") if raw.get(form) is not None]
    if len(forms) != 1:
        raise DataError(
            "a row must have exactly one of 'messages', 'conversations' and 'text'; this one has "
            f"{' and '.join(forms) or 'none'}."
        )
    images = _images(raw)
    if forms == ["text"]:
        messages = _caption(raw["text"], images)
    elif forms == ["messages"]:
        messages = _place(_messages(raw["messages"]), images, strict=False)
    else:
        messages = _place(_conversations(raw["conversations"]), images, strict=True)
    # Whatever a prompt would refuse is refused here.
    parts, found = normalize_messages(messages, images)
    if len(found) != len(images):  # some parts bring their own
        messages, images = parts, _images({"images": found})
    targets = raw.get("targets")
    if targets is not None and not isinstance(targets, dict):
        raise DataError(f"'targets' must be an object, not a {type(targets).__name__}.")
    name = raw.get("id")
    return Record(images, messages, None if name is None else str(name), targets)


def _images(raw: dict[str, Any]) -> list[str]:
    given = [key for key in ("image", "images") if raw.get(key) is not None]
    if len(given) == 2:
        raise DataError("a row must have 'image' or 'images', not both.")
    value = raw[given[0]] if given else []
    images = [value] if isinstance(value, str) else value
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise DataError(f"{given[0]!r} must be a file name or a list of them, not {value!r:.60}.")
    return images


def _caption(text: Any, images: list[str]) -> list[dict[str, Any]]:
    if not isinstance(text, str) or not text.strip():
        raise DataError("'text' must be a caption, and not empty.")
    if not images:
        raise DataError("a caption needs an image; this row has none.")
    return [
        {"role": "user", "content": [{"type": "image"} for _ in images]},
        {"role": "assistant", "content": text},
    ]


def _messages(rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list):
        raise DataError(f"'messages' must be a list, not a {type(rows).__name__}.")
    return [dict(row) if isinstance(row, dict) else row for row in rows]


def _conversations(rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list):
        raise DataError(f"'conversations' must be a list, not a {type(rows).__name__}.")
    messages = []
    for at, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("value"), str) or "from" not in row:
            raise DataError(f"turn {at} must be an object with 'from' and a string 'value'.")
        if row["from"] not in ROLES:
            raise DataError(
                f"turn {at} is from {row['from']!r}; it must be one of {', '.join(ROLES)}."
            )
        messages.append({"role": ROLES[row["from"]], "content": row["value"]})
    return messages


def _place(messages: list[dict[str, Any]], images: list[str], strict: bool) -> list[dict[str, Any]]:
    """User strings with placeholders become parts. strict: a count that differs is an error."""
    users = [
        message
        for message in messages
        if isinstance(message, dict)
        and message.get("role") == "user"
        and isinstance(message.get("content"), str)
    ]
    count = sum(message["content"].count(PLACEHOLDER) for message in users)
    if count == 0:
        return messages
    if count != len(images):
        if not strict:
            return messages
        raise DataError(
            f"the human turns hold {count} {PLACEHOLDER} placeholders, but the row has "
            f"{len(images)} images."
        )
    for message in users:
        if PLACEHOLDER in message["content"]:
            message["content"] = _split(message["content"])
    return messages


def _split(text: str) -> list[dict[str, Any]]:
    """Text and images in order, without the whitespace that only sets a placeholder apart."""
    pieces = re.split(f"({re.escape(PLACEHOLDER)})", text)
    # "<image>\nWhat?" and "What?\n<image>": layouts write their own separator.
    for at in range(0, len(pieces), 2):
        if not "".join(pieces[:at:2]).strip():
            pieces[at] = pieces[at].lstrip()
        if not "".join(pieces[at + 2 :: 2]).strip():
            pieces[at] = pieces[at].rstrip()
    return [
        {"type": "image"} if piece == PLACEHOLDER else {"type": "text", "text": piece}
        for piece in pieces
        if piece
    ]
