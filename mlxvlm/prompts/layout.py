"""What layouts share: checks, the places of pictures, and the way from messages to a Prompt.

A layout is one function, `pieces(messages, tokenizer, prompt, add_generation_prompt)`, in a file of
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..config import PromptConfig
from ..errors import PromptError
from .messages import DOCUMENT, check_turns
from .pieces import Control, Piece, Prompt, Slot, Spelling, Text, assemble

if TYPE_CHECKING:
    from ..language.tokenizer import Tokenizer

Message = dict[str, Any]


def render(
    messages: Sequence[Message],
    pictures_tokens: Sequence[int | Spelling],
    tokenizer: Tokenizer,
    prompt: PromptConfig,
    add_generation_prompt: bool,
) -> Prompt:
    """Lays out messages in parts form (see `normalize_messages`) as `prompt` says.

    pictures_tokens: how many visual tokens each picture has, in order of appearance, or how it is
    spelled.
    """
    return render_many([(messages, pictures_tokens)], tokenizer, prompt, add_generation_prompt)[0]


def render_many(
    rows: Sequence[tuple[Sequence[Message], Sequence[int | Spelling]]],
    tokenizer: Tokenizer,
    prompt: PromptConfig,
    add_generation_prompt: bool,
) -> list[Prompt]:
    """`render` for many (messages, pictures_tokens), tokenised together on all cores."""
    from . import document

    pieces_of = _layout(prompt.layout)
    laid = []
    for messages, counts in rows:
        check_turns(messages)
        if add_generation_prompt and messages[-1]["role"] == "assistant":
            raise PromptError("the last message is the assistant's: there is nothing to answer.")
        if messages[0]["role"] == DOCUMENT:
            pieces = document.pieces(messages[0], tokenizer, prompt, add_generation_prompt)
        else:
            pieces = pieces_of(list(messages), tokenizer, prompt, add_generation_prompt)
            if prompt.image_placement == "sequence":
                pieces = _pictures_first(pieces, tokenizer, prompt)
        slots = sum(isinstance(piece, Slot) for piece in pieces)
        if slots != len(counts):
            raise PromptError(
                f"the messages have {slots} places for images, but {len(counts)} pictures came "
                "with them: give one picture for each."
            )
        laid.append(_fill(pieces, counts, tokenizer))
    return assemble(laid, tokenizer, prompt.image_token_id)


def _fill(
    pieces: list[Piece], counts: Sequence[int | Spelling], tokenizer: Tokenizer
) -> list[Piece]:
    """The pieces, with each picture spelled out in its slot."""
    waiting = iter(counts)
    out: list[Piece] = []
    for piece in pieces:
        if not isinstance(piece, Slot):
            out.append(piece)
            continue
        spelling = next(waiting)
        more = False
        for part in (spelling,) if isinstance(spelling, int) else spelling:
            if isinstance(part, int):
                out.append(Slot(part, more))
                more = True
            else:
                out += [Control(i) for i in _word(part, tokenizer)]
    return out


def _word(word: str, tokenizer: Tokenizer) -> list[int]:
    if not word.startswith("<"):
        return tokenizer.encode_inside(word)
    if word not in tokenizer.control:
        raise PromptError(
            f"the views of a picture are set off with {word}, a control token that this tokenizer "
            "lacks: take the tokenizer's files from the model's own repository, or set "
            "prompt.merge to 'uhd', which has text between them."
        )
    return [tokenizer.control[word]]


def head(tokenizer: Tokenizer) -> list[Piece]:
    """BOS, where the tokenizer has one."""
    bos = tokenizer.bos_token_id
    return [] if bos is None else [Control(bos, implicit=True)]


def content(message: Message, turn: int, prompt: PromptConfig, trim: bool) -> list[Piece]:
    """Pieces of one message: its texts, and each picture with `image_suffix` before what follows.

    trim: leave out the whitespace around the message's text, as if it had no pictures.
    """
    parts = [part for part in message["content"] if part["type"] == "image" or part["text"]]
    whole = "".join(part["text"] for part in parts if part["type"] == "text")
    low = len(whole) - len(whole.lstrip()) if trim else 0
    high = len(whole.rstrip()) if trim else len(whole)
    answer = message["role"] in ("assistant", DOCUMENT)
    pieces: list[Piece] = []
    position = 0
    for part in parts:
        if part["type"] == "image":
            pieces.append(Slot())
            continue
        start, end = max(position, low), min(position + len(part["text"]), high)
        if start < end:
            pieces.append(Text(whole[start:end], turn, start, answer))
        position += len(part["text"])
    return _with_suffixes(pieces, prompt.image_suffix)


def front(message: Message, turn: int, prompt: PromptConfig) -> list[Piece]:
    """Pieces of a question as LLaVA lays it out: the pictures, then the text, which is trimmed if
    there are pictures."""
    images = [part for part in message["content"] if part["type"] == "image"]
    texts = [part for part in message["content"] if part["type"] == "text"]
    return content({**message, "content": images + texts}, turn, prompt, trim=bool(images))


def control(tokenizer: Tokenizer, names: Sequence[str], layout: str) -> list[int]:
    """Ids of control tokens; an error names every one that the tokenizer lacks."""
    missing = [name for name in names if name not in tokenizer.control]
    if missing:
        raise PromptError(
            f"prompt layout {layout!r} needs control tokens that this tokenizer lacks: "
            f"{', '.join(missing)}. Choose another; 'chat_template' uses the tokenizer's own."
        )
    return [tokenizer.control[name] for name in names]


def _layout(name: str) -> Callable[..., list[Piece]]:
    from . import internvl, llama3, mistral, plain, template, vicuna

    layouts = {
        "llama-3": llama3.pieces,
        "vicuna_v1": vicuna.pieces,
        "mistral": mistral.pieces,
        "internvl2_5": internvl.pieces,
        "plain": plain.pieces,
        "chat_template": template.pieces,
    }
    return layouts[name]


def _with_suffixes(pieces: list[Piece], suffix: str) -> list[Piece]:
    """The suffix after each picture that something follows, unless that begins with it."""
    out: list[Piece] = []
    for at, piece in enumerate(pieces):
        out.append(piece)
        if isinstance(piece, Slot) and suffix and at + 1 < len(pieces):
            after = pieces[at + 1]
            if not (isinstance(after, Text) and after.text.startswith(suffix)):
                out.append(Text(suffix))
    return out


def _pictures_first(pieces: list[Piece], tokenizer: Tokenizer, prompt: PromptConfig) -> list[Piece]:
    """All pictures right after BOS, each with its suffix, and the rest without them.

    BOS stays first because language models use it as their attention sink.
    """
    count = sum(isinstance(piece, Slot) for piece in pieces)
    rest: list[Piece] = []
    for at, piece in enumerate(pieces):
        if isinstance(piece, Slot):
            continue
        # A suffix belongs to the picture before it and goes with it.
        after_slot = at > 0 and isinstance(pieces[at - 1], Slot)
        if after_slot and isinstance(piece, Text) and piece == Text(prompt.image_suffix):
            continue
        rest.append(piece)
    bos = 0
    if rest and isinstance(rest[0], Control) and rest[0].id == tokenizer.bos_token_id:
        bos = 1
    front: list[Piece] = []
    for _ in range(count):
        front.append(Slot())
        if prompt.image_suffix and prompt.layout != "plain":
            front.append(Text(prompt.image_suffix))
    return rest[:bos] + front + rest[bos:]
