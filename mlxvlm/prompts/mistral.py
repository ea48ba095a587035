"""mistral, as LLaVA-NeXT has it on Mistral Instruct: questions in [INST], answers closed by `</s>`.

<s>[INST] {question} [/INST] {answer} </s>[INST] {question} [/INST]

A system message stands in the first question, as Llama 2 has it, between <<SYS>>\\n and
\\n<</SYS>>\\n\\n. An answer is learnt with the space behind it and its </s>
(`conv_mistral_instruct` in LLaVA).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import PromptConfig
from .layout import Message, content, control, front, head
from .messages import text_of
from .pieces import Control, Piece, Text

if TYPE_CHECKING:
    from ..language.tokenizer import Tokenizer


def pieces(
    messages: list[Message], tokenizer: Tokenizer, prompt: PromptConfig, add_generation_prompt: bool
) -> list[Piece]:
    """Pictures stand at the front of their turn, wherever the turn has them."""
    (end,) = control(tokenizer, ("</s>",), "mistral")
    out: list[Piece] = head(tokenizer)
    system: list[Piece] = [Text(prompt.system)] if prompt.system else []
    for turn, message in enumerate(messages):
        if message["role"] == "system":
            system = content(message, turn, prompt, trim=False) if text_of(message) else []
        elif message["role"] == "user":
            out.append(Text("[INST] "))
            if system:
                out += [Text("<<SYS>>\n"), *system, Text("\n<</SYS>>\n\n")]
                system = []
            out += [*front(message, turn, prompt), Text(" [/INST]")]
        else:
            body = content(message, turn, prompt, trim=False)
            space = Text(" ", supervised=True)
            out += [space, *body, space, Control(end, supervised=True)]
    return out
