"""llama-3: a header, two newlines, the trimmed content, `<|eot_id|>`.

<|begin_of_text|> ( <|start_header_id|> role <|end_header_id|> \\n\\n content <|eot_id|> )*
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import PromptConfig
from .layout import Message, content, control
from .pieces import Control, Piece, Text

if TYPE_CHECKING:
    from ..language.tokenizer import Tokenizer

NAMES = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def pieces(
    messages: list[Message], tokenizer: Tokenizer, prompt: PromptConfig, add_generation_prompt: bool
) -> list[Piece]:
    """A system block that would be empty is left out."""
    bos, start, end, eot = control(tokenizer, NAMES, "llama-3")

    def header(role: str) -> list[Piece]:
        return [Control(start), Text(role), Control(end), Text("\n\n")]

    out: list[Piece] = [Control(bos, implicit=True)]
    if messages[0]["role"] != "system" and prompt.system.strip():
        out += [*header("system"), Text(prompt.system.strip()), Control(eot)]
    for turn, message in enumerate(messages):
        body = content(message, turn, prompt, trim=True)
        if message["role"] == "system" and not body:
            continue
        answer = message["role"] == "assistant"
        out += [*header(message["role"]), *body, Control(eot, supervised=answer)]
    if add_generation_prompt:
        out += header("assistant")
    return out
