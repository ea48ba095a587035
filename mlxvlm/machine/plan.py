"""Before a run: will it fit, how long will it take, and what would make it fit.

Memory is worked out from the graph of the run's heaviest step (`step`, `memory`), with no weight
read. Time comes from a few real steps, where the model is here and fits, and else from the number
of operations and the chip's rate, which is called an estimate.
"""

from __future__ import annotations

import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..data.samples import Skipped
from ..train.stages import TrainConfig
from .chips import Machine
from .rehearse import Rehearsal, rehearse
from .remedies import Remedy, find_remedies
from .step import Step
from .study import Study, stored_bytes


@dataclass
class Timing:
    """seconds: of all steps; low, high: what they may come to. steps: real ones timed here, 0 for
    arithmetic alone. reading: share of the time that waits for pictures to be read."""

    seconds: float
    low: float
    high: float
    steps: int = 0
    reading: float = 0.0


@dataclass
class Plan:
    """What a run will take. Bytes, seconds.

    parts: what the peak is made of, by the names in `step.PARTS`. host: Python, rows and libraries,
    which are not MLX's. peak: all of it. measured: MLX's own peak over the real steps; predicted:
    what was worked out for it. estimated: the peak is of another machine than this one's CPU, for
    which the method has not been calibrated. encoder_share: of the arithmetic. resized: how this
    stage's pictures become squares and how the model's own do, where they differ and are encoded.
    """

    model: str
    parts: dict[str, int]
    predicted: int
    host: int
    usable: int
    rows: int
    skipped: list[Skipped]
    pictures: int
    steps: int
    rows_a_step: int
    longest: int
    flops: float
    encoder_share: float
    result: int
    checkpoints: int
    free: int
    timing: Timing
    machine: Machine
    measured: int | None = None
    estimated: bool = False
    why_no_steps: str = ""
    remedies: list[Remedy] = field(default_factory=list)
    least: int | None = None
    resized: tuple[str, str] | None = None

    @property
    def peak(self) -> int:
        return max(self.predicted, self.measured or 0) + self.host

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable


def make_plan(
    config: TrainConfig,
    machine: Machine,
    steps: int = 3,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Plans a run on a machine. steps: real ones to time, if it can be done here."""
    import mlx.core as mx

    progress("reading the data and the model's outline")
    study = Study(config)
    step = study.step()
    host = _resident()
    plan = Plan(
        model=config.model,
        parts=step.peak.parts,
        predicted=step.peak.bytes,
        host=host,
        usable=machine.usable,
        rows=len(study.samples),
        skipped=study.gathered.examples(),
        pictures=study.num_pictures,
        steps=study.steps,
        rows_a_step=_rows_a_step(study),
        longest=study.lengths[-1],
        flops=step.flops * study.tokens / step.tokens,
        encoder_share=step.encoder_flops / max(step.flops, 1.0),
        result=_result(study, step),
        checkpoints=_checkpoints(config, step),
        free=_free(Path(config.out)),
        timing=_reckoned(study, step, machine),
        machine=machine,
        estimated=not machine.here or mx.default_device() == mx.gpu,
        resized=None if study.base.cached else study.resized,
    )
    plan.why_no_steps = _why_not(study, plan, steps)
    if not plan.why_no_steps:
        found = rehearse(config, steps, lambda done, of: progress(f"real steps: {done} of {of}"))
        plan.why_no_steps = found.failure
        plan.measured = found.peak
        if found.seconds:
            plan.timing = _timed(found, study.tokens)
    if not plan.fits:
        progress("looking for what would make it fit")
        plan.remedies, plan.least = find_remedies(study, machine.usable - host)
    return plan


def _why_not(study: Study, plan: Plan, steps: int) -> str:
    if not steps:
        return "none were asked for"
    if not plan.machine.here:
        return "it is planned for another computer"
    if not study.here:
        return "the model is not downloaded yet"
    if not plan.fits:
        return "they would not fit in memory"
    return ""


def _reckoned(study: Study, step: Step, machine: Machine) -> Timing:
    flops = step.flops * study.tokens / step.tokens
    return Timing(flops / machine.rate, flops / (1e12 * machine.high), flops / (1e12 * machine.low))


def _timed(found: Rehearsal, tokens: float) -> Timing:
    # Reading hides behind computing, or the other way round.
    each = [max(s, r) for s, r in zip(found.seconds, found.reading, strict=True)]
    rates = [s / max(t, 1) for s, t in zip(each, found.tokens, strict=True)]
    waits = sum(max(0.0, r - s) for s, r in zip(found.seconds, found.reading, strict=True))
    return Timing(
        tokens * sum(each) / max(sum(found.tokens), 1),
        tokens * min(rates),
        tokens * max(rates),
        len(each),
        waits / max(sum(each), 1e-9),
    )


def _rows_a_step(study: Study) -> int:
    """Of packs, on average."""
    decision, config = study.feed.plan.decision, study.config
    size = decision.rows if decision.lines else config.batch_size
    return round(size * config.grad_accumulation_steps)


def _result(study: Study, step: Step) -> int:
    """Bytes of what the run leaves in --out."""
    return step.trained if study.config.gives_adapters else stored_bytes(study.vlm)


def _checkpoints(config: TrainConfig, step: Step) -> int:
    """Bytes of all the checkpoints that are kept, of the one that is being written, and of the best
    weights so far."""
    validates = bool(config.val_data or config.val_split)
    best = 2 * step.trained if validates else 0
    if not config.save_every:
        return best
    return best + (step.trained + step.weights["optimizer"]) * (config.keep + 1)


def _resident() -> int:
    """Bytes that this process took at most: Python, libraries, rows; no weight is among them."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _free(folder: Path) -> int:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
