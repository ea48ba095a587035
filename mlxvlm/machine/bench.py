"""How quick a model is on this computer, beside what the computer could do.

Every rate is a median of several runs after one that does not count, through the code that real
work goes through: the encoder as a cache is made with it, generation as chat has it, the trainer's
own loss and optimizer, the embedding cache in a folder that is deleted again. Pictures are noise of
the model's own size, text is random.

A ceiling is the rate at which the work of one unit (`work`) would go if nothing else took time: its
FLOPs at the rate of a large matrix product in the same dtype, or its bytes at the rate of memory,
whichever takes longer. Small models stay far below, since starting each operation takes time too; a
share above 1 is possible where all that is read lies in the processor's own caches.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..cache import EmbeddingCache
from ..cache.packed import unpack
from ..cache.writer import BATCH_SIZE, write_cache
from ..data.buckets import Group, collate
from ..data.samples import Sample
from ..dtypes import dtype_of
from ..errors import UsageError
from ..images.picture import Features, Picture
from ..language.forward import embedding
from ..language.generate import generate_tokens
from ..language.kv import KVSettings, is_free, make_caches, nbytes
from ..merge import visual_tokens
from ..model import VLM
from ..reply import context_length
from ..train.losses import batch_loss, count, gradients
from ..train.optimizer import Optimizer, clip
from ..train.parts import prepare_parts
from ..train.stages import STAGES, TrainConfig
from . import limits
from .ceilings import disk_rates, matmul_rate, memory_rate
from .step import step_of
from .work import decode_work, encoder_flops, prefill_flops, projector_flops

# Tokens of a row and of a prompt, pictures included, and the least text beside them.
LENGTH, TEXT = 256, 64
ANSWER = 64
REPEATS = 5
# No further run is begun when those of one rate took so long (seconds), and there are a few.
MOST_SECONDS, FEWEST = 3.0, 2
# How features are kept, and the bytes (of about) that are written and read.
CODEC, CACHED = "int8", 2**27
MOST_PICTURES = 256


@dataclass
class Rate:
    """One measured rate.

    seconds: of each run, which did `amount` units. flops, bytes: of one unit. ceiling: units a
    second if `bound` were all that takes time; None where nothing was measured to hold it against.
    """

    name: str
    unit: str
    amount: float
    seconds: list[float]
    flops: float = 0.0
    bytes: float = 0.0
    ceiling: float | None = None
    bound: str = ""

    @property
    def median(self) -> float:
        return self.amount / statistics.median(self.seconds)

    @property
    def low(self) -> float:
        return self.amount / max(self.seconds)

    @property
    def high(self) -> float:
        return self.amount / min(self.seconds)

    @property
    def share(self) -> float | None:
        """Of the ceiling."""
        return self.median / self.ceiling if self.ceiling else None


@dataclass
class Bench:
    """What was measured, and with what.

    vision, projector, language: their dtypes. matmul: FLOP/s by dtype; memory, disk_write,
    disk_read: bytes a second. length: tokens of a prompt and of a row, `visual` of them a
    picture's; views: of a picture; answer: tokens generated; rows: of a step of `stage`.
    peak_memory: bytes of MLX's, from the encoder on.
    """

    device: str
    vision: str
    projector: str
    language: str
    length: int
    visual: int
    views: int
    answer: int
    rows: int
    stage: str
    codec: str = CODEC
    matmul: dict[str, float] = field(default_factory=dict)
    memory: float = 0.0
    disk_write: float = 0.0
    disk_read: float = 0.0
    rates: list[Rate] = field(default_factory=list)
    peak_memory: int = 0

    def ceiling(self, dtype: str, flops: float, read: float = 0.0) -> tuple[float, str]:
        """Units a second of so much work, and what bounds them."""
        computing, reading = flops / self.matmul[dtype], read / self.memory
        return 1 / max(computing, reading), "memory" if reading > computing else f"{dtype} products"


def bench(
    vlm: VLM,
    *,
    length: int | None = None,
    answer: int = ANSWER,
    rows: int = 4,
    stage: str = "lora",
    repeats: int = REPEATS,
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Bench:
    """Measures a loaded model, and uses it up: at the end it is as `stage` trains it.

    length: by default `LENGTH`, or what a picture takes and `TEXT` more. rows: in a step of
    training. folder: on the disk to measure; by default where temporary files go.
    """
    if stage not in STAGES:
        raise UsageError(f"--stage (={stage!r}) must be one of {', '.join(STAGES)}.")
    limits.allow_open_files()
    limits.limit_training()
    mx.eval(vlm.parameters())
    vlm.eval()
    work = _Work(vlm, length, answer, rows, stage, repeats, progress)
    found = work.found
    progress("the machine itself")
    parts = (vlm.vision, vlm.projector, vlm.language)
    for dtype in dict.fromkeys(map(dtype_of, parts)):
        found.matmul[_name(dtype)] = matmul_rate(dtype)
    found.memory = memory_rate()
    mx.clear_cache()
    mx.reset_peak_memory()
    progress("the encoder")
    found.rates += [work.encoder(), work.projector()]
    with tempfile.TemporaryDirectory(dir=folder, prefix="mlxvlm-bench-") as place:
        progress("the embedding cache")
        cache = work.cache(Path(place))
    progress("reading and answering a prompt")
    found.rates += work.generation()
    progress(f"steps of {stage}")
    found.rates.append(work.training())  # after all that the model is to be itself for
    found.rates += cache
    found.peak_memory = mx.get_peak_memory()
    return found


class _Work:
    """The runs, each with what it needs made beforehand."""

    def __init__(
        self,
        vlm: VLM,
        length: int | None,
        answer: int,
        rows: int,
        stage: str,
        repeats: int,
        progress: Callable[[str], None],
    ):
        self.vlm, self.repeats, self.rng = vlm, repeats, np.random.default_rng(0)
        side = vlm.config.vision.image_size
        noise = self.rng.integers(0, 256, (BATCH_SIZE, side, side, 3), dtype=np.uint8)
        self.pictures: list[Picture] = vlm.look(list(noise))
        cut = self.pictures[0].cut
        visual = visual_tokens(vlm.config, cut)
        length = _fitting(vlm, visual, length, answer)
        if min(answer - 1, rows, repeats) < 1:
            raise UsageError(
                f"--max-tokens (={answer}) must be at least 2, --batch-size (={rows}) and "
                f"--repeats (={repeats}) at least 1."
            )
        device = mx.default_device()
        info = mx.device_info()
        self.found = Bench(
            device=f"{info.get('device_name', 'this computer')} "
            f"({'GPU' if device == mx.gpu else 'CPU'})",
            vision=_name(dtype_of(vlm.vision)),
            projector=_name(dtype_of(vlm.projector)),
            language=_name(dtype_of(vlm.language)),
            length=length,
            visual=visual,
            views=cut.views,
            answer=answer,
            rows=rows,
            stage=stage,
        )

    def encoder(self) -> Rate:
        """Pictures to features, in the batches that a cache is made with."""

        def run() -> None:
            found = self.vlm.encoder.encode(self.pictures)
            mx.eval([view for one in found for view in one.views])

        seconds = timed(run, self.repeats)
        flops = encoder_flops(self.vlm) * self.found.views
        return self._rate("encoder", "img/s", len(self.pictures), seconds, flops, self.found.vision)

    def projector(self) -> Rate:
        """The features of as many pictures to what the language model sees."""
        vlm = self.vlm
        features = vlm.encoder.encode(self.pictures)
        views = mx.stack([view for one in features for view in one.views])
        cuts = [one.cut for one in features]
        mx.eval(views)
        seconds = timed(lambda: mx.eval(vlm.project_views(views, cuts)), self.repeats)
        flops, dtype = projector_flops(vlm) * self.found.views, self.found.projector
        return self._rate("projector", "img/s", len(self.pictures), seconds, flops, dtype)

    def generation(self) -> list[Rate]:
        """A prompt to its first token, and the tokens after it; the picture is encoded before."""
        vlm, found = self.vlm, self.found
        tokens = self._tokens()
        embeddings = vlm.embed(tokens, self.pictures[:1])[0]
        mx.eval(embeddings)
        reading: list[float] = []
        answering: list[float] = []
        state = 0.0

        def run() -> None:
            nonlocal state
            caches = make_caches(vlm.language, KVSettings())
            started = time.perf_counter()
            ids = generate_tokens(
                vlm.language,
                tokens,
                embeddings,
                max_tokens=found.answer,
                banned_ids=(vlm.config.prompt.image_token_id,),
                prompt_cache=caches,
            )
            next(ids)
            first = time.perf_counter()
            for _ in ids:
                pass
            reading.append(first - started)
            answering.append(time.perf_counter() - first)
            state = _read_of(caches, found.length + found.answer / 2)

        timed(run, self.repeats)
        prompt = prefill_flops(vlm, found.length) / found.length
        flops, weights = decode_work(vlm)
        return [
            self._rate("prefill", "tok/s", found.length, reading[1:], prompt, found.language),
            self._rate(
                "decode",
                "tok/s",
                found.answer - 1,
                answering[1:],
                flops,
                found.language,
                weights + state,
            ),
        ]

    def training(self) -> Rate:
        """Steps of a stage: pictures encoded, loss, gradients, clipping, the optimizer."""
        vlm, found = self.vlm, self.found
        config = TrainConfig(batch_size=found.rows, **STAGES[found.stage])
        prepare_parts(vlm, config)
        mx.eval(vlm.parameters())
        learnt = np.zeros(found.length, np.bool_)
        learnt[-max(1, (found.length - found.visual) // 2) :] = True
        cut = self.pictures[0].cut
        samples = [
            Sample(self._tokens(), learnt, [f"{row}"], cuts=[cut]) for row in range(found.rows)
        ]
        batch = collate([Group([one], 0) for one in samples], config.length_multiple, config.loss)
        shown = list(itertools.islice(itertools.cycle(self.pictures), found.rows))
        flops = step_of(vlm, config, batch, found.views * found.rows).flops
        vlm.train()
        optimizer = Optimizer(config, dict(tree_flatten(vlm.trainable_parameters())))
        gradient = nn.value_and_grad(vlm, batch_loss)

        def run() -> None:
            parameters = dict(tree_flatten(vlm.trainable_parameters()))
            views = mx.stack([v for one in vlm.encoder.encode(shown) for v in one.views])
            flat, parts = gradients(gradient, vlm, batch, views, {}, count([batch]))
            # Tracing leaves its own arrays in the modules.
            vlm.update(tree_unflatten(list(parameters.items())))
            grads, norm = clip(flat, config.max_grad_norm)
            mx.eval(norm, parts)
            updated = optimizer.apply(grads, parameters, 1.0)
            vlm.update(tree_unflatten(list(updated.items())))
            parameters.clear()
            del flat, grads, views
            mx.eval(updated, optimizer.state)

        seconds = timed(run, self.repeats)
        each = flops / batch.num_tokens
        name = f"training, {found.stage}"
        return self._rate(name, "tok/s", batch.num_tokens, seconds, each, found.language)

    def cache(self, place: Path) -> list[Rate]:
        """Features written into a new cache, and read from it into MLX's arrays."""
        found = self.found
        encoder = _Ready(self.vlm.encoder.encode(self.pictures))
        each = max(1, found.views * self.vlm.encoder.tokens * self.vlm.encoder.width)
        pictures = max(BATCH_SIZE, min(MOST_PICTURES, CACHED // each))
        sources = []
        for number in range(pictures):
            path = place / f"{number:03}"
            path.write_bytes(b"%d" % number)
            sources.append((path.name, path))
        folders = (place / f"cache{number}" for number in itertools.count())
        sizes: list[int] = []

        def write() -> None:
            sizes.append(write_cache(encoder, sources, next(folders), CODEC).bytes)

        writing = timed(write, self.repeats)
        names = [name for name, _ in sources]
        with EmbeddingCache.open(place / "cache0") as cache:

            def read() -> None:
                for start in range(0, len(names), BATCH_SIZE):
                    mx.eval(unpack([cache.packed(n) for n in names[start : start + BATCH_SIZE]]))

            reading = timed(read, self.repeats)
        size = sizes[0] / pictures
        found.disk_write, found.disk_read = disk_rates(place, sizes[0])
        return [
            Rate(
                name, "img/s", pictures, seconds, bytes=size, ceiling=rate / size, bound="the disk"
            )
            for name, seconds, rate in (
                ("cache, writing", writing, found.disk_write),
                ("cache, reading", reading, found.disk_read),
            )
        ]

    def _rate(
        self,
        name: str,
        unit: str,
        amount: float,
        seconds: list[float],
        flops: float,
        dtype: str,
        read: float = 0.0,
    ) -> Rate:
        ceiling, bound = self.found.ceiling(dtype, flops, read)
        return Rate(name, unit, amount, seconds, flops, read, ceiling, bound)

    def _tokens(self) -> np.ndarray:
        """A picture and then text: ids [length]."""
        vlm, image = self.vlm, self.vlm.config.prompt.image_token_id
        rows = embedding(vlm.language).weight.shape[0]
        tokens = self.rng.integers(0, rows - 1, self.found.length).astype(np.int32)
        tokens[tokens == image] = rows - 1 if image != rows - 1 else 0
        tokens[: self.found.visual] = image
        return tokens


class _Ready:
    """Stands in for an encoder whose features are there already: the cache alone takes time."""

    def __init__(self, features: Sequence[Features]):
        for one in features:
            one.views = [view.astype(mx.float32) for view in one.views]
        mx.eval([view for one in features for view in one.views])
        self.features = features
        self.given = itertools.cycle(features)

    def look(self, images: Sequence[bytes]) -> list[Picture]:
        views = [np.zeros((1, 1, 3), np.uint8)] * len(self.features[0].views)
        return [Picture(views, self.features[0].grid) for _ in images]

    def encode(self, pictures: Sequence[Picture]) -> list[Features]:
        return [
            Features(next(self.given).views, picture.grid, picture.size, picture.sha256)
            for picture in pictures
        ]

    def identity(self) -> dict[str, Any]:
        return {"model_type": "bench"}


def timed(run: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of each of so many runs, after one that is not counted; fewer of long ones."""
    run()
    seconds: list[float] = []
    while len(seconds) < repeats:
        if len(seconds) >= FEWEST and sum(seconds) > MOST_SECONDS:
            break
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return seconds


def _read_of(caches: Sequence[Any], tokens: float) -> float:
    """Bytes of a state that attention reads after so many tokens, without the room for more."""

    def share(cache: Any) -> float:
        return min(1.0, tokens / cache.keys.shape[2]) if is_free([cache]) else 1.0

    return sum(share(cache) * nbytes([cache]) for cache in caches)


def _fitting(vlm: VLM, visual: int, length: int | None, answer: int) -> int:
    """Tokens of a prompt and of a row: as asked, or what fits."""
    limit = context_length(vlm.config.language)
    most = limit - answer if limit is not None else None
    wanted = length or max(LENGTH, visual + TEXT)
    if length is None and most is not None:
        wanted = min(wanted, most)
    if wanted <= visual:
        raise UsageError(
            f"--length (={wanted}) must be above {visual}, the visual tokens of one picture."
        )
    if most is not None and wanted > most:
        raise UsageError(
            f"--length (={wanted}) and --max-tokens (={answer}) must be at most {limit} together, "
            "which is what this language model reads."
        )
    return wanted


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
