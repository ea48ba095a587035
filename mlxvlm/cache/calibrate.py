"""The calibration that a run over a list would make, without storing anything.

For a machine that caches another part of the list: with it, int8 and int4 give the bytes there
that one machine's run over the whole list gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from ..images.picture import Picture
from . import shard
from .jobs import Job, is_full
from .loader import Loader
from .run import host
from .whitening import Calibration, Unfit, Whitening


def calibrate(
    encoder: Any,
    jobs: Sequence[Job],
    batch_size: int,
    shard_pictures: int,
    workers: int = 2,
) -> Whitening | None:
    """What the first shard of `jobs`, in order, would be calibrated on; in the same batches, so to
    the last bit. None if no picture of `jobs` can be encoded."""
    seen: set[tuple[str, str]] = set()
    calibration = Calibration()
    loader = Loader(
        encoder, lambda *content: content in seen, workers, depth=2 * batch_size + workers
    )
    try:
        loaded = loader.load(jobs)
        for _ in range(0, len(jobs), shard_pictures):
            batch: list[Picture] = []
            views = 0
            for one in islice(loaded, shard_pictures):
                if one.source.sha256 is None or (one.source.sha256, one.source.plan) in seen:
                    continue
                assert one.picture is not None
                seen.add((one.source.sha256, one.source.plan))
                batch.append(one.picture)
                views += len(one.picture.views)
                if is_full(len(batch), views, batch_size):
                    if _full(calibration, encoder, batch):
                        return calibration.whitening()
                    batch, views = [], 0
            if (batch and _full(calibration, encoder, batch)) or calibration.views:
                return calibration.whitening()
    finally:
        loader.close()
    return None


def _full(calibration: Calibration, encoder: Any, batch: list[Picture]) -> bool:
    for features in encoder.encode(batch):
        try:
            views = [host(view) for view in features.views]
            calibration.check(views)
        except Unfit:
            continue
        for view in views:
            calibration.add(view)
        if calibration.views >= shard.CALIBRATION_VIEWS:
            return True
    return False
