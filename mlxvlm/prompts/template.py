"""chat_template: the tokenizer's own Jinja template, with contents kept out of its reach.

The template sees a private mark in place of each message's text, so text cannot become a control
token and pictures stand where their parts put them; whitespace around a text is left to it, because
many templates trim. What is learnt is found by rendering prefixes:

    full     <user> mark 0 <end> <assistant> mark 1 <end> \\n <user> ...
    before   <user> mark 0 <end> <assistant>                        messages[:1], asked to answer
    through  <user> mark 0 <end> <assistant> mark 1 <end> \\n        messages[:2]
                                             ^^^^^^^^^^^^           the answer and its end token
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ..config import PromptConfig
from ..errors import PromptError
from .layout import Message, content
from .pieces import Control, Piece, Slot, Text

if TYPE_CHECKING:
    from ..language.tokenizer import Tokenizer

MARK = re.compile("\ue0f0([0-9]+)\ue0f1")
Span = tuple[int, int]


def pieces(
    messages: list[Message], tokenizer: Tokenizer, prompt: PromptConfig, add_generation_prompt: bool
) -> list[Piece]:
    """An answer whose prefixes do not nest is refused; or left unsupervised, where the prompt asks
    for a further answer and so is not trained on."""
    shift = 0
    if prompt.system and messages[0]["role"] != "system":
        system: Message = {"role": "system", "content": [{"type": "text", "text": prompt.system}]}
        messages, shift = [system, *messages], 1
    marked = [_mark(message, at) for at, message in enumerate(messages)]
    full, shown = _show(marked, tokenizer, add_generation_prompt)
    if shown != list(range(len(messages))):
        # Templates of vision models often read typed parts only.
        typed = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in marked]
        parted = _show(typed, tokenizer, add_generation_prompt)
        if parted[1] == list(range(len(messages))):
            marked, (full, shown) = typed, parted
    if shown != list(range(len(messages))):
        raise PromptError(
            "the tokenizer's chat template drops, repeats or reorders messages: of "
            f"{len(messages)} it shows {[number - shift for number in shown]}. "
            "Choose another prompt.layout in the model's config.json."
        )
    cut = tokenizer.split_control(full)
    learnt: list[Span] = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.render(marked[:at], True)
        through = tokenizer.render(marked[: at + 1], False)
        if full.startswith(through) and through.startswith(before):
            learnt.append(_answer(full, at, (len(before), len(through)), cut))
        elif not add_generation_prompt:
            raise PromptError(
                "prompt.layout 'chat_template' cannot train with this tokenizer's template: what "
                f"it renders up to message {at - shift} is not how the whole conversation begins. "
                "Choose another prompt.layout in the model's config.json."
            )

    out: list[Piece] = []
    for number, (text, start) in enumerate(cut):
        if number % 2:
            out.append(Control(tokenizer.control[text], _inside(start, learnt)))
            continue
        done = 0
        for mark in MARK.finditer(text):
            out += _own_text(text[done : mark.start()], start + done, learnt)
            at = int(mark[1])
            body = content(messages[at], at - shift, prompt, trim=True)
            out += _supervise(body, _inside(start + mark.start(), learnt))
            done = mark.end()
        out += _own_text(text[done:], start + done, learnt)
    return out


def _show(
    marked: list[dict[str, Any]], tokenizer: Tokenizer, add_generation_prompt: bool
) -> tuple[str, list[int]]:
    """What the template makes of the marks, and which of them are in it; none where it fails."""
    try:
        full = tokenizer.render(marked, add_generation_prompt)
    except PromptError:
        if isinstance(marked[0]["content"], str):
            return "", []  # it may take typed parts
        raise
    return full, [int(number) for number in MARK.findall(full)]


def _mark(message: Message, at: int) -> dict[str, Any]:
    """What the template sees: the whitespace around the message, and between it the mark."""
    parts = [part for part in message["content"] if part["type"] == "image" or part["text"]]
    before = after = ""
    if parts and parts[0]["type"] == "text":
        text = parts[0]["text"]
        before = text[: len(text) - len(text.lstrip())]
    if parts and parts[-1]["type"] == "text" and not (len(parts) == 1 and before == text):
        text = parts[-1]["text"]
        after = text[len(text.rstrip()) :]
    return {"role": message["role"], "content": f"{before}\ue0f0{at}\ue0f1{after}"}


def _answer(full: str, at: int, limits: Span, cut: list[tuple[str, int]]) -> Span:
    """From the opened header to the end of the first control token behind the text."""
    low, high = limits
    text_end = full.index(f"\ue0f0{at}\ue0f1") + len(f"\ue0f0{at}\ue0f1")
    for token, start in cut[1::2]:
        if start >= text_end and start + len(token) <= high:
            return low, start + len(token)
    return low, high


def _inside(position: int, spans: list[Span]) -> bool:
    return any(low <= position < high for low, high in spans)


def _own_text(text: str, start: int, learnt: list[Span]) -> list[Piece]:
    """The template's own text, cut where what is learnt begins and ends."""
    edges = {edge - start for span in learnt for edge in span}
    points = [0, *sorted(edge for edge in edges if 0 < edge < len(text)), len(text)]
    return [
        Text(text[low:high], supervised=_inside(start + low, learnt))
        for low, high in zip(points, points[1:], strict=False)
        if low < high
    ]


def _supervise(body: list[Piece], learnt: bool) -> list[Piece]:
    for piece in body:
        if not isinstance(piece, Slot):
            piece.supervised = learnt
    return body
