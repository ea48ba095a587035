"""Messages as callers write them, brought into one form and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import PromptError

ROLES = ("system", "user", "assistant")
# The one message of an interleaved document: text without roles, and images in it.
DOCUMENT = "document"


def normalize_messages(
    messages: Sequence[dict[str, Any]], images: Sequence[Any] = ()
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages in parts form, and the images in the order of their parts.

    Content is a string or a list of {"type": "text", "text": ...} and {"type": "image"}. Where no
    part places an image, all go to the head of the first user turn. An image part may bring its own
    image, {"type": "image", "image": ...}; the others take theirs from `images`, in order.
    """
    check_turns(messages)
    out = [
        {"role": message["role"], "content": _parts(message["content"], message["role"], at)}
        for at, message in enumerate(messages)
    ]
    places = [part for message in out for part in message["content"] if part["type"] == "image"]
    images = [images] if isinstance(images, str | bytes) else list(images)
    if images and not places:
        first = next(message for message in out if message["role"] in ("user", DOCUMENT))
        places = [{"type": "image"} for _ in images]
        first["content"][:0] = places
    bare = [part for part in places if "image" not in part]
    if len(bare) != len(images):
        raise PromptError(
            f"the messages have {_count(len(bare), 'place')} for images, but "
            f"{_count(len(images), 'image')} came with them: give one image for each.",
            kind="number of images",
        )
    waiting = iter(images)
    return out, [part.pop("image") if "image" in part else next(waiting) for part in places]


def check_turns(messages: Sequence[dict[str, Any]]) -> None:
    """An optional system message, then user and assistant by turns, the user first; or a single
    document."""
    if isinstance(messages, dict | str) or not isinstance(messages, Sequence):
        raise PromptError(f"messages must be a list of messages, not a {type(messages).__name__}.")
    if not messages:
        raise PromptError("messages must hold at least one user message; there are none.")
    expected = "user"
    for at, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise PromptError(f"message {at} must be an object with 'role' and 'content'.")
        role = message["role"]
        if role == DOCUMENT:
            if len(messages) > 1:
                raise PromptError(f"message {at} is a document, which must stand alone.")
            return
        if role not in ROLES:
            raise PromptError(
                f"message {at} has role {role!r}; it must be one of {', '.join(ROLES)}."
            )
        if role == "system":
            if at:
                raise PromptError(f"message {at} is a system message; only the first may be one.")
            continue
        if role != expected:
            raise PromptError(
                f"message {at} is the {role}'s, but it is the {expected}'s turn: user and "
                "assistant alternate, and the user begins."
            )
        expected = "assistant" if role == "user" else "user"
    if expected == "user" and messages[-1]["role"] == "system":
        raise PromptError(
            "messages must hold at least one user message; there is only a system one."
        )


def text_of(message: dict[str, Any]) -> str:
    """The text parts of a message in parts form, concatenated."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def _parts(content: Any, role: str, at: int) -> list[dict[str, Any]]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise PromptError(
            f"the content of message {at} must be a string or a list of parts, "
            f"not a {type(content).__name__}."
        )
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": _unicode(part["text"], at)})
        elif kind == "image":
            if role not in ("user", DOCUMENT):
                raise PromptError(
                    f"message {at} is the {role}'s; only a user message may hold images."
                )
            image = part.get("image")
            parts.append({"type": "image"} if image is None else {"type": "image", "image": image})
        else:
            raise PromptError(
                f"message {at} has a part {_short(part)}; a part is "
                '{"type": "text", "text": "..."} or {"type": "image"}.'
            )
    return parts


def _unicode(text: str, at: int) -> str:
    """JSON and command lines can hold half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"message {at} holds a broken character at position {error.start}: text must be "
            "valid Unicode."
        ) from None
    return text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
