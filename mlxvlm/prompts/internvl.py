"""internvl2_5, ChatML as every InternVL 2.5 has it, each picture between <img> and </img>.

<|im_start|>system\\n{system}<|im_end|>\\n
<|im_start|>user\\n<img>[picture]</img>\\n{question}<|im_end|>\\n
<|im_start|>assistant\\n{answer}<|im_end|>\\n

An answer and its <|im_end|> are learnt, the newline behind it is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import PromptConfig
from ..errors import PromptError
from .layout import Message, content, control, head
from .pieces import Control, Piece, Slot, Text

if TYPE_CHECKING:
    from ..language.tokenizer import Tokenizer

# What all sizes were trained with.
SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
    "多模态大语言模型。"
)


def pieces(
    messages: list[Message], tokenizer: Tokenizer, prompt: PromptConfig, add_generation_prompt: bool
) -> list[Piece]:
    if prompt.image_placement != "turn":
        raise PromptError(
            "prompt layout 'internvl2_5' keeps pictures between <img> and </img> in their turn: "
            "prompt.image_placement must be 'turn'."
        )
    names = ("<|im_start|>", "<|im_end|>", "<img>", "</img>")
    start, end, opens, closes = control(tokenizer, names, "internvl2_5")

    def turn_of(role: str, body: list[Piece], learnt: bool = False) -> list[Piece]:
        out: list[Piece] = [Control(start), Text(f"{role}\n")]
        for piece in body:
            slot = isinstance(piece, Slot)
            out += [Control(opens), piece, Control(closes)] if slot else [piece]
        return [*out, Control(end, supervised=learnt), Text("\n")]

    out: list[Piece] = head(tokenizer)
    if messages[0]["role"] != "system":
        out += turn_of("system", [Text(prompt.system or SYSTEM)])
    for turn, message in enumerate(messages):
        role = message["role"]
        out += turn_of(role, content(message, turn, prompt, trim=False), role == "assistant")
    if add_generation_prompt:
        out += [Control(start), Text("assistant\n")]
    return out
