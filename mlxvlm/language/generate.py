"""Tokens out of a language model of mlx-lm's: prefill from embeddings, then sample.

The loop is our own: what is short (a second question) is read in one go, with the head at its last
position alone, where mlx-lm's `generate_step` always reads the last token in a step of its own; and
greedy decoding needs no logarithms of probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import ConfigError
from .forward import last_logits

# Positions that one prefill call takes: bounds the attention's memory on long prompts.
PREFILL_STEP_SIZE = 2048

# What is longer is read without its last token first: keys and values do not need the last block's
# attention and MLP, nor the head, and those of many tokens cost more than a step for one.
AT_ONCE = 256

# How many of the latest tokens a repetition penalty looks at (mlx-lm's own default).
REPETITION_CONTEXT_SIZE = 20

# Tokens between two returns of MLX's unused buffers to the system, the first after the prefill.
CLEAR_EVERY = 256


def generate_tokens(
    lm: Any,
    tokens: np.ndarray,
    embeddings: mx.array,
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    stop_ids: Collection[int] = (),
    banned_ids: Collection[int] = (),
    vocab_size: int | None = None,
    prompt_cache: Any = None,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    pauses: Sequence[int] = (),
    at_pause: Callable[[int], None] | None = None,
) -> Generator[int, None, None]:
    """Yields at most `max_tokens` ids; an id of `stop_ids` is yielded and ends it.

    lm: an mlx-lm Model that takes `input_embeddings`.
    tokens: [L] ids of the prompt. They serve the repetition penalty, which sees text alone: a
        position that holds a banned id (the image token) does not count, and such an id may lie
        outside the table.
    embeddings: [N, D], what the model reads in the stead of the last N of them; the others are in
        `prompt_cache` already.
    banned_ids: never sampled, whatever their logits. vocab_size: nor is any id from it on, so rows
        that pad the table past the tokenizer's last id stay silent.
    seed: makes sampling a function of it, with keys of its own; without one the keys come from
        MLX's global state (`mx.random.seed`). Greedy decoding (temperature 0) draws nothing.
    prompt_cache: KV caches to start from and to fill; fresh ones otherwise. When k ids have come
        out, they hold the prompt and these k.
    pauses: lengths of the prompt, rising, at which the prefill stops for a call of `at_pause`.

    All runs on the default stream at the first token. Close a generator that is left early.
    """
    check_settings(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        prefill_step_size=prefill_step_size,
    )
    tokens = np.asarray(tokens)
    start = len(tokens) - len(embeddings)
    if tokens.ndim != 1 or embeddings.ndim != 2 or start < 0 or (start and prompt_cache is None):
        raise ValueError(
            f"tokens {tokens.shape} and embeddings {embeddings.shape} must be [L], [N, D], where "
            "what is before the last N is in prompt_cache"
        )
    if not len(embeddings):
        raise ValueError("an empty prompt has nothing to go on from")
    sampling = Sampling(
        tokens,
        banned_ids,
        vocab_size,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    if prompt_cache is None:
        from mlx_lm.models.cache import make_prompt_cache

        prompt_cache = make_prompt_cache(lm)
    prefill = Prefill(lm, sampling.ids[start:], embeddings, prompt_cache, prefill_step_size)
    stops = [pause - start for pause in pauses if start < pause < len(tokens)]
    told = (lambda at: at_pause(start + at)) if at_pause else (lambda at: None)
    return _run(prefill, sampling, frozenset(stop_ids), max_tokens, stops, told)


class Sampling:
    """How one answer's tokens are drawn: what mlx-lm's generators take of it.

    ids: [L] the prompt's tokens, with 0 in place of banned ones: embeddings rule there, but an id
    must stay inside the table. Settings as in `generate_tokens`.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        banned_ids: Collection[int] = (),
        vocab_size: int | None = None,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ):
        spoken = ~np.isin(tokens, np.fromiter(banned_ids, np.int64))
        self.ids = np.where(spoken, tokens, 0)
        self.greedy = temperature == 0
        self.looks_back = repetition_penalty is not None
        self.sampler = _sampler(temperature, top_p, top_k, min_p, seed)
        self.processors = [_mute(banned_ids, vocab_size)]
        if repetition_penalty is not None:
            self.processors.append(_penalise(repetition_penalty, tokens[spoken]))

    def draw(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """The token [1] that follows `tokens`, the prompt's and those drawn since (the prompt's
        will do where nothing `looks_back`), of logits [1, V]."""
        for processor in self.processors:
            logits = processor(tokens, logits)
        if not self.greedy:
            logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return self.sampler(logits)


class Prefill:
    """A prompt, [N] ids with [N, D] embeddings, on its way into `caches`, at most `step` positions
    a call."""

    def __init__(
        self,
        lm: Any,
        ids: np.ndarray,
        embeddings: mx.array,
        caches: list[Any],
        step: int = PREFILL_STEP_SIZE,
    ):
        self.lm, self.embeddings, self.caches, self.step = lm, embeddings, caches, step
        self.ids = mx.array(ids.astype(np.int32))
        self.done = 0

    def read(self, upto: int) -> None:
        """Reads as far as `upto`, without logits."""
        while self.done < upto:
            ids, embeddings = self._piece(min(self.done + self.step, upto))
            self.lm(ids[None], cache=self.caches, input_embeddings=embeddings[None])
            mx.eval([cache.state for cache in self.caches])
            mx.clear_cache()

    def finish(self) -> mx.array:
        """Reads the rest: [1, V] logits of what follows, lazy."""
        if len(self.ids) - self.done > min(self.step, AT_ONCE):
            self.read(len(self.ids) - 1)
        return last_logits(self.lm, *self._piece(len(self.ids)), self.caches)

    def _piece(self, stop: int) -> tuple[mx.array, mx.array]:
        start, self.done = self.done, stop
        return self.ids[start:stop], self.embeddings[start:stop]


def decoder_of_many(lm: Any, stop_ids: Collection[int], size: int) -> Any:
    """mlx-lm's BatchGenerator, for prompts that a `Prefill` has read and their first tokens."""
    from mlx_lm.generate import BatchGenerator

    return BatchGenerator(
        lm,
        stop_tokens=[[i] for i in sorted(stop_ids)],
        completion_batch_size=size,
        prefill_batch_size=size,
        # As for one: its own stream would hold the caller's work between two tokens.
        stream=mx.default_stream(mx.default_device()),
    )


def _run(
    prefill: Prefill,
    sampling: Sampling,
    stop_ids: frozenset[int],
    max_tokens: int,
    pauses: list[int],
    at_pause: Callable[[int], None],
) -> Generator[int, None, None]:
    for pause in pauses:
        prefill.read(pause)
        at_pause(pause)
    tokens = mx.array(sampling.ids.astype(np.int32))
    token = sampling.draw(tokens, prefill.finish())
    mx.async_eval(token)
    for count in range(max_tokens):
        # The next one is on its way before this one is looked at.
        if sampling.looks_back:
            tokens = mx.concatenate([tokens, token])
        logits = prefill.lm(token[None], cache=prefill.caches)[:, -1]
        following = sampling.draw(tokens, logits)
        mx.async_eval(following)
        found = int(np.array(token)[0])
        yield found
        if found in stop_ids:
            break
        if count % CLEAR_EVERY == 0:
            mx.clear_cache()
        token = following


def _sampler(
    temperature: float, top_p: float, top_k: int, min_p: float, seed: int | None
) -> Callable[[mx.array], mx.array]:
    """From [1, V] log-probabilities to [1] ids."""
    if temperature == 0:
        return lambda logprobs: mx.argmax(logprobs, axis=-1)

    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

    key = None if seed is None else mx.random.key(seed)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        if top_p < 1:
            logprobs = apply_top_p(logprobs, top_p)
        if min_p > 0:
            logprobs = apply_min_p(logprobs, min_p)
        if 0 < top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, top_k)
        draw = None
        if key is not None:
            key, draw = mx.random.split(key)
        return mx.random.categorical(logprobs * (1 / temperature), key=draw)

    return sample


