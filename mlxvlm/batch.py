"""Many prompts at once: each is read by itself, then all are decoded together, as they come and go.

for index, reply in vlm.batch([(messages, ["a.jpg"]), (messages, ["b.jpg"])]):
    print(index, reply.text)

mlx-lm's BatchGenerator decodes; it knows no embeddings, so it is given each prompt's filled cache
and first token. In float32 the answers are those of `vlm.generate`, one by one.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError, VLMError
from .language.generate import (
    PREFILL_STEP_SIZE,
    Prefill,
    Sampling,
    check_settings,
    decoder_of_many,
)
from .language.kv import KVSettings, make_caches
from .reply import Draft, Reply, generate, room, with_defaults
from .reuse import Reuse, pure_length
from .stop import StopStrings

if TYPE_CHECKING:
    from .model import VLM

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
    return _run(vlm, iter(asks), batch_size, allow_urls, reuse, stop, settings)


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


def _run(
    vlm: VLM,
    asks: Any,
    batch_size: int,
    allow_urls: bool,
    reuse: Reuse,
    stop: str | Sequence[str],
    settings: dict[str, Any],
) -> Generator[tuple[int, Reply | VLMError]]:
    tokenizer = vlm.tokenizer
    stop_ids = frozenset(tokenizer.eos_token_ids) if tokenizer else frozenset()
    together = decoder_of_many(vlm.language, stop_ids, batch_size)
    active: dict[int, tuple[int, Draft]] = {}  # the ask's index and its answer, by mlx-lm's number
    waiting = enumerate(asks)
    more = True
    try:
        while more or active:
            while more and len(active) < batch_size:
                index, ask = next(waiting, (0, None))
                if ask is None:
                    more = False
                    break
                try:
                    answer = _read(vlm, ask, allow_urls, reuse, stop, stop_ids, settings, together)
                except VLMError as error:
                    yield index, error
                    continue
                if isinstance(answer, Reply):
                    yield index, answer
                else:
                    uid, draft = answer
                    active[uid] = index, draft
            for found in together.next_generated() if active else ():
                index, draft = active[found.uid]
                draft.add(found.token)
                if draft.stopped and found.finish_reason is None:
                    together.remove([found.uid])
                if draft.stopped or found.finish_reason is not None:
                    del active[found.uid]
                    yield index, _done(draft)
    finally:
        together.close()


def _read(
    vlm: VLM,
    ask: Ask,
    allow_urls: bool,
    reuse: Reuse,
    stop: str | Sequence[str],
    stop_ids: frozenset[int],
    settings: dict[str, Any],
    together: Any,
) -> Reply | tuple[int, Draft]:
    """Reads one prompt, and hands it on after its first token; a Reply where that was the last."""
    started = time.perf_counter()
    messages, images = ask
    prompt = vlm.tokenize(
        messages, images, add_generation_prompt=True, allow_urls=allow_urls, look=reuse.look
    )
    assert vlm.tokenizer is not None  # tokenize has refused a model without one
    most = settings["max_tokens"]
    if (left := room(vlm, prompt)) is not None:
        most = min(most, left)
    embeddings = vlm.embed_after(prompt.tokens, reuse.features(prompt.pictures), 0)
    caches = make_caches(vlm.language, KVSettings())
    own = {name: value for name, value in settings.items() if name not in NOT_SAMPLING}
    banned = (vlm.config.prompt.image_token_id,)
    sampling = Sampling(prompt.tokens, banned, vlm.tokenizer.vocab_size, **own)
    step = settings.get("prefill_step_size", PREFILL_STEP_SIZE)
    detokenizer = vlm.tokenizer.detokenizer()
    draft = Draft(len(prompt.tokens), 0, started, stop_ids, StopStrings(stop), detokenizer)
    prefill = Prefill(vlm.language, sampling.ids, embeddings, caches, step)
    first = int(np.array(sampling.draw(prefill.ids, prefill.finish()))[0])
    draft.add(first)
    if draft.stopped or most == 1:
        return _done(draft)
    (uid,) = together.insert(
        [[first]],
        max_tokens=[most - 1],
        caches=[caches],
        all_tokens=[sampling.ids.tolist()],
        samplers=[sampling.sampler],
        logits_processors=[sampling.processors],
    )
    return uid, draft


def _done(draft: Draft) -> Reply:
    draft.finish()
    return draft.reply()
