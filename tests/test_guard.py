"""Steps that do not count, what a run keeps of its validations, and what a full disk leaves."""

# ruff: noqa: F811 (a fixture of test_train's)

import errno
import json
import math
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_train import ROWS, _flags, losses, place, same, train  # noqa: F401
from typer.testing import CliRunner

from mlxvlm.cli.main import app
from mlxvlm.cli.train import arguments
from mlxvlm.data.samples import Sample
from mlxvlm.data.split import split
from mlxvlm.errors import DataError, UsageError, VLMError
from mlxvlm.train import checkpoint
from mlxvlm.train.guard import MIN_NORMS, NORMS, Guard
from mlxvlm.train.loop import Trainer
from mlxvlm.train.stages import stage_config
from mlxvlm.weights.load import load


def test_a_spike_is_far_above_the_running_median():
    guard = Guard(10.0)
    assert [guard.judge(n) for n in (1.0, 500.0, math.nan, math.inf)] == ["", ""] + 2 * [
        "not finite"
    ]
    guard = Guard(10.0)
    for step in range(MIN_NORMS):
        assert guard.judge(1.0 + step % 3) == ""
    assert guard.judge(19.9) == "" and guard.judge(20.1) == "spike"
    assert guard.judge(3.0) == "" and not guard.streak
    for _ in range(NORMS):  # what is long past is forgotten, and no spike was remembered
        guard.judge(20.0)
    assert guard.judge(150.0) == "" and guard.judge(201.0) == "spike"
    assert Guard(0.0).judge(1e30) == ""


def test_the_guard_comes_back_as_it_was():
    one, other = Guard(5.0), Guard(5.0)
    norms = np.random.default_rng(0).lognormal(0, 1.2, 300).astype(np.float32)
    for norm in norms[:150]:
        one.judge(float(norm))
    other.restore(json.loads(json.dumps(one.state())))
    assert [one.judge(float(n)) for n in norms[150:]] == [
        other.judge(float(n)) for n in norms[150:]
    ]
    assert one.state() == other.state() and sum(one.skipped.values())
    one.judge(math.nan)
    one.judge(1e9)
    assert one.rewind() == 2 and one.state() == other.state() | {"streak": []}


def bad_at(trainer: Trainer, bad: dict[int, float]) -> None:
    """The gradients of some steps, counted from 1, times a factor."""
    real = trainer.gradient

    def gradient(*args):
        out, grads = real(*args)
        factor = bad.get(trainer.step + 1, 1.0)
        return out, {name: g * factor for name, g in tree_flatten(grads)}

    trainer.gradient = gradient


