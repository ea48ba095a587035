"""The training loop: one for all stages.

rows -> samples -> batches -> features (cache, or the frozen encoder outside the gradient)
     -> projector -> language model -> loss at supervised positions -> AdamW
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..cache import EmbeddingCache
from ..config import is_adapter
from ..data.buckets import Batch
from ..data.feed import Feed
from ..data.gather import Gathered, write_skipped
from ..data.mixture import Mixture, Source
from ..data.split import split
from ..dtypes import dtype_of
from ..errors import ConfigError, DataError, UsageError, VLMError
from ..language.forward import blocks_of, check_head
from ..language.load import language_width
from ..language.lora import fuse
from ..model import VLM
from ..vision.encoder import DTYPES, Encoder
from ..weights.adapter import save_adapter
from ..weights.hub import resolve
from ..weights.join import check_out
from ..weights.load import load, load_encoder
from ..weights.save import save
from . import checkpoint
from .align import PatchAligner, load_aligner, save_aligner
from .distributed import Ranks
from .guard import Guard
from .losses import batch_loss, count, gradients
from .optimizer import Optimizer, clip, learning_rate
from .parts import prepare_parts
from .plot import draw
from .rows import check_rows, feed_of, gather_rows, open_caches
from .stages import TEACHER, TrainConfig, fingerprint
from .teacher import Teacher
from .validation import Best, sample_answers

METRICS = "metrics.jsonl"
# The rows that were left out, and why.
SKIPPED = "skipped.jsonl"
SAMPLES = "samples.jsonl"

Report = Callable[[str, dict[str, Any]], None]


class Trainer:
    """One run: its model, data, optimizer and place.

    `report(kind, values)` is told of "download", "data", "split", "step", "eval", "sample",
    "checkpoint" and "done".
    """

    def __init__(self, config: TrainConfig, report: Report | None = None):
        self.config = config
        self.ranks = Ranks()
        self.report: Report = lambda kind, values: None
        if report and self.ranks.leads:
            self.report = report
        self.out = _check_out(config)
        # A hub id is looked up once, so that a branch that moves cannot change a run on its way.
        self.model = resolve(config.model, report=self._tell)
        self.vlm = load(self.model)
        self.vlm.config.override(config.resize, config.layout)
        self.stored = {"lm": dtype_of(self.vlm.language), "vision": dtype_of(self.vlm.vision)}
        mx.random.seed(config.seed)
        check_head(self.vlm.language)
        self.lora, self.vision_lora = prepare_parts(self.vlm, config)
        self.teacher = Teacher.of(self.vlm, config, self._tell)
        if self.teacher:
            width = language_width(self.vlm.config.language)
            count = len(blocks_of(self.vlm.language))
            mx.random.seed(config.seed)  # whether a teacher was built before or not
            self.vlm.aligner = PatchAligner(width, self.teacher.width, count)
            load_aligner(self.vlm["aligner"], self.model)
        mx.eval(self.vlm.parameters())
        self.encoder: Encoder | None = self.vlm.encoder
        # Before a cache takes the tower's place.
        model = _digest_model(self.vlm)
        sources = config.all_sources
        validation = [config.source(config.val_data)] if config.val_data else []
        self.caches = self._open_caches([*sources, *validation])
        gathered, self.feed = self._feed(sources, config.mixture, config.loss, self.teacher)
        self.val: Feed | None = None
        # What each feed was gathered from; rows that are held back are of the same sources.
        self.read = [(gathered, self.feed.lost)]
        if validation:
            gathered, self.val = self._feed(validation, Mixture(), "token")
            self.read.append((gathered, self.val.lost))
        if config.val_split:
            kept, held = split(self.feed.samples, config.val_split, config.seed)
            self.val = replace(self.feed, samples=held, loss="token")
            self.feed = replace(self.feed, samples=kept)
            self.report("split", {"rows": len(kept), "held": len(held)})
        micro = config.grad_accumulation_steps
        self.steps = config.iters or math.ceil(self.feed.batches(config.epochs) / micro)
        self.identity = fingerprint(config) | {
            "batch_size": config.batch_size * self.ranks.size,
            "steps": self.steps,
            "model's tensors": model,
            "rows": self.feed.digest(),
            "features": [self._dtype_of(source) for source in sources],
            "teacher's features": self.teacher.exactness if self.teacher else None,
        }
        self.optimizer = Optimizer(config, self.trainable())
        self.guard = Guard(config.spike_factor)
        self.best = Best(self.val.digest() if self.val else "")
        self.gradient = nn.value_and_grad(self.vlm, batch_loss)
        self.step = 0
        self.interrupted = threading.Event()
        # Whether a rank was interrupted, as all of them know it.
        self.stopping = False

    def _tell(self, download: Any) -> None:
        self.report("download", {"what": str(download)})

    def trainable(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self.vlm.trainable_parameters()))

    def _open_caches(self, sources: list[Source]) -> dict[str, EmbeddingCache]:
        """Every source's cache; where all have one, the encoder goes."""
        # Whether the caches hold what a frozen projector made of the features.
        caches, self.projected = open_caches(self.config, sources)
        if caches:
            encoder = self.vlm.projected_encoder if self.projected else self.vlm.encoder
            for cache in caches.values():
                cache.require(encoder.identity())
        if all(source.cache for source in sources):
            # Frozen and not needed again before the result is saved: its memory serves the run.
            self.encoder = None
            del self.vlm.vision
            mx.clear_cache()
        return caches

    def _dtype_of(self, source: Source) -> str:
        """How exactly a source's features are known: a cache may hold less than an encoder says."""
        if source.cache:
            return self.caches[source.cache].meta["codec"]
        return DTYPES[self.vlm.encoder.dtype]

    def _feed(
        self, sources: list[Source], mixture: Mixture, loss: str, teacher: Teacher | None = None
    ) -> tuple[Gathered, Feed]:
        config, ranks = self.config, self.ranks
        gathered = gather_rows(
            config, self.vlm, self.encoder, self.caches, sources, mixture, self._tell, teacher
        )
        samples, feed = gathered.samples, None
        if samples:
            pictures = gathered.pictures
            feed = feed_of(config, self.vlm, samples, pictures, loss, ranks.rank, ranks.size)
        self.report(
            "data",
            {
                "data": ", ".join(found.source.data for found in gathered.each),
                "rows": len(samples),
                "skipped": gathered.examples(),
                "counts": gathered.counts(),
                "sources": [(f.source.name, f.rows, f.usable, f.used) for f in gathered.each],
                "batching": feed.plan.describe() if feed else None,
            },
        )
        check_rows(config, gathered)
        assert feed is not None
        return gathered, feed

    def run(self) -> dict[str, Any]:
        """Trains to the end, saves the result in `out`, and returns a summary.

        Where there are validations, the result is the model as it was at the best of them.
        """
        if self.ranks.leads:
            self.out.mkdir(parents=True, exist_ok=True)
        with checkpoint.until_full(self.out):
            return self._run()

    def _run(self) -> dict[str, Any]:
        config = self.config
        if config.resume:
            self._restore()
        metrics = self._open_lines(METRICS)
        samples = self._open_lines(SAMPLES) if self.val else None
        if self.ranks.leads:
            write_skipped(self.out / SKIPPED, self.read)
        self.vlm.train()
        micro = config.grad_accumulation_steps
        # A step takes all its batches at once: while it computes, the next one's are read.
        reading = self.feed.read(self.step * micro, ahead=micro + 1)
        line: dict[str, Any] = {"loss": None}
        started = time.perf_counter()
        first = self.step
        try:
            with _finish_step_on_interrupt() as self.interrupted:
                while self.step < self.steps and not self._out_of_patience():
                    line = self.take_step([next(reading) for _ in range(micro)])
                    if self.guard.stuck:
                        self._give_up(line)
                    last = self.step == self.steps
                    if samples and (last or _every(self.step, config.steps_per_eval)):
                        loss = self._validate(samples)
                        line["val_loss"] = loss if math.isfinite(loss) else None
                        last = last or self._out_of_patience()
                    metrics.write(json.dumps(line) + "\n")
                    metrics.flush()
                    each = (time.perf_counter() - started) / (self.step - first)
                    told = {
                        "steps": self.steps,
                        "left_s": each * (self.steps - self.step),
                        "due": last or _every(self.step, config.steps_per_report),
                    }
                    self.report("step", line | told)
                    # The last step has one too: a result that cannot be saved is not lost.
                    due = last and config.save_every or _every(self.step, config.save_every)
                    stop = self.stopping if self.ranks.size > 1 else self.interrupted.is_set()
                    if due or (stop and not last):
                        self._checkpoint()
                    if stop and not last:
                        raise KeyboardInterrupt
            self._gather_lost()
        finally:
            reading.close()
            metrics.close()
            if samples:
                samples.close()
            if self.ranks.leads and any(lost for _, lost in self.read):
                write_skipped(self.out / SKIPPED, self.read)
        if self.best.step and self.ranks.leads:
            best = checkpoint.load_best(self.out, self.best.step)
            self.vlm.update(tree_unflatten(list(best.items())))
        if self.ranks.leads:
            draw(self.out / METRICS)
            self._save()
        self.ranks.sum({}, ["done"])  # no rank is done before the result is written
        summary = {
            "out": str(self.out),
            "steps": self.step,
            "loss": line["loss"],
            "seconds": round(time.perf_counter() - started, 3),
            "skipped_steps": self.guard.skipped,
            "best": {"step": self.best.step, "val_loss": self.best.val_loss}
            if self.best.step
            else None,
            "failed_pictures": [*self._failed().items()],
        }
        self.report("done", summary)
        return summary

    def take_step(self, items: list[tuple[Batch | None, list[Any]]]) -> dict[str, Any]:
        started = time.perf_counter()
        config = self.config
        # Randomness (dropout) is a function of seed and step, so that a resumed run repeats it.
        mx.random.seed(config.seed + 1_000_003 * (self.step + 1) + 7919 * self.ranks.rank)
        batches = [(batch, found) for batch, found in items if batch is not None]
        totals, counts = self._count([batch for batch, _ in batches])
        parameters = self.trainable()
        grads, parts = self._gradients(batches, totals)
        # Tracing leaves its own arrays in the modules; the true ones go back before anything else.
        self.vlm.update(tree_unflatten(list(parameters.items())))
        share = learning_rate(config, self.step, self.steps)
        norm: Any = mx.array(math.nan)
        values: dict[str, float] = {}
        if totals["loss"]:
            if self.ranks.size > 1:
                zeros = {name: mx.zeros_like(value) for name, value in parameters.items()}
                grads = self.ranks.sum_arrays(grads or zeros)
            grads, norm = clip(grads, config.max_grad_norm)
            mx.eval(norm, parts)
            local: dict[str, Any] = {name: value.item() for name, value in parts.items()}
            values = self.ranks.sum(local, [name for name in totals if totals[name]])
        skipped = self.guard.judge(norm.item())
        if not skipped:
            updated = self.optimizer.apply(grads, parameters, share)
            self.vlm.update(tree_unflatten(list(updated.items())))
            # Without other references MLX updates in place.
            parameters, grads = {}, {}
            mx.eval(updated, self.optimizer.state)
        self.step += 1
        seconds = time.perf_counter() - started
        line: dict[str, Any] = {"step": self.step, "loss": None}
        # NaN is no JSON: what is not finite is left out.
        for name, value in values.items():
            if math.isfinite(value):
                line[name if name == "loss" else f"{name}_loss"] = value
        line |= {"skipped": skipped} if skipped else {}
        return line | {
            **counts,
            "lr": share * config.learning_rate,
            "grad_norm": norm.item() if math.isfinite(norm.item()) else None,
            "seconds": round(seconds, 4),
            "peak_memory_gb": round(mx.get_peak_memory() / 1e9, 3),
        }

    def _gradients(
        self, batches: list[tuple[Batch, list[Any]]], totals: dict[str, float]
    ) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
        """Gradients and the loss's parts, summed over micro-batches."""
        config = self.config
        grads: dict[str, mx.array] = {}
        parts: dict[str, mx.array] = {}
        for batch, found in batches:
            views = self.feed.pictures.views(found)
            lesson = self.teacher.lesson(self.feed.pictures, found) if self.teacher else None
            options = (config.targets, totals, config.grad_checkpoint, self.projected, lesson)
            flat, here = gradients(self.gradient, self.vlm, batch, views, *options)
            grads = {k: grads[k] + g if grads else g for k, g in flat.items()}
            parts = {k: parts.get(k, mx.array(0.0)) + v for k, v in here.items()}
            # Else they would all be kept beside their sums.
            del flat, views
            if len(batches) > 1:
                mx.eval(grads, parts)
        return grads, parts

    def _count(self, batches: list[Batch]) -> tuple[dict[str, float], dict[str, int]]:
        """What a step's losses are divided by, and its sizes: over all ranks."""
        totals = count(batches)
        if self.teacher:
            totals[TEACHER] = float(sum(len(batch.cuts) for batch in batches))
        sizes = {
            "tokens": sum(batch.num_tokens for batch in batches),
            "supervised_tokens": sum(batch.supervised_tokens for batch in batches),
            "rows": sum(batch.rows for batch in batches),
        }
        names = ["loss", *sorted(self.config.targets), *([TEACHER] if self.teacher else [])]
        if self.ranks.size == 1:
            return {name: totals.get(name, 0.0) for name in names}, sizes
        stop = {"stop": float(self.interrupted.is_set())}
        found = self.ranks.sum({**totals, **sizes, **stop}, [*names, *sizes, *stop])
        self.stopping = found["stop"] > 0
        return {name: found[name] for name in names}, {name: int(found[name]) for name in sizes}

    def evaluate(self, feed: Feed) -> float:
        """Loss per supervised token over all rows of `feed`: no auxiliary targets, no dropout, and
        the same under every --loss. NaN where no row's pictures could be read."""
        self.vlm.eval()
        loss, weight = 0.0, 0.0
        for batch, found in feed.once():
            if batch is None:
                continue
            views = feed.pictures.views(found)
            total, _ = batch_loss(
                self.vlm, batch, views, {}, {"loss": 1.0}, projected=self.projected
            )
            loss += float(total.item())  # type: ignore[arg-type]
            weight += batch.total_weight
        self.vlm.train()
        mx.clear_cache()  # of buffers in shapes that training does not have
        found = self.ranks.sum({"loss": loss, "weight": weight}, ["loss", "weight"])
        return found["loss"] / found["weight"] if found["weight"] else math.nan

    def _validate(self, samples: Any) -> float:
        """Validation loss; keeps weights that are the best so far, and writes sample answers."""
        assert self.val is not None
        loss = self.evaluate(self.val)
        best = self.best.see(self.step, loss)
        if not self.ranks.leads:
            return loss
        if best:
            checkpoint.save_best(self.out, self.step, self.trainable())
            checkpoint.prune_best(self.out, {self.step})
        self.report("eval", {"step": self.step, "val_loss": loss, "best": best})
        self.vlm.eval()
        for row in sample_answers(self.vlm, self.val, self.config.val_samples, self.projected):
            samples.write(json.dumps({"step": self.step} | row, ensure_ascii=False) + "\n")
            self.report("sample", row)
        self.vlm.train()
        samples.flush()
        return loss

    def _out_of_patience(self) -> bool:
        return 0 < self.config.patience <= self.best.stale

    def _gather_lost(self) -> None:
        """Pictures that failed on other ranks, and their rows, for the first one to tell of."""
        for feed in [self.feed] if self.val is None else [self.feed, self.val]:
            lost = [[*key, reason] for key, reason in feed.lost.items()]
            for text in self.ranks.gather(json.dumps([feed.failed, lost])):
                failed, rows = json.loads(text)
                feed.failed.update(failed)
                feed.lost.update({(number, where): reason for number, where, reason in rows})

    def _failed(self) -> dict[str, str]:
        """Pictures that could not be read, and why."""
        return self.feed.failed | (self.val.failed if self.val else {})

    def _give_up(self, line: dict[str, Any]) -> None:
        """Ends a run whose last steps were all skipped, with its last good state on disk."""
        if not line["rows"]:
            count = len(self.guard.streak)
            why = f"no picture of {count} steps in a row could be read"
            # Here or on other ranks, which say theirs themselves.
            raise DataError("; ".join([why, *map(": ".join, [*self._failed().items()][:1])]))
        reasons, stopped = self.guard.streak, self.step
        self.step -= self.guard.rewind()
        # Skipped steps change nothing, so a checkpoint among them is as good.
        known = checkpoint.steps(self.out)
        if self.ranks.leads and not [step for step in known if self.step <= step <= stopped]:
            self._checkpoint()
        kept = max([self.step, *checkpoint.steps(self.out)])
        what = {
            "not finite": "their gradients were not finite",
            "spike": "their gradients were far above those before",
        }
        why = " or ".join(what[reason] for reason in dict.fromkeys(reasons))
        raise VLMError(
            f"{len(reasons)} steps in a row, up to step {stopped:,}, were skipped because {why}. "
            f"The last good state is the checkpoint of step {kept:,} in {self.out}. Start again "
            "with a lower --learning-rate or cleaner data, or go on from it with --resume (and "
            "--spike-factor 0, if such gradients are to be expected)."
        )

    def _checkpoint(self) -> None:
        if not self.ranks.leads:
            return
        config = self.config
        progress = {"guard": self.guard.state(), "best": self.best.state()}
        weights = self.trainable()
        path = checkpoint.save(
            self.out, self.step, weights, self.optimizer, self.identity, config.keep, progress
        )
        checkpoint.prune_best(self.out, {self.best.step})
        draw(self.out / METRICS)
        self.report("checkpoint", {"step": self.step, "path": str(path)})

    def _restore(self) -> None:
        self.step, weights, progress = checkpoint.load(self.out, self.optimizer, self.identity)
        if self.ranks.sum({"step": self.step}, ["step"])["step"] != self.ranks.size * self.step:
            raise ConfigError(
                f"the ranks found different checkpoints in {self.out}: copy the first one's folder "
                "to every machine before --resume."
            )
        self.guard.restore(progress["guard"])
        self.best.restore(progress["best"])
        self.vlm.update(tree_unflatten(list(weights.items())))

    def _open_lines(self, name: str) -> Any:
        if not self.ranks.leads:
            return open(os.devnull, "a", encoding="utf-8")
        return _open_lines(self.out / name, self.step)

    def _save(self) -> None:
        vlm, parts = self.vlm, self.config.parts
        if "lm" in parts:
            vlm.language.set_dtype(self.stored["lm"])
        if "vision" in parts:
            vlm.vision.set_dtype(self.stored["vision"])
        if self.config.gives_adapters:
            projector, tower = "projector" in parts, "vision" in parts
            save_adapter(vlm, self.lora, self.out, projector, self.vision_lora, tower)
            return
        if self.encoder is None:
            vlm.vision = load_encoder(self.model).vision
        if self.vision_lora is not None:
            fuse(vlm.vision)
        aligner = vlm.pop("aligner", None)
        save(vlm, self.out)
        if aligner is not None:
            save_aligner(aligner, self.out)


