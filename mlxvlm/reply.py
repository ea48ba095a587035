"""What a model answers: streamed in chunks, summed up in a Reply.

for chunk in vlm.stream(messages, images):
    print(chunk.text, end="")
chunk.reply.generation_tps
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from .boxes import Box, parse
from .errors import PromptError
from .language.generate import check_settings, generate_tokens
from .language.kv import KVSettings
from .language.load import translate
from .language.sampling import sampling_defaults
from .reuse import Reading, Reuse
from .stop import StopStrings

if TYPE_CHECKING:
    from .model import VLM
    from .prompts import Prompt

# The longest answer where neither the caller nor the model says.
MAX_TOKENS = 256


@dataclass
class Reply:
    """A whole answer.

    tokens: every id that was sampled, the end token included where there was one; `text` has none.
    reused_tokens: how many of the prompt's tokens were read before (see `reuse.Reuse`).
    time_to_first_token_s: from the call to the first token, pictures and prompt included.
    prompt_tps: prompt tokens a second from embeddings to the first token, without the encoder and
        without those reused.
    generation_tps: tokens a second after the first; 0 if there was but one.
    peak_memory_gb: the most that MLX has held in this process so far, in 10^9 bytes.
    finish_reason: "stop" (the end token or a stop string came) or "length" (max_tokens or the
        context ran out).
    boxes: places in a picture that the text names, as `boxes.parse` reads it; of several pictures
        it does not say which. boxes_left_out: what looked like one and cannot be, with the reason.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    reused_tokens: int
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
    reuse: Reuse | None = None,
    **options: Any,
) -> Generator[Chunk, None, None]:
    """Answers the last user message, chunk by chunk; the last chunk carries the Reply.

    reuse: what earlier calls with it have computed is not computed again.
    options: max_tokens=256, temperature=0.0 (greedy), top_p=1.0, top_k=0, min_p=0.0,
    repetition_penalty=None; where one is not given (or None), the model's generation_config.json
    decides, and these values where it is silent. seed=None, prefill_step_size=2048; see
    `generate_tokens`. stop=(): texts that end the answer, which does not include them.
    max_kv_size=None, kv_bits=None, kv_group_size=64: see `language.kv.KVSettings`.
    """
    started = time.perf_counter()
    look = None if reuse is None else reuse.look
    prompt = vlm.tokenize(
        messages, images, add_generation_prompt=True, allow_urls=allow_urls, look=look
    )
    return answer(vlm, prompt, reuse=reuse, started=started, **options)


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
    reuse: Reuse | None = None,
    started: float | None = None,
    stop: str | Sequence[str] = (),
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    **settings: Any,
) -> Generator[Chunk, None, None]:
    """The chunks that follow a laid-out prompt; what cannot work is refused before the first.

    started: when the clock began (time.perf_counter).
    """
    kv = KVSettings(max_kv_size, kv_bits, kv_group_size)
    kv.check()
    settings = with_defaults(vlm, settings)
    check_settings(**settings)
    stops = StopStrings(stop)
    started = time.perf_counter() if started is None else started
    left = room(vlm, prompt)
    if left is not None:
        settings["max_tokens"] = min(settings["max_tokens"], left)
    return _chunks(vlm, prompt, reuse, kv, stops, started, settings)


def with_defaults(vlm: VLM, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as given, then as the model's generation_config.json asks."""
    given = {name: value for name, value in settings.items() if value is not None}
    asked = sampling_defaults(vlm.tokenizer.generation_config) if vlm.tokenizer else {}
    return {"max_tokens": MAX_TOKENS, **asked, **given}


def _chunks(
    vlm: VLM,
    prompt: Prompt,
    reuse: Reuse | None,
    kv: KVSettings,
    stops: StopStrings,
    started: float,
    settings: dict[str, Any],
) -> Generator[Chunk, None, None]:
    tokenizer = vlm.tokenizer
    assert tokenizer is not None  # tokenize has refused a model without one
    reading = Reading(vlm, prompt, kv, reuse)
    stop_ids = frozenset(tokenizer.eos_token_ids)
    detokenizer = tokenizer.detokenizer()
    draft = Draft(len(prompt.tokens), reading.start, started, stop_ids, stops, detokenizer)
    ids = generate_tokens(
        vlm.language,
        prompt.tokens,
        reading.embeddings,
        stop_ids=stop_ids,
        banned_ids=(vlm.config.prompt.image_token_id,),
        vocab_size=tokenizer.vocab_size,
        prompt_cache=reading.caches,
        pauses=reading.pauses,
        at_pause=reading.pause,
        **settings,
    )
    with closing(reading), closing(ids):
        for token in reading.follow(ids):
            piece = draft.add(token)
            if piece is None:
                break
            yield Chunk(piece, token)
            if stops.found:
                break
    piece = draft.finish()
    yield Chunk(piece, None, draft.reply())


class Draft:
    """An answer as far as it has got, from when its prompt is about to be read.

    started: when the clock of its first token began (time.perf_counter).
    """

    def __init__(
        self,
        prompt_tokens: int,
        reused_tokens: int,
        started: float,
        stop_ids: Collection[int],
        stops: StopStrings,
        detokenizer: Any,
    ):
        self.prompt_tokens, self.reused_tokens, self.started = prompt_tokens, reused_tokens, started
        self.stop_ids, self.stops, self.detokenizer = stop_ids, stops, detokenizer
        self.tokens: list[int] = []
        self._pieces: list[str] = []
        self._read_from = self._first = self._last = time.perf_counter()

    @property
    def stopped(self) -> bool:
        return self.stops.found or bool(self.tokens and self.tokens[-1] in self.stop_ids)

    def add(self, token: int) -> str | None:
        """Takes the next token: the text that may be shown with it; None for an end token."""
        self._last = time.perf_counter()
        if not self.tokens:
            self._first = self._last
        self.tokens.append(token)
        if token in self.stop_ids:
            return None
        return self._keep(self.stops.add(self.detokenizer.add(token)))

    def finish(self) -> str:
        """The last of the text, where no token comes any more."""
        return self._keep(self.stops.add(self.detokenizer.finish()) + self.stops.finish())

    def _keep(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece

    def reply(self) -> Reply:
        """What a finished draft says."""
        text = "".join(self._pieces)
        boxes, left_out = parse(text)
        read = self.prompt_tokens - self.reused_tokens
        return Reply(
            text=text,
            tokens=self.tokens,
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused_tokens,
            generation_tokens=len(self.tokens),
            time_to_first_token_s=self._first - self.started,
            prompt_tps=read / max(self._first - self._read_from, 1e-9),
            generation_tps=(len(self.tokens) - 1) / max(self._last - self._first, 1e-9),
            peak_memory_gb=mx.get_peak_memory() / 1e9,
            finish_reason="stop" if self.stopped else "length",
            boxes=boxes,
            boxes_left_out=left_out,
        )


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


def room(vlm: VLM, prompt: Prompt) -> int | None:
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
