"""Many prompts at once: each is read by itself, then all are decoded together, as they come and go.

for index, reply in vlm.batch([(messages, ["a.jpg"]), (messages, ["b.jpg"])]):
    print(index, reply.text)

mlx-lm's BatchGenerator decodes; it knows no embeddings, so it is given each prompt's filled cache
and first token. In float32 the answers are those of `vlm.generate`, one by one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from .errors import ConfigError, VLMError
from .language.generate import (
    PREFILL_STEP_SIZE,
    Prefill,
    Sampling,
    check_settings,
    decoder_of_many,
)
from .language.kv import KVSettings, copied, make_caches
from .reply import Draft, Reply, generate, room, with_defaults
from .reuse import Reuse, pure_length
from .stop import StopStrings

if TYPE_CHECKING:
    from .model import VLM
    from .prompts import Prompt

BATCH_SIZE = 8
NOT_SAMPLING = ("max_tokens", "prefill_step_size")

# Messages and their pictures.
Ask = tuple[Sequence[dict[str, Any]], Sequence[Any]]


def batch(
    vlm: VLM,
    asks: Iterable[Ask],
    *,
    batch_size: int = BATCH_SIZE,
    allow_urls: bool = False,
    reuse: Reuse | None = None,
    stop: str | Sequence[str] = (),
    **settings: Any,
) -> Generator[tuple[int, Reply | VLMError]]:
    """Answers all of `asks`; yields (index, reply) as each is done, so in no order.

    A prompt that cannot be answered yields its error instead, and the others go on.

    asks: (messages, images) as `vlm.generate` takes them; read no faster than they are answered.
    batch_size: how many are decoded together. Each of them holds its keys and values in memory.
    reuse: where features of pictures are looked up and kept, so that a picture that several asks
        show is encoded once; one of its own by default.
    settings: as in `reply.stream`, but for those of the KV cache. With a seed, each answer is what
        `vlm.generate` gives with it.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size (={batch_size}) must be at least 1.")
    settings = with_defaults(vlm, settings)
    check_settings(**settings)
    StopStrings(stop)
    reuse = reuse or Reuse(vlm)
    if pure_length(vlm.config.language) is not None:
        # Dynamic NTK turns all positions by the text's length, and those together have several.
        return _alone(vlm, asks, allow_urls=allow_urls, reuse=reuse, stop=stop, **settings)
    runs = _run(vlm, iter(asks), 1, batch_size, allow_urls, reuse, stop, settings)
    return _without_numbers(runs)


def samples(
    vlm: VLM,
    messages: Sequence[dict[str, Any]],
    images: Sequence[Any] = (),
    count: int = 1,
    *,
    batch_size: int = BATCH_SIZE,
    allow_urls: bool = False,
    reuse: Reuse | None = None,
    stop: str | Sequence[str] = (),
    **settings: Any,
) -> list[Reply]:
    """`count` answers to one prompt, which is read once and decoded `batch_size` times together.

    settings: as in `batch`; with a seed, the k-th answer (from 0) is what `vlm.generate` gives with
    seed + k.
    """
    if count < 1 or batch_size < 1:
        name, value = ("samples", count) if count < 1 else ("batch_size", batch_size)
        raise ConfigError(f"{name} (={value}) must be at least 1.")
    settings = with_defaults(vlm, settings)
    check_settings(**settings)
    StopStrings(stop)
    reuse = reuse or Reuse(vlm)
    if pure_length(vlm.config.language) is not None:
        options = {"allow_urls": allow_urls, "reuse": reuse, "stop": stop}
        each = (_seeded(settings, number) for number in range(count))
        return [generate(vlm, messages, images, **options, **own) for own in each]
    asks = iter([(messages, images)])
    found: dict[int, Reply] = {}
    for _, number, reply in _run(vlm, asks, count, batch_size, allow_urls, reuse, stop, settings):
        if isinstance(reply, VLMError):
            raise reply
        found[number] = reply
    return [found[number] for number in range(count)]


def _seeded(settings: dict[str, Any], number: int) -> dict[str, Any]:
    seed = settings.get("seed")
    return settings if seed is None else settings | {"seed": seed + number}


def _without_numbers(
    runs: Generator[tuple[int, int, Reply | VLMError]],
) -> Generator[tuple[int, Reply | VLMError]]:
    with closing(runs):
        for index, _, reply in runs:
            yield index, reply


def _alone(
    vlm: VLM, asks: Iterable[Ask], **options: Any
) -> Generator[tuple[int, Reply | VLMError]]:
    for index, (messages, images) in enumerate(asks):
        try:
            reply = generate(vlm, messages, images, **options)
        except VLMError as error:
            yield index, error
        else:
            yield index, reply


