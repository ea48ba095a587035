"""A row of data, whichever of the common forms it was written in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, PromptError
from ..prompts.messages import DOCUMENT, normalize_messages
from .documents import is_document, read_document

# What a row may be; each has exactly one of these.
FORMS = ("messages", "conversations", "text", "prompt", "texts", "text_list", "content")
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
    others as written; images that nothing places go to the first user turn. A document is a single
    message of role "document". targets: auxiliary targets, untouched.
    """

    images: list[str]
    messages: list[dict[str, Any]]
    id: str | None = None
    targets: dict[str, Any] | None = None


def parse_record(raw: Any, where: str) -> Record:
    """Reads a row of one of these forms; `where` ("train.jsonl:12") begins every error.

        {"image": "a.jpg" | "images": [...], "messages": [{"role", "content"}]}
        {"image": ..., "conversations": [{"from": "human" | "gpt", "value"}]}      LLaVA
        {"image": ..., "text" | "caption": "a caption"}
        {"file_name": "a.jpg", "text" | "caption": "a caption"}      Hugging Face's imagefolder
        {"image": ..., "prompt": "...", "completion": "..."}         strings, or TRL's messages
        {"images": ..., "texts": [{"user", "assistant"}]}            The Cauldron
        {"content": [{"type": "image" | "text", ...}]}               a document: text, images in it
        {"images": ["a.jpg", null], "texts": [null, "A text."]}      OBELICS: one is null
        {"text_list": [...], "image_info": [{"image_name", "matched_text_index"}]}   MMC4

    `<image>` in LLaVA's human turns places an image, and there must be as many as images. In the
    strings of `messages` and `prompt` it does so only if there are as many; otherwise it is text.
    Whitespace beside a placeholder that begins or ends a turn goes with it. An image part may name
    its own file, {"type": "image", "image": "a.jpg"}. A row without images is fine, but for a
    caption's. All of a document's text is learnt.
    """
    try:
        return _parse(raw)
    except (DataError, PromptError) as error:
        raise DataError(f"{where}: {error}", kind=error.kind) from None


def _parse(raw: Any) -> Record:
    if not isinstance(raw, dict):
        raise DataError(f"a row must be a JSON object, not a {type(raw).__name__}.")
    forms = [form for form in FORMS if raw.get(form) is not None]
    if not forms and raw.get("caption") is not None:
        raw, forms = raw | {"text": raw["caption"]}, ["text"]
    if len(forms) != 1:
        raise DataError(
            f"a row must have exactly one of {', '.join(map(repr, FORMS[:-1]))} and "
            f"{FORMS[-1]!r}; this one has {' and '.join(forms) or 'none'}."
        )
    (form,) = forms
    if is_document(raw, form):
        parts, images = read_document(raw, form)
        messages = [{"role": DOCUMENT, "content": parts}]
    else:
        images = _images(raw)
        messages = _turns(raw, form, images)
    # Whatever a prompt would refuse is refused here.
    parts, found = normalize_messages(messages, images)
    if len(found) != len(images):  # some parts bring their own
        messages, images = parts, _images({"images": found})
    targets = raw.get("targets")
    if targets is not None and not isinstance(targets, dict):
        raise DataError(f"'targets' must be an object, not a {type(targets).__name__}.")
    name = raw.get("id")
    return Record(images, messages, None if name is None else str(name), targets)


def _turns(raw: dict[str, Any], form: str, images: list[str]) -> list[dict[str, Any]]:
    if form == "text":
        return _caption(raw["text"], images)
    if form == "messages":
        return _place(_messages(raw["messages"]), images, strict=False)
    if form == "prompt":
        return _place(_completed(raw), images, strict=False)
    if form == "texts":
        return _asked(raw["texts"])
    return _place(_conversations(raw["conversations"]), images, strict=True)


def _images(raw: dict[str, Any]) -> list[str]:
    given = [key for key in ("image", "images") if raw.get(key) is not None]
    if len(given) == 2:
        raise DataError("a row must have 'image' or 'images', not both.")
    if not given and raw.get("file_name") is not None:
        given = ["file_name"]
    value = raw[given[0]] if given else []
    images = [value] if isinstance(value, str) else value
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise DataError(f"{given[0]!r} must be a file name or a list of them, not {value!r:.60}.")
    return images


def _caption(text: Any, images: list[str]) -> list[dict[str, Any]]:
    if not isinstance(text, str) or not text.strip():
        raise DataError("'text' must be a caption, and not empty.")
    if not images:
        raise DataError(
            "a caption needs a picture under 'image' or 'images', and this row has none; text "
            "alone goes in 'messages'.",
            kind="number of images",
        )
    return [
        {"role": "user", "content": [{"type": "image"} for _ in images]},
        {"role": "assistant", "content": text},
    ]


def _messages(rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list):
        raise DataError(f"'messages' must be a list, not a {type(rows).__name__}.")
    return [dict(row) if isinstance(row, dict) else row for row in rows]


def _completed(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """A prompt and its completion; only the completion is learnt."""
    prompt, completion = raw["prompt"], raw.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise DataError("'prompt' and 'completion' must be two strings, or two lists of messages.")
    if any(isinstance(turn, dict) and turn.get("role") == "assistant" for turn in prompt):
        raise DataError(
            "'prompt' holds an assistant's message, and every one would be learnt: write the row "
            "as 'messages' if that is meant, or one row for each answer."
        )
    return _messages([*prompt, *completion])


def _asked(turns: Any) -> list[dict[str, Any]]:
    """The Cauldron's texts."""
    messages = []
    for at, turn in enumerate(turns):
        if not isinstance(turn, dict) or not {"user", "assistant"} & set(turn):
            raise DataError(f"texts[{at}] must be an object with 'user' and 'assistant'.")
        for role in ("user", "assistant"):
            if turn.get(role):
                messages.append({"role": role, "content": turn[role]})
    return messages


def _conversations(rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list):
        raise DataError(f"'conversations' must be a list, not a {type(rows).__name__}.")
    messages = []
    for at, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("value"), str) or "from" not in row:
            raise DataError(f"turn {at} must be an object with 'from' and a string 'value'.")
        if not isinstance(row["from"], str) or row["from"] not in ROLES:
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
            f"{len(images)} images.",
            kind="number of images",
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
