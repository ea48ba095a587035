"""What would make a run fit: few changes before many, and harmless ones before others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from ..train.stages import STAGES

if TYPE_CHECKING:
    from .study import Study, Variant

# Ways out that are told, and steps that are looked at to find them.
MOST_TOLD = 3
MOST_TRIED = 60
LEAST_LENGTH = 64


@dataclass
class Remedy:
    """Changes that together suffice. flags: what to type; notes: what else they ask or cost; peak:
    MLX's bytes with them; work: operations a row, against the run as it is."""

    flags: str
    notes: list[str]
    peak: int
    work: float


@dataclass
class _Lever:
    flag: Callable[[Variant], str]
    pull: Callable[[Variant], Variant | None]
    note: str = ""


def find_remedies(study: Study, room: int) -> tuple[list[Remedy], int]:
    """Combinations of changes that need at most `room` bytes, and the least that any needs."""
    levers = _levers(study)
    found: list[tuple[tuple[int, ...], Remedy]] = []
    least = study.step().peak.bytes
    tried = 0
    # If everything together is not enough, nothing is.
    everything = study.base
    for lever in levers:
        everything = lever.pull(everything) or everything
    least = min(least, study.step(everything).peak.bytes)
    if least > room:
        return [], least
    for size in range(1, len(levers) + 1):
        for chosen in combinations(range(len(levers)), size):
            if any(set(smaller) <= set(chosen) for smaller, _ in found):
                continue
            used = [levers[i] for i in chosen]
            variant = _all_pulled(study.base, used)
            if variant is None:
                continue
            tried += 1
            step = study.step(variant)
            if step.peak.bytes <= room:
                variant = _largest_batch(study, variant, room)
                step = study.step(variant)
                found.append((chosen, _told(study, used, variant, step.peak.bytes)))
            if len(found) == MOST_TOLD or tried == MOST_TRIED:
                return [remedy for _, remedy in found], least
    return [remedy for _, remedy in found], least


def _told(study: Study, used: list[_Lever], variant: Variant, peak: int) -> Remedy:
    work = study.row_flops(variant) / study.row_flops(study.base)
    notes = [lever.note for lever in used if lever.note]
    left = study.rows(study.base) - study.rows(variant)
    if left > 0:
        notes.append(f"leaves out {left:,} of {len(study.samples):,} rows")
    return Remedy(" ".join(lever.flag(variant) for lever in used), notes, peak, work)


def _levers(study: Study) -> list[_Lever]:
    """The changes that this run has left to make, harmless ones first."""
    config, model = study.config, study.vlm.config
    levers: list[_Lever] = []
    if config.batch_size > 1:
        levers.append(_Lever(_batch_flags, _single_rows))
    if not config.grad_checkpoint and not config.share_prefix:
        levers.append(_Lever(lambda v: "--grad-checkpoint", _checkpointed))
    if not study.base.cached and study.num_pictures and not config.trains_vision:
        levers.append(
            _Lever(
                lambda v: "--cache DIR",
                lambda v: dataclasses.replace(v, cached=True),
                "needs `mlxvlm cache-embeddings` first",
            )
        )
    half = max(LEAST_LENGTH, -(-study.lengths[-1] // 2))
    shorter = [n for n in study.lengths if n <= max(half, study.lengths[len(study.lengths) // 2])]
    if shorter and shorter[-1] < study.lengths[-1]:
        limit = shorter[-1]
        levers.append(
            _Lever(
                lambda v: f"--max-seq-length {limit}",
                lambda v: _changed(v, max_seq_length=limit),
            )
        )
    adapted = ",".join(f"lora:{p}" if p in ("lm", "vision") else p for p in config.parts)
    if adapted != ",".join(config.parts):
        is_sft = config.train == STAGES["sft"]["train"]
        levers.append(
            _Lever(
                lambda v: "lora instead of sft" if is_sft else f"--train {adapted}",
                lambda v: _changed(v, train=adapted),
            )
        )
    if not study.quantised:
        levers.append(
            _Lever(
                lambda v: "a 4-bit language model",
                # What trains itself cannot be quantised.
                lambda v: None if "lm" in v.config.parts else dataclasses.replace(v, bits=4),
                "build it on one of mlx-community's",
            )
        )
    pools = model.projector.pool == "none" and not model.projector.num_query_tokens
    if pools and not config.targets and not study.base.cached:
        levers.append(
            _Lever(
                lambda v: "--pool mean2 in `mlxvlm build`",
                lambda v: dataclasses.replace(v, pool="mean2"),
                "a quarter of the visual tokens; the projector trains anew",
            )
        )
    return levers


def _all_pulled(variant: Variant, levers: list[_Lever]) -> Variant | None:
    """With all of these changes; None where one is impossible after those before it."""
    now: Variant | None = variant
    for lever in levers:
        now = lever.pull(now) if now else None
    return now


def _changed(variant: Variant, **values: object) -> Variant:
    return dataclasses.replace(
        variant,
        config=dataclasses.replace(variant.config, **values),  # type: ignore[arg-type]
    )


def _checkpointed(variant: Variant) -> Variant:
    return _changed(variant, grad_checkpoint=True)


def _single_rows(variant: Variant) -> Variant:
    return _rebatched(variant, 1)


def _rebatched(variant: Variant, size: int) -> Variant:
    """Micro-batches of `size`, as many more of them."""
    config = variant.config
    whole = config.batch_size * config.grad_accumulation_steps
    return _changed(variant, batch_size=size, grad_accumulation_steps=-(-whole // size))


def _batch_flags(variant: Variant) -> str:
    config = variant.config
    return (
        f"--batch-size {config.batch_size} "
        f"--grad-accumulation-steps {config.grad_accumulation_steps}"
    )


def _largest_batch(study: Study, variant: Variant, room: int) -> Variant:
    """Where one row at a time fits, more may."""
    config, whole = study.config, study.config.batch_size * study.config.grad_accumulation_steps
    if variant.config.batch_size == config.batch_size:
        return variant
    for size in range(config.batch_size - 1, 1, -1):
        if whole % size == 0:
            larger = _rebatched(variant, size)
            if study.step(larger).peak.bytes <= room:
                return larger
    return variant
