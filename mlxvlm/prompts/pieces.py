"""Pieces of a prompt, and how they become tokens.

A layout turns messages into pieces: control tokens (by id), texts, and slots for pictures. Texts
that stand next to each other form one section, and a section is encoded as one string, so that its
tokens are those of the whole prompt tokenised at once:

    <|bos|> <|start|> "user" <|end|> "\\n\\n"  [slot 0]  "\\n" "What is it?"  <|eot|> ...
                      section        section            one section
    turns   -1   -1     -1     -1      -1       -1       -1    0 ...            -1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import PromptError

if TYPE_CHECKING:
    from ..language.plain_text import Encoded
    from ..language.tokenizer import Tokenizer


@dataclass
class Prompt:
    """Tokens and what is known of each.

    tokens: int32 [L]; a picture is `prompt.image_token_id`, once per visual token.
    supervised: bool [L]; True on the tokens to learn: each answer and its end token.
    pictures: what fills the slots, in order; the model's `tokenize` puts them here.
    turns: int32 [L]; which message a token of content belongs to, otherwise -1.
    chars: int32 [L, 2]; where in that message's text (its text parts concatenated, before any
        trimming) the token starts and ends, otherwise -1.
    slots: (start, length) of each picture, in order: from its first visual token to its last. Other
        tokens may stand between them, where `prompt.merge` puts words there.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    pictures: list[Any] = field(default_factory=list)
    turns: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    chars: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int32))
    slots: list[tuple[int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Control:
    """A control token. `implicit`: put there by the layout as a tokenizer puts its BOS, so that the
    text behind it still counts as the first."""

    id: int
    supervised: bool = False
    implicit: bool = False


@dataclass
class Text:
    """Text; if `turn` is not -1, the characters of that message's text from `start` on."""

    text: str
    turn: int = -1
    start: int = 0
    supervised: bool = False


@dataclass
class Slot:
    """The place of the next picture; or a run of `tokens` visual tokens. more: it goes on with the
    picture before it."""

    tokens: int | None = None
    more: bool = False


Piece = Control | Text | Slot
# How a picture stands in a prompt: numbers of visual tokens, and words of the vocabulary. A word in
# angle brackets is a control token; of any other, no leading space is written.
Spelling = tuple[int | str, ...]
# tokens, supervised, turns, chars
Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def assemble(
    rows: Sequence[Sequence[Piece]], tokenizer: Tokenizer, image_token_id: int
) -> list[Prompt]:
    """Prompts of many rows of pieces, whose slots say how long they are, tokenised together."""
    laid = [_sections(pieces) for pieces in rows]
    sections = [part for row in laid for part in row if isinstance(part, _Section)]
    # Headers and separators are the same in every row: each distinct text is encoded once.
    keys = list(dict.fromkeys((section.text, section.first) for section in sections))
    found = tokenizer.encode_many([text for text, _ in keys], [first for _, first in keys])
    encoded = dict(zip(keys, found, strict=True))
    prompts = [_assemble(row, encoded, image_token_id) for row in laid]
    for prompt in prompts:
        _check_known(prompt.tokens, tokenizer, image_token_id)
    return prompts


@dataclass
class _Section:
    """Neighbouring texts as one string."""

    texts: list[Text]
    first: bool

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.texts)


def _sections(pieces: Sequence[Piece]) -> list[_Section | Control | Slot]:
    out: list[_Section | Control | Slot] = []
    first = True
    for piece in pieces:
        if not isinstance(piece, Text):
            first = first and isinstance(piece, Control) and piece.implicit
            out.append(piece)
        elif piece.text:
            if out and isinstance(out[-1], _Section):
                out[-1].texts.append(piece)
            else:
                out.append(_Section([piece], first))
                first = False
    return out


def _assemble(
    sections: Sequence[_Section | Control | Slot],
    encoded: dict[tuple[str, bool], Encoded],
    image_token_id: int,
) -> Prompt:
    columns: list[Columns] = []
    slots: list[tuple[int, int]] = []
    length = 0
    for section in sections:
        if isinstance(section, _Section):
            column = _columns(section, encoded[section.text, section.first])
            if (column[0] == image_token_id).any():
                raise PromptError(
                    f"prompt.image_token_id (={image_token_id}) is a token of ordinary text here; "
                    "it must be a reserved id or one beyond the vocabulary."
                )
        elif isinstance(section, Control):
            column = _blank(section.id, 1, section.supervised)
        else:
            number = int(section.tokens or 0)
            start = slots.pop()[0] if section.more and slots else length
            slots.append((start, length + number - start))
            column = _blank(image_token_id, number, False)
        columns.append(column)
        length += len(column[0])
    if not columns:
        columns.append(_blank(0, 0, False))
    tokens, supervised, turns, chars = (np.concatenate(c) for c in zip(*columns, strict=True))
    return Prompt(tokens, supervised, [], turns, chars, slots)


def _check_known(tokens: np.ndarray, tokenizer: Tokenizer, image_token_id: int) -> None:
    """A gather past a table's end reads, and its gradient writes, what is not the model's."""
    rows = tokenizer.num_embeddings
    if rows is None:
        return
    beyond = tokens[(tokens >= rows) & (tokens != image_token_id)]
    if beyond.size:
        token = tokenizer.backend.id_to_token(int(beyond[0]))
        raise PromptError(
            f"the tokenizer writes {token!r} as id {beyond[0]}, and the language model has "
            f"embeddings for ids below {rows}: they do not belong together. Take the tokenizer's "
            "files from the model's own repository."
        )


def _blank(token: int, count: int, supervised: bool) -> Columns:
    return (
        np.full(count, token, np.int32),
        np.full(count, supervised, np.bool_),
        np.full(count, -1, np.int32),
        np.full((count, 2), -1, np.int32),
    )


def _columns(section: _Section, encoded: Encoded) -> Columns:
    """Tokens of a section, and of each: supervised, message index, characters.

    A token belongs to the first message whose characters it overlaps, and is supervised if it
    overlaps any supervised character.
    """
    ids = np.array(encoded[0], np.int32)
    spans = np.array(encoded[1], np.int64).reshape(-1, 2)
    _, supervised, turns, chars = _blank(0, len(ids), False)
    edges = np.cumsum([0] + [len(piece.text) for piece in section.texts])
    for piece, (low, high) in zip(section.texts, pairwise(edges), strict=True):
        if piece.turn < 0 and not piece.supervised:
            continue
        overlap = (spans[:, 0] < high) & (spans[:, 1] > low)
        if piece.supervised:
            supervised |= overlap
        if piece.turn >= 0:
            new = overlap & (turns < 0)
            more = overlap & (turns == piece.turn)  # goes on from an earlier part of this message
            shift = piece.start - low
            turns[new] = piece.turn
            chars[new, 0] = np.maximum(spans[new, 0], low) + shift
            chars[new | more, 1] = np.minimum(spans[new | more, 1], high) + shift
    return ids, supervised, turns, chars
