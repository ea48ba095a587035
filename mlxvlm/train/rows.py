"""A run's rows: its caches, what its sources give, and how these meet in batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..cache import EmbeddingCache
from ..data.batching import Batching
from ..data.feed import Feed, Pictures
from ..data.gather import Gathered, Reading, gather, shelf_of
from ..data.hub import local_data
from ..data.mixture import Mixture, Source
from ..data.samples import Sample
from ..errors import ConfigError, DataError
from ..language.load import language_width
from ..language.packed import longest_pack
from ..model import VLM
from ..vision.encoder import Encoder
from .stages import TrainConfig

if TYPE_CHECKING:
    from .teacher import Teacher


def open_caches(
    config: TrainConfig, sources: list[Source]
) -> tuple[dict[str, EmbeddingCache], bool]:
    """Every source's cache, by path; and whether they hold what a frozen projector made of the
    features."""
    paths = list(dict.fromkeys(source.cache for source in sources if source.cache))
    caches = {path: EmbeddingCache.open(path) for path in paths}
    behind = [path for path in paths if caches[path].projected]
    if behind and "projector" in config.parts:
        raise ConfigError(
            f"{behind[0]} holds what the projector gives, so the projector cannot train "
            "(--train): leave it out, or cache without --at projector."
        )
    if behind and (len(behind) < len(paths) or not all(source.cache for source in sources)):
        raise ConfigError(
            f"{behind[0]} holds what the projector gives: every source needs such a cache."
        )
    return caches, bool(behind)


def gather_rows(
    config: TrainConfig,
    vlm: VLM,
    encoder: Encoder | None,
    caches: dict[str, EmbeddingCache],
    sources: list[Source],
    mixture: Mixture,
    tell: Callable[[Any], None] | None = None,
    teacher: Teacher | None = None,
) -> Gathered:
    """Samples of all usable rows of an epoch. tell: of a `Download` before anything is fetched.
    teacher: whose view of each picture comes with it."""
    sources = [replace(s, data=local_data(s.data, tell)) for s in sources]
    shelves = [
        shelf_of(
            s,
            encoder,
            caches.get(s.cache),
            vlm.config.tiling,
            config.allow_urls,
            config.trains_vision,
        )
        for s in sources
    ]
    if teacher:
        for source, shelf in zip(sources, shelves, strict=True):
            shelf.teacher = teacher.shelf(source, config.allow_urls)
    assert vlm.tokenizer is not None
    reading = Reading(
        vlm.tokenizer,
        vlm.config,
        config.max_seq_length,
        tuple(config.targets),
        config.seed,
        config.allow_urls,
    )
    return gather(sources, mixture, shelves, reading)


def check_rows(config: TrainConfig, gathered: Gathered) -> None:
    """DataError, where there is nothing to train on, or anything at all is left out of a strict
    run."""
    data = ", ".join(found.source.data for found in gathered.each)
    samples, skipped = gathered.samples, gathered.skipped
    if skipped and (config.strict or not samples):
        first = skipped[0]
        raise DataError(
            f"{data}: {len(skipped)} rows cannot be used; {first.where}: {first.reason}"
        )
    if not samples:
        raise DataError(f"{data} has no rows.")
    if config.needs_pictures and not any(sample.images for sample in samples):
        raise DataError(
            f"{data} has no row with a picture, and nothing else trains {config.train}."
        )


def feed_of(
    config: TrainConfig,
    vlm: VLM,
    samples: list[Sample],
    pictures: Pictures,
    loss: str,
    rank: int = 0,
    ranks: int = 1,
) -> Feed:
    """How rows meet. loss: how they are weighed, which validation does in its own way."""
    batching = Batching(
        config.batch_size * ranks,
        config.batching,
        config.length_multiple,
        config.pack_length,
        config.pack_views,
        config.group_by_modality_length,
        config.seed,
        language_width(vlm.config.language),
        partial(longest_pack, vlm.language),
    )
    return Feed(samples, pictures, batching, config.share_prefix, config.strict, loss, rank, ranks)