def _check_out(config: TrainConfig) -> Path:
    """The result's folder: new, or empty, or that of the run which --resume goes on with."""
    out = Path(config.out)
    if config.resume and out.is_dir():
        return out
    if checkpoint.steps(out):
        raise UsageError(
            f"--out {out} holds checkpoints of an earlier run; add --resume, or name another "
            "folder."
        )
    return check_out(out)


def _digest_model(vlm: VLM) -> str:
    """Tells models apart at little cost: the names, shapes and first values of all tensors."""
    found = hashlib.sha256()
    leaves: Any = tree_flatten(vlm.parameters())
    firsts = [(name, v.shape, v.reshape(-1)[:64].astype(mx.float32)) for name, v in leaves]
    mx.eval([values for *_, values in firsts])
    for name, shape, values in sorted(firsts, key=lambda one: one[0]):
        if not is_adapter(name):  # these start at random
            found.update(f"{name} {shape}".encode() + np.array(values).tobytes())
    return found.hexdigest()


def _every(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _open_lines(path: Path, step: int) -> Any:
    """A file of JSON lines, without those of steps that a resumed run does again."""
    kept = []
    if step and path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                break
    beside = path.with_name(path.name + ".partial")
    beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(beside, path)
    return path.open("a", encoding="utf-8")


@contextmanager
def _finish_step_on_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM lets the step end and saves it; a second interrupts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def handle(signum: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    for number in signals:
        signal.signal(number, handle)
    try:
        yield flag
    finally:
        for number in signals:
            signal.signal(number, before[number])
