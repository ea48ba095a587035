"""plain, for pairs of picture and caption: the picture, the caption, a newline.

    <s>[picture]{caption}\\n

The user's words are left out; the caption and its newline are learnt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import PromptConfig
from ..errors import PromptError
from .layout import Message, content, head
from .pieces import Piece, Slot, Text

if TYPE_CHECKING:
    from ..language.tokenizer import Tokenizer


def pieces(
    messages: list[Message], tokenizer: Tokenizer, prompt: PromptConfig, add_generation_prompt: bool
) -> list[Piece]:
    turns = [(turn, m) for turn, m in enumerate(messages) if m["role"] != "system"]
    if len(turns) > 2:
        raise PromptError(
            f"prompt layout 'plain' takes one picture turn and one caption, not {len(turns)} turns."
        )
    slots = [Slot() for part in turns[0][1]["content"] if part["type"] == "image"]
    if not slots:
        raise PromptError("prompt layout 'plain' needs a picture; this user turn has none.")
    out: list[Piece] = [*head(tokenizer), *slots]
    if len(turns) == 2:
        turn, caption = turns[1]
        out += [*content(caption, turn, prompt, trim=False), Text("\n", supervised=True)]
    return out
