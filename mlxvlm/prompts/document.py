"""An interleaved document, under any layout: plain text without roles, pictures at their places.

    <s>{text}[picture]\\n{text}...</s>

All of its text is learnt, and its end; nothing of a picture is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import PromptConfig
from .layout import Message, content, head
from .pieces import Control, Piece

if TYPE_CHECKING:
    from ..language.tokenizer import Tokenizer

# What ends a text, where that is not what ends an answer.
ENDS = ("<|end_of_text|>", "<|endoftext|>")


def pieces(
    message: Message, tokenizer: Tokenizer, prompt: PromptConfig, add_generation_prompt: bool
) -> list[Piece]:
    """add_generation_prompt: the document goes on, so it has no end."""
    out = [*head(tokenizer), *content(message, 0, prompt, trim=False)]
    end = _end(tokenizer)
    if end is not None and not add_generation_prompt:
        out.append(Control(end, supervised=True))
    return out


def _end(tokenizer: Tokenizer) -> int | None:
    for name in (*ENDS, tokenizer.special_tokens.get("eos_token")):
        if name is not None and (found := tokenizer.id(name)) is not None:
            return found
    return None