@dataclass
class _Read:
    """A prompt that the decoder has read, ids [N], logits [1, V] of what follows, its caches."""

    prompt: Prompt
    ids: mx.array
    logits: mx.array
    caches: list[Any]
    started: float
    most: int


def _run(
    vlm: VLM,
    asks: Any,
    count: int,
    batch_size: int,
    allow_urls: bool,
    reuse: Reuse,
    stop: str | Sequence[str],
    settings: dict[str, Any],
) -> Generator[tuple[int, int, Reply | VLMError]]:
    """(index, number, reply) of `count` answers to each of `asks`; one error for all of an ask."""
    tokenizer = vlm.tokenizer
    stop_ids = frozenset(tokenizer.eos_token_ids) if tokenizer else frozenset()
    together = decoder_of_many(vlm.language, stop_ids, batch_size)
    # The answers on their way, by mlx-lm's numbers, and those to be begun.
    active: dict[int, tuple[int, int, Draft]] = {}
    next_up: deque[tuple[int, int, _Read]] = deque()
    waiting = enumerate(asks)
    more = True
    try:
        while more or next_up or active:
            while (more or next_up) and len(active) < batch_size:
                if not next_up:
                    index, ask = next(waiting, (0, None))
                    if ask is None:
                        more = False
                        break
                    try:
                        read = _read(vlm, ask, allow_urls, reuse, settings)
                    except VLMError as error:
                        yield index, 0, error
                        continue
                    next_up.extend((index, number, read) for number in range(count))
                index, number, read = next_up.popleft()
                shared = number + 1 < count
                own = _seeded(settings, number)
                answer = _begin(vlm, read, shared, number, stop, stop_ids, own, together)
                if isinstance(answer, Reply):
                    yield index, number, answer
                else:
                    uid, draft = answer
                    active[uid] = index, number, draft
            for found in together.next_generated() if active else ():
                index, number, draft = active[found.uid]
                draft.add(found.token)
                if draft.stopped and found.finish_reason is None:
                    together.remove([found.uid])
                if draft.stopped or found.finish_reason is not None:
                    del active[found.uid]
                    yield index, number, _done(draft)
    finally:
        together.close()


def _read(vlm: VLM, ask: Ask, allow_urls: bool, reuse: Reuse, settings: dict[str, Any]) -> _Read:
    started = time.perf_counter()
    messages, images = ask
    prompt = vlm.tokenize(
        messages, images, add_generation_prompt=True, allow_urls=allow_urls, look=reuse.look
    )
    most = settings["max_tokens"]
    if (left := room(vlm, prompt)) is not None:
        most = min(most, left)
    embeddings = vlm.embed_after(prompt.tokens, reuse.features(prompt.pictures), 0)
    caches = make_caches(vlm.language, KVSettings())
    step = settings.get("prefill_step_size", PREFILL_STEP_SIZE)
    # Ids that are safe to look up: embeddings rule where pictures are.
    ids = Sampling(prompt.tokens, (vlm.config.prompt.image_token_id,)).ids
    prefill = Prefill(vlm.language, ids, embeddings, caches, step)
    return _Read(prompt, prefill.ids, prefill.finish(), caches, started, most)


def _begin(
    vlm: VLM,
    read: _Read,
    shared: bool,
    number: int,
    stop: str | Sequence[str],
    stop_ids: frozenset[int],
    settings: dict[str, Any],
    together: Any,
) -> Reply | tuple[int, Draft]:
    """Hands a prompt on after its first token; a Reply where that was the last. shared: whether
    other answers to it are still to be begun."""
    tokenizer, prompt = vlm.tokenizer, read.prompt
    assert tokenizer is not None  # tokenize has refused a model without one
    own = {name: value for name, value in settings.items() if name not in NOT_SAMPLING}
    banned = (vlm.config.prompt.image_token_id,)
    sampling = Sampling(prompt.tokens, banned, tokenizer.vocab_size, **own)
    length = len(prompt.tokens)
    known = length if number else 0
    stops, detokenizer = StopStrings(stop), tokenizer.detokenizer()
    draft = Draft(length, known, read.started, stop_ids, stops, detokenizer)
    first = int(np.array(sampling.draw(read.ids, read.logits))[0])
    draft.add(first)
    if draft.stopped or read.most == 1:
        return _done(draft)
    (uid,) = together.insert(
        [[first]],
        max_tokens=[read.most - 1],
        caches=[copied(read.caches) if shared else read.caches],
        all_tokens=[sampling.ids.tolist()],
        samplers=[sampling.sampler],
        logits_processors=[sampling.processors],
    )
    return uid, draft


def _done(draft: Draft) -> Reply:
    draft.finish()
    return draft.reply()
