"""vicuna_v1, as LLaVA-1.5 has it: one line of text, each answer closed by `</s>`.

<s>{system} USER: {question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT:
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import PromptConfig
from .layout import Message, content, control, front, head
from .messages import text_of
from .pieces import Control, Piece, Text

if TYPE_CHECKING:
    from ..language.tokenizer import Tokenizer

# What Vicuna was trained with; a system message with empty content leaves it out.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def pieces(
    messages: list[Message], tokenizer: Tokenizer, prompt: PromptConfig, add_generation_prompt: bool
) -> list[Piece]:
    """Pictures stand at the front of their turn, wherever the turn has them."""
    (end,) = control(tokenizer, ("</s>",), "vicuna_v1")
    out: list[Piece] = head(tokenizer)
    if messages[0]["role"] != "system":
        out += [Text(prompt.system or SYSTEM), Text(" ")]
    for turn, message in enumerate(messages):
        if message["role"] == "system":
            if text_of(message):
                out += [*content(message, turn, prompt, trim=False), Text(" ")]
        elif message["role"] == "user":
            out += [Text("USER: "), *front(message, turn, prompt)]
            if turn + 1 < len(messages) or add_generation_prompt:
                out.append(Text(" ASSISTANT:"))
        else:
            # The space is the model's to write: a prompt that asks for an answer ends at the colon.
            body = content(message, turn, prompt, trim=False)
            out += [Text(" ", supervised=True), *body, Control(end, supervised=True)]
    return out
