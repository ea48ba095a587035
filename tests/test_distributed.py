"""Two ranks on this machine equal one with twice the batch, and a rank that fails is told."""

# ruff: noqa: F811 (a fixture of test_train's)

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from test_train import _flags, losses, place, train  # noqa: F401

from mlxvlm.cli.train import arguments
from mlxvlm.data.batching import Batching
from mlxvlm.data.feed import Feed, Pictures
from mlxvlm.data.samples import Sample
from mlxvlm.train.distributed import Ranks
from mlxvlm.weights.load import load

ROOT = Path(__file__).parents[1]


def on_two_ranks(stage: str, flags: dict) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mlxvlm", stage, "--ranks", "2", *arguments(flags)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "MLX_DISABLE_COMPILE": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300, check=False
    )


@pytest.mark.parametrize("kind", ["buckets", "pack"])
def test_ranks_share_the_rows_of_a_batch(kind):
    rows = [Sample(np.full(4 + n % 7, n + 1), np.arange(4 + n % 7) > 2, []) for n in range(29)]
    batching = Batching(6, kind, pack_length=16, seed=3)
    pictures = Pictures(None, Path())
    alone = Feed(rows, pictures, batching)
    shares = [Feed(rows, pictures, batching, rank=rank, ranks=3) for rank in range(3)]
    seen: list[int] = []
    for micro in alone.plan.epoch(1):
        whole = rows_of(alone.fetch(micro)[0])
        each = [rows_of(share.fetch(micro)[0]) for share in shares]
        assert sorted(sum(each, [])) == whole and max(map(len, each)) < len(whole) or len(whole) < 3
        seen += whole
    assert sorted(seen) == [*range(1, 30)]


def rows_of(batch) -> list[int]:
    return [] if batch is None else sorted(set(batch.tokens[batch.tokens > 0].tolist()))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["token", "square"])
def test_two_ranks_equal_one_with_twice_the_batch(place, tmp_path, loss):
    """Uneven answers, 13 rows in batches of 4: a rank may have fewer rows than the other, or none.
    SGD, because Adam's first steps turn rounding into signs."""
    rows = [{"image": f"{n % 4}.png", "text": " ".join(["red"] * (1 + n % 5))} for n in range(13)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"data": str(tmp_path / "rows.jsonl"), "iters": 5, "optimizer": "sgd", "loss": loss}
    flags |= {"learning_rate": 0.05, "warmup": 0.0, "grad_accumulation_steps": 2}
    flags |= {"val_split": 0.2, "steps_per_eval": 3, "max_grad_norm": 0.5}
    out = tmp_path / "two"
    done = on_two_ranks("sft", _flags(place, out) | flags | {"batch_size": 2, "json": True})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 5 and done.stderr.count("of them held back") == 1
    train(place, "sft", tmp_path / "one", **flags, batch_size=4)
    lines = [
        [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out, tmp_path / "one")
    ]
    for name in ("loss", "grad_norm", "val_loss"):
        two, one = ([x[name] for x in found if name in x] for found in lines)
        np.testing.assert_allclose(two, one, rtol=2e-6)
    for name in ("tokens", "supervised_tokens", "rows"):
        assert [x[name] for x in lines[0]] == [x[name] for x in lines[1]]
    ours, theirs = load(out), load(tmp_path / "one")
    assert mx.abs(ours.projector.out_proj.weight - theirs.projector.out_proj.weight).max() < 1e-6
    for a, b in zip(ours.language.model.layers, theirs.language.model.layers, strict=True):
        assert mx.abs(a.mlp.up_proj.weight - b.mlp.up_proj.weight).max().item() < 1e-6


@pytest.mark.slow
def test_a_rank_that_fails_fails_the_command(place, tmp_path):
    """A picture that only the second rank meets, with --strict, which ends a run."""
    images = tmp_path / "images"
    images.mkdir()
    for n in range(4):
        (images / f"{n}.png").write_bytes((place / "data/images" / f"{n}.png").read_bytes())
    (images / "torn.png").write_bytes(b"\x89PNG torn")
    rows = [{"image": f"{n}.png", "text": "red"} for n in (0, "torn")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = _flags(place, tmp_path / "out") | {"data": str(tmp_path / "rows.jsonl")}
    flags |= {"images": str(images), "iters": 50, "batch_size": 1, "strict": True}
    done = on_two_ranks("pretrain", flags)
    assert done.returncode == 1
    assert "torn.png" in done.stderr and "not every rank finished" in done.stderr


@pytest.mark.slow
def test_what_fails_on_another_rank_is_told(place, tmp_path):
    """Two torn pictures in a batch, one for each rank, and one in the validation rows."""
    rows = [{"image": f"{n}.png", "text": "red"} for n in range(4)]
    torn = [{"image": str(tmp_path / f"törn-{n}.png"), "text": "red"} for n in range(4)]
    for n in range(4):
        (tmp_path / f"törn-{n}.png").write_bytes(b"\x89PNG torn")
    for name, some in (("rows", [*rows, *torn[:3]]), ("val", [rows[0], torn[3], rows[1]])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"{name}.jsonl").write_text(text)
    flags = _flags(place, tmp_path / "out") | {"data": str(tmp_path / "rows.jsonl"), "epochs": 2}
    flags |= {"val_data": str(tmp_path / "val.jsonl"), "batch_size": 4, "json": True}
    done = on_two_ranks("pretrain", flags)
    assert done.returncode == 0, done.stderr
    failed = [name for name, _ in json.loads(done.stdout)["failed_pictures"]]
    assert sorted(failed) == [row["image"] for row in torn]
    lines = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    places = sorted(json.loads(line)["where"] for line in lines)
    assert places == [*(f"rows.jsonl:{n}" for n in (5, 6, 7)), "val.jsonl:2"]


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on(place, tmp_path):
    flags = _flags(place, tmp_path / "cut") | {"iters": 6, "save_every": 3, "batch_size": 2}
    done = on_two_ranks("pretrain", flags)
    assert done.returncode == 0, done.stderr
    whole = losses(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").unlink()
    (tmp_path / "cut" / "config.json").unlink()
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000006")
    done = on_two_ranks("pretrain", flags | {"resume": True})
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "cut") == whole


def test_alone_a_sum_is_what_it_was_given():
    ranks = Ranks()
    assert ranks.leads and ranks.size == 1
    assert ranks.sum({"a": 2.0}, ["a", "b"]) == {"a": 2.0, "b": 0.0}
    arrays = {"x": mx.ones(3)}
    assert ranks.sum_arrays(arrays) is arrays


def test_arguments_are_flags_as_written():
    flags = {"learning_rate": 0.1, "resume": True, "strict": False, "images": None, "iters": 0}
    assert arguments(flags) == ["--learning-rate", "0.1", "--resume", "--iters", "0"]
