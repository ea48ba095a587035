"""Interleaved documents: text with images where they stood on the page, and no roles.

{"content": [{"type": "text", "text": ...}, {"type": "image", "image": "a.jpg"}, ...]}
{"images": ["a.jpg", null], "texts": [null, "A text."]}                     OBELICS
{"text_list": [...], "image_info": [{"image_name", "matched_text_index"}]}   MMC4
"""

from __future__ import annotations

from typing import Any

from ..errors import DataError

Parts = list[dict[str, Any]]


def is_document(raw: dict[str, Any], form: str) -> bool:
    """Whether a row of this form is a document; 'texts' may be The Cauldron's questions too."""
    if form == "texts":
        texts = raw["texts"]
        if not isinstance(texts, list) or not texts:
            raise DataError("'texts' must be a list, and not empty.")
        return not any(isinstance(text, dict) for text in texts)
    return form in ("content", "text_list")


def read_document(raw: dict[str, Any], form: str) -> tuple[Parts, list[str]]:
    """(parts, the images of those that bring none, in order). DataError."""
    if form == "content":
        parts, images = _content(raw)
    else:
        parts = _obelics(raw) if form == "texts" else _mmc4(raw)
        images = [part.pop("image") for part in parts if part["type"] == "image"]
    # A part of another kind is refused as messages' are.
    if all(isinstance(part, dict) and not part.get("text") for part in parts):
        raise DataError("a document must have text; this one has none.")
    return parts, images


def _content(raw: dict[str, Any]) -> tuple[Parts, list[str]]:
    content = raw["content"]
    if not isinstance(content, list) or not content:
        raise DataError("'content' must be a list of parts, and not empty.")
    return [dict(part) if isinstance(part, dict) else part for part in content], _names(raw)


def _obelics(raw: dict[str, Any]) -> Parts:
    """Two lists of one length, or images without the places that texts have."""
    texts = raw["texts"]
    for at, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise DataError(f"texts[{at}] must be a string or null.")
    images = raw.get("images") or []
    if not isinstance(images, list):
        raise DataError("'images' of a document must be a list.")
    if len(images) != len(texts):
        found = iter(_names(raw))
        places = sum(text is None for text in texts)
        if places != len(images):
            raise DataError(
                f"'texts' has {places} places for images (null), but the row has {len(images)} "
                "images.",
                kind="number of images",
            )
        images = [next(found) if text is None else None for text in texts]
    parts: Parts = []
    for at, (text, image) in enumerate(zip(texts, images, strict=True)):
        if text is not None and image is not None:
            raise DataError(f"place {at} of the document has a text and an image; null is for one.")
        if image is not None:
            parts.append({"type": "image", "image": _name(image)})
        elif text:
            parts.append({"type": "text", "text": text})
    return parts


def _mmc4(raw: dict[str, Any]) -> Parts:
    """Sentences, each image before the one that it was matched with."""
    texts, about = raw["text_list"], raw.get("image_info") or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError("'text_list' must be a list of strings.")
    if not isinstance(about, list):
        raise DataError("'image_info' must be a list.")
    placed: dict[int, list[str]] = {}
    for one in about:
        at = one.get("matched_text_index") if isinstance(one, dict) else None
        if not isinstance(at, int) or not 0 <= at < len(texts):
            raise DataError(
                f"'image_info' must give each image a matched_text_index below {len(texts)}."
            )
        placed.setdefault(at, []).append(_name(one.get("image_name") or one.get("raw_url")))
    parts: Parts = []
    for at, text in enumerate(texts):
        parts += [{"type": "image", "image": name} for name in placed.get(at, [])]
        if text:
            # Sentences of one paragraph, as the set's own loaders join them.
            parts.append({"type": "text", "text": text if at + 1 == len(texts) else text + " "})
    return parts


def _names(raw: dict[str, Any]) -> list[str]:
    value = raw.get("images") if raw.get("images") is not None else raw.get("image")
    images = [] if value is None else value if isinstance(value, list) else [value]
    return [_name(name) for name in images]


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise DataError(f"an image of a document must be a file name, not {name!r:.60}.")
    return name
