"""A few real steps of a run, in a process of its own: how long they take, and their peak memory.

    python -m mlxvlm.machine.rehearse  < {"config": {...}, "steps": 3}  > a line of JSON a step

Nothing is saved. The heaviest batch comes first, twice: the first step has no moments yet.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..data.mixture import Mixture, Source
from ..errors import VLMError
from ..train.stages import AuxiliaryTarget, TrainConfig

# No more steps are begun after so many seconds.
MOST_SECONDS = 120.0


@dataclass
class Rehearsal:
    """tokens, seconds: of each timed step, padding included; reading: seconds that reading its
    pictures took, which a run hides behind the step before. peak: bytes, None if no step ended."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    reading: list[float] = field(default_factory=list)
    peak: int | None = None
    failure: str = ""


def rehearse(
    config: TrainConfig, steps: int, progress: Callable[[int, int], None] = lambda a, b: None
) -> Rehearsal:
    """Runs `steps` steps and two to warm up. A failure is told, not raised."""
    found = Rehearsal()
    order = json.dumps({"config": dataclasses.asdict(config), "steps": steps})
    with subprocess.Popen(
        [sys.executable, "-m", "mlxvlm.machine.rehearse"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin and child.stdout and child.stderr
        complaints: list[str] = []
        stderr = child.stderr
        reader = threading.Thread(target=lambda: complaints.extend(stderr), daemon=True)
        reader.start()
        try:
            child.stdin.write(order)
            child.stdin.close()
            for line in child.stdout:
                told = json.loads(line)
                progress(told["done"], steps + 2)
                found.peak = max(found.peak or 0, told["peak"])
                if told["timed"]:
                    found.tokens.append(told["tokens"])
                    found.seconds.append(told["seconds"])
                    found.reading.append(told["reading"])
        except BrokenPipeError:
            pass
        except BaseException:
            child.kill()
            raise
        code = child.wait()
        reader.join()
    if code:
        said = [line.strip() for line in complaints if line.strip()]
        found.failure = said[-1] if said else f"it ended with {code}"
    return found


def run(config: TrainConfig, steps: int) -> None:
    """The child's part: steps, and a line on stdout after each."""
    import mlx.core as mx

    from ..train.loop import Trainer
    from . import limits
    from .batches import heaviest, num_positions

    limits.allow_open_files()
    limits.limit_training()
    with tempfile.TemporaryDirectory() as folder:
        free = {"out": folder + "/out", "resume": False, "val_data": "", "patience": 0}
        trainer = Trainer(dataclasses.replace(config, **free))
        trainer.vlm.train()
        feed, micro = trainer.feed, config.grad_accumulation_steps
        heavy = heaviest(feed)
        batches = sorted(feed.plan.epoch(0), key=lambda b: num_positions(feed, b), reverse=True)
        # Heaviest first, then evenly from the heaviest to the lightest.
        spread = [(2 * i + 1) * len(batches) // (2 * steps) for i in range(steps)]
        chosen = [heavy[0], heavy[-1], *(batches[place] for place in spread)]
        started = time.monotonic()
        for done, batch in enumerate(chosen):
            began = time.perf_counter()
            items = [feed.fetch(batch, 0) for _ in range(micro)]
            reading = time.perf_counter() - began
            began = time.perf_counter()
            trainer.take_step(items)
            told = {
                "done": done + 1,
                "timed": done > 1,
                "tokens": micro * num_positions(feed, batch),
                "seconds": time.perf_counter() - began,
                "reading": reading,
                "peak": mx.get_peak_memory(),
            }
            sys.stdout.write(json.dumps(told) + "\n")  # the pipe to the parent
            sys.stdout.flush()
            if done > 1 and time.monotonic() - started > MOST_SECONDS:
                break


def main() -> int:
    order = json.load(sys.stdin)
    raw = order["config"]
    raw["targets"] = {name: AuxiliaryTarget(**t) for name, t in raw["targets"].items()}
    raw["sources"] = [Source(**source) for source in raw["sources"]]
    raw["mixture"] = Mixture(**raw["mixture"])
    try:
        run(TrainConfig(**raw), order["steps"])
    except (VLMError, RuntimeError, MemoryError, OSError) as error:
        sys.stderr.write(f"{str(error) or type(error).__name__}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