def _mute(banned_ids: Collection[int], vocab_size: int | None) -> Callable[..., mx.array]:
    """A logits processor: -inf at the banned ids; float32, because bf16 logs would make ties."""
    bias: mx.array | None = None

    def mute(_tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal bias
        if bias is None:
            host = np.zeros(logits.shape[-1], dtype=np.float32)
            host[[i for i in banned_ids if 0 <= i < len(host)]] = -math.inf
            host[vocab_size if vocab_size is not None else len(host) :] = -math.inf
            bias = mx.array(host)
        return logits.astype(mx.float32) + bias

    return mute


def _penalise(penalty: float, text: np.ndarray) -> Callable[..., mx.array]:
    """mlx-lm's repetition penalty over the prompt's `text` ids and what was generated since."""
    from mlx_lm.sample_utils import make_logits_processors

    (inner,) = make_logits_processors(
        repetition_penalty=penalty, repetition_context_size=REPETITION_CONTEXT_SIZE
    )
    context = mx.array(text.astype(np.int32))
    read: int | None = None  # tokens of the prompt that this run has read: those of the first call

    def penalise(tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal read
        read = len(tokens) if read is None else read
        answer = tokens[read:].astype(mx.int32)
        return inner(mx.concatenate([context, answer]), logits)

    return penalise


def check_settings(
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    prefill_step_size: int = PREFILL_STEP_SIZE,
) -> None:
    """Refuses what `generate_tokens` could not mean, before any work is done."""
    penalty = repetition_penalty
    rules = (
        ("max_tokens", max_tokens, max_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "at least 0 (0 is greedy)"),
        ("top_p", top_p, 0 < top_p <= 1, "in (0, 1] (1 keeps every token)"),
        ("top_k", top_k, top_k >= 0, "at least 0 (0 keeps every token)"),
        ("min_p", min_p, 0 <= min_p <= 1, "in [0, 1] (0 keeps every token)"),
        (
            "repetition_penalty",
            penalty,
            penalty is None or 0 < penalty < math.inf,
            "above 0 (1 changes nothing)",
        ),
        ("seed", seed, seed is None or 0 <= seed < 2**63, "in [0, 2^63)"),
        ("prefill_step_size", prefill_step_size, prefill_step_size >= 1, "at least 1"),
    )
    for name, value, holds, rule in rules:
        if not holds:
            raise ConfigError(f"{name} (={value}) must be {rule}.")