def test_bad_steps_are_skipped_counted_and_resumed_exactly(place, tmp_path):
    """A spike and a NaN change nothing; a run that is cut between them judges as a whole one."""
    flags = {"iters": 28, "save_every": 1, "keep": 0, "batch_size": 4}
    bad = {24: 1e4, 25: math.nan, 27: 1e4}

    def run(out, resume=False, stop=None):
        def report(kind, values):
            if kind == "checkpoint" and values["step"] == stop:
                raise RuntimeError("pulled the plug")

        config = stage_config("pretrain", _flags(place, out) | flags | {"resume": resume})
        trainer = Trainer(config, report)
        bad_at(trainer, bad)
        return trainer, trainer.run()

    whole, summary = run(tmp_path / "whole")
    assert summary["skipped_steps"] == {"not finite": 1, "spike": 2}
    lines = [json.loads(x) for x in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert {x["step"]: x["skipped"] for x in lines if "skipped" in x} == {
        24: "spike",
        25: "not finite",
        27: "spike",
    }
    assert lines[24]["grad_norm"] is None and lines[23]["grad_norm"] > 100 * lines[22]["grad_norm"]
    folder = tmp_path / "whole" / "checkpoints"
    weights = [mx.load(str(folder / f"step-{s:06d}/weights.safetensors")) for s in (23, 25, 26)]
    assert all(mx.array_equal(weights[0][n], weights[1][n]).item() for n in weights[0])
    assert not all(mx.array_equal(weights[1][n], weights[2][n]).item() for n in weights[0])
    with pytest.raises(RuntimeError, match="plug"):
        run(tmp_path / "cut", stop=24)
    resumed, again = run(tmp_path / "cut", resume=True)
    assert again["skipped_steps"] == summary["skipped_steps"]
    assert same(whole.vlm, resumed.vlm)


@pytest.mark.parametrize("save_every", [0, 2])
def test_three_bad_steps_in_a_row_stop_at_the_last_good_state(place, tmp_path, save_every):
    flags = _flags(place, tmp_path / "run") | {"iters": 9, "save_every": save_every}
    trainer = Trainer(stage_config("pretrain", flags))
    bad_at(trainer, {4: math.nan, 5: math.nan, 6: math.nan})
    says = "3 steps in a row, up to step 6, .* not finite.* checkpoint of step"
    with pytest.raises(VLMError, match=says):
        trainer.run()
    whole = train(place, "pretrain", tmp_path / "whole", iters=9)
    resumed = train(
        place, "pretrain", tmp_path / "run", iters=9, save_every=save_every, resume=True
    )
    # Where the cause has gone, nothing is left of it but the steps that a checkpoint had seen.
    if not save_every:
        assert same(whole.vlm, resumed.vlm)
        assert resumed.guard.skipped == {"not finite": 0, "spike": 0}
    assert losses(tmp_path / "run")[:3] == losses(tmp_path / "whole")[:3]


def samples(*pictures: list[str]) -> list[Sample]:
    learnt = np.array([False, True])
    return [Sample(np.array([i, 7], np.int32), learnt, images) for i, images in enumerate(pictures)]


def test_split_keeps_rows_of_one_picture_together():
    rows = samples(*[[f"{i // 3}"] for i in range(30)], *[[] for _ in range(10)], ["1", "2"])
    kept, held = split(rows, 0.25, seed=3)
    assert len(held) == 10 and len(kept) == 31
    assert not {n for r in kept for n in r.images} & {n for r in held for n in r.images}
    again = split(rows, 0.25, seed=3)
    assert [r.tokens[0] for r in again[1]] == [r.tokens[0] for r in held]
    other = split(rows, 0.25, seed=4)[1]
    assert [r.tokens[0] for r in other] != [r.tokens[0] for r in held]
    with pytest.raises(DataError, match="rows of one picture stay together"):
        split(samples(*[["a"]] * 9), 0.2, 0)
    with pytest.raises(DataError, match="no row to train on"):
        split(samples([], []), 1.0, 0)


def test_the_best_of_a_run_is_its_result_and_survives_pruning_and_resuming(place, tmp_path):
    """With a rate that overshoots, so that a middle step is the best."""
    flags = {
        "val_split": 0.25,
        "iters": 12,
        "steps_per_eval": 2,
        "learning_rate": 0.01,
        "schedule": "constant",
        "save_every": 3,
        "keep": 1,
    }
    seen = []

    def told(kind, values):
        seen.append((kind, values))

    trainer = Trainer(stage_config("sft", _flags(place, tmp_path / "whole") | flags), told)
    assert len(trainer.feed.samples) + len(trainer.val.samples) == ROWS
    summary = trainer.run()
    lines = [json.loads(x) for x in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    found = {x["step"]: x["val_loss"] for x in lines if "val_loss" in x}
    assert list(found) == [2, 4, 6, 8, 10, 12]
    best = min(found, key=lambda step: found[step])
    assert best < 12 and summary["best"] == {"step": best, "val_loss": found[best]}
    folders = sorted(p.name for p in (tmp_path / "whole" / "checkpoints").iterdir())
    assert folders == [f"best-{best:06d}", "step-000012"]
    kept = checkpoint.load_best(tmp_path / "whole", best)
    after = dict(tree_flatten(load(tmp_path / "whole").parameters()))
    assert all(mx.array_equal(after[name], value).item() for name, value in kept.items())

    shown = [v for kind, v in seen if kind == "sample"]
    rows = [json.loads(x) for x in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    assert [{k: r[k] for k in shown[0]} for r in rows] == shown and len(rows) == 6 * 3
    assert {r["question"] for r in rows if r["step"] == 2} == {r["question"] for r in rows[-3:]}
    assert all(r["wanted"].startswith("it is") and r["question"][:8] == "what is " for r in rows)

    def stop(kind, values):
        if kind == "checkpoint" and values["step"] == 9:
            raise RuntimeError("pulled the plug")

    config = stage_config("sft", _flags(place, tmp_path / "cut") | flags)
    with pytest.raises(RuntimeError, match="plug"):
        Trainer(config, stop).run()
    again = Trainer(stage_config("sft", _flags(place, tmp_path / "cut") | flags | {"resume": True}))
    assert again.run()["best"] == summary["best"]
    assert same(load(tmp_path / "whole"), load(tmp_path / "cut"))
    texts = [(tmp_path / one / "samples.jsonl").read_text() for one in ("whole", "cut")]
    assert texts[0] == texts[1]


def test_patience_ends_a_run_early(place, tmp_path):
    flags = {"val_split": 0.25, "iters": 60, "steps_per_eval": 2, "patience": 1, "val_samples": 0}
    flags |= {"learning_rate": 0.01, "schedule": "constant", "save_every": 100}
    trainer = train(place, "sft", tmp_path, **flags)
    assert trainer.step == trainer.best.step + 2 < 60
    again = train(place, "sft", tmp_path, **flags, resume=True)
    assert again.step == trainer.step and same(again.vlm, trainer.vlm)
    words = arguments(_flags(place, tmp_path) | flags | {"resume": True})
    done = CliRunner().invoke(app, ["sft", *words])
    assert done.exit_code == 0, done.output
    assert f"Stopped at step {trainer.step} of 60 by --patience" in done.output


def test_a_caption_is_asked_for_by_its_picture(place, tmp_path):
    data = tmp_path / "captions.jsonl"
    rows = [{"image": f"{number}.png", "text": "it is red"} for number in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = _flags(place, tmp_path / "out") | {"data": str(data), "val_data": str(data)}
    flags |= {"iters": 1, "val_samples": 2}
    seen = []
    Trainer(stage_config("pretrain", flags), lambda *told: seen.append(told)).run()
    asked = [values["question"] for kind, values in seen if kind == "sample"]
    assert len(asked) == 2 and set(asked) < {f"{number}.png" for number in range(4)}


def test_patience_and_split_say_what_they_need(place, tmp_path):
    for wrong, says in (
        ({"patience": 2}, "--patience needs validations"),
        ({"val_split": 0.1, "val_data": "x"}, "drop one"),
        ({"val_split": 1.5}, "0 to 1"),
    ):
        with pytest.raises(UsageError, match=says):
            stage_config("sft", _flags(place, tmp_path) | wrong)


def test_the_last_checkpoint_survives_a_full_disk(place, tmp_path):
    """A process that may write no file larger than the first checkpoint's weights."""
    flags = _flags(place, tmp_path) | {"iters": 4, "save_every": 2, "schedule": "constant"}

    def stop(kind, values):
        if kind == "checkpoint":
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="plug"):
        Trainer(stage_config("sft", flags), stop).run()
    before = {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    code = (
        "import json, resource, signal, sys; from mlxvlm.errors import VLMError;"
        "from mlxvlm.train.loop import Trainer; from mlxvlm.train.stages import stage_config;"
        "trainer = Trainer(stage_config('sft', json.loads(sys.argv[1])));"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "\ntry: trainer.run()"
        "\nexcept VLMError as error: print(error)"
    )
    flags["resume"] = True
    command = [sys.executable, "-c", code, json.dumps(flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "nothing more could be written" in done.stdout, done.stderr
    assert "checkpoint of step 2 is whole" in done.stdout
    files = {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    assert files == before and not list((tmp_path / "checkpoints").glob(".*"))
    train(
        place,
        "sft",
        tmp_path,
        **{k: flags[k] for k in ("iters", "save_every", "schedule")},
        resume=True,
    )


def test_a_disk_that_fills_before_any_checkpoint(tmp_path):
    with pytest.raises(VLMError, match="no checkpoint yet"), checkpoint.until_full(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError), checkpoint.until_full(tmp_path):
        raise OSError(errno.EACCES, "Permission denied")
