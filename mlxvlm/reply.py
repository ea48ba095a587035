"""What a model answers: streamed in chunks, summed up in a Reply.

for chunk in vlm.stream(messages, images):
    print(chunk.text, end="")
chunk.reply.generation_tps
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from .boxes import Box, parse
from .errors import PromptError
from .language.generate import check_settings, generate_tokens
from .language.load import translate

if TYPE_CHECKING:
    from .model import VLM
    from .prompts import Prompt


@dataclass
class Reply:
    """A whole answer.

    tokens: every id that was sampled, the end token included where there was one; `text` has none.
    time_to_first_token_s: from the call to the first token, pictures and prompt included.
    prompt_tps: prompt tokens a second from embeddings to the first token, without the encoder.
    generation_tps: tokens a second after the first; 0 if there was but one.
    peak_memory_gb: the most that MLX has held in this process so far, in 10^9 bytes.
    finish_reason: "stop" (the end token came) or "length" (max_tokens or the context ran out).
    boxes: places in a picture that the text names, as `boxes.parse` reads it; of several pictures
        it does not say which. boxes_left_out: what looked like one and cannot be, with the reason.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    generation_tokens: int
    time_to_first_token_s: float
    prompt_tps: float
    generation_tps: float
    peak_memory_gb: float
    finish_reason: str
    boxes: list[Box]
    boxes_left_out: list[str]


@dataclass
class Chunk:
    """A piece of an answer: its new text (may be empty), and at the very end the whole reply."""

    text: str
    token: int | None = None
    reply: Reply | None = None


def stream(
    vlm: VLM,
    messages: Sequence[dict[str, Any]],
    images: Sequence[Any] = (),
    *,
    allow_urls: bool = False,
    **options: Any,
) -> Generator[Chunk, None, None]:
    """Answers the last user message, chunk by chunk; the last chunk carries the Reply.

    options: max_tokens=256, temperature=0.0 (greedy), top_p=1.0, top_k=0, min_p=0.0,
    repetition_penalty=None, seed=None, prefill_step_size=2048; see `generate_tokens`.
    """
    started = time.perf_counter()
    prompt = vlm.tokenize(messages, images, add_generation_prompt=True, allow_urls=allow_urls)
    return answer(vlm, prompt, started=started, **options)


def generate(
    vlm: VLM, messages: Sequence[dict[str, Any]], images: Sequence[Any] = (), **options: Any
) -> Reply:
    """Answers the last user message; options as in `stream`."""
    return last_reply(stream(vlm, messages, images, **options))


def last_reply(chunks: Generator[Chunk, None, None]) -> Reply:
    """Runs a stream to its end."""
    with closing(chunks):
        for chunk in chunks:
            if chunk.reply is not None:
                return chunk.reply
    raise RuntimeError("a stream ended without its reply")


def answer(
    vlm: VLM,
    prompt: Prompt,
    *,
    encode: Callable[[list[Any]], list[Any]] | None = None,
    started: float | None = None,
    max_tokens: int = 256,
    **settings: Any,
) -> Generator[Chunk, None, None]:
    """The chunks that follow a laid-out prompt; what cannot work is refused before the first.

    encode: turns `prompt.pictures` into features, for callers that keep them; by default the model
    encodes them here. started: when the clock began (time.perf_counter).
    """
    check_settings(max_tokens=max_tokens, **settings)
    started = time.perf_counter() if started is None else started
    room = _room(vlm, prompt)
    max_tokens = max_tokens if room is None else min(max_tokens, room)
    return _chunks(vlm, prompt, encode, started, max_tokens, settings)


def _chunks(
    vlm: VLM,
    prompt: Prompt,
    encode: Callable[[list[Any]], list[Any]] | None,
    started: float,
    max_tokens: int,
    settings: dict[str, Any],
) -> Generator[Chunk, None, None]:
    tokenizer = vlm.tokenizer
    assert tokenizer is not None  # tokenize has refused a model without one
    pictures = encode(prompt.pictures) if encode else prompt.pictures
    embeddings = vlm.embed(prompt.tokens[None], pictures)[0]
    mx.eval(embeddings)

    stop_ids = frozenset(tokenizer.eos_token_ids)
    detokenizer = tokenizer.detokenizer()
    tokens: list[int] = []
    pieces: list[str] = []
    prefill_from = first = now = time.perf_counter()
    ids = generate_tokens(
        vlm.language,
        prompt.tokens,
        embeddings,
        max_tokens=max_tokens,
        stop_ids=stop_ids,
        banned_ids=(vlm.config.prompt.image_token_id,),
        vocab_size=tokenizer.vocab_size,
        **settings,
    )
    with closing(ids):
        for token in ids:
            now = time.perf_counter()
            if not tokens:
                first = now
            tokens.append(token)
            if token in stop_ids:
                break
            pieces.append(detokenizer.add(token))
            yield Chunk(pieces[-1], token)
    pieces.append(detokenizer.finish())
    text = "".join(pieces)
    boxes, left_out = parse(text)
    reply = Reply(
        text=text,
        tokens=tokens,
        prompt_tokens=len(prompt.tokens),
        generation_tokens=len(tokens),
        time_to_first_token_s=first - started,
        prompt_tps=len(prompt.tokens) / max(first - prefill_from, 1e-9),
        generation_tps=(len(tokens) - 1) / max(now - first, 1e-9),
        peak_memory_gb=mx.get_peak_memory() / 1e9,
        finish_reason="stop" if tokens[-1] in stop_ids else "length",
        boxes=boxes,
        boxes_left_out=left_out,
    )
    yield Chunk(pieces[-1], None, reply)


def context_length(language: dict[str, Any]) -> int | None:
    """Positions that a language model's config.json allows; None if it does not say."""
    config = translate(language)
    config = config.get("text_config", config)
    limit = config.get("max_position_embeddings")
    if limit is None:
        return None
    # Some configs give the length before the stretch of their RoPE, some the one after it.
    scaling = config.get("rope_scaling") or {}
    base = scaling.get("original_max_position_embeddings") or limit
    return max(int(limit), int(base * (scaling.get("factor") or 1)))


def _room(vlm: VLM, prompt: Prompt) -> int | None:
    """How many tokens may follow the prompt; None if there is no limit."""
    limit = context_length(vlm.config.language)
    if limit is None:
        return None
    length = len(prompt.tokens)
    if length > limit:
        visual = int(np.sum(prompt.tokens == vlm.config.prompt.image_token_id))
        raise PromptError(
            f"the prompt has {length} tokens ({visual} of them visual, from {len(prompt.pictures)} "
            f"pictures), but this language model reads at most {limit}. Use fewer pictures or a "
            "shorter text, start a new conversation, or take a model that makes fewer tokens of a "
            "picture."
        )
    return limit - length + 1  # the last token is not read again
