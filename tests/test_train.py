"""Whole runs at toy size: cached = uncached, resumed = uninterrupted, what each stage leaves."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from PIL import Image
from tiny_vlm import IMAGE, picture, tiny_config, tiny_vlm

from mlxvlm.cache import EmbeddingCache
from mlxvlm.cache.inputs import picture_sources
from mlxvlm.cache.writer import write_cache
from mlxvlm.errors import CacheError, ConfigError, DataError, PictureError, UsageError
from mlxvlm.language.lora import fuse
from mlxvlm.model import VLM
from mlxvlm.train.loop import Trainer
from mlxvlm.train.optimizer import Optimizer
from mlxvlm.train.stages import stage_config
from mlxvlm.weights.load import load, load_projected
from mlxvlm.weights.save import save

ROWS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model folder, a dozen rows about four pictures, and a cache of them."""
    folder = tmp_path_factory.mktemp("train")
    save(tiny_vlm(), folder / "model")
    images = folder / "data" / "images"
    images.mkdir(parents=True)
    for number in range(4):
        Image.fromarray(picture(number)).save(images / f"{number}.png")
    rows = [
        {
            "image": f"{number % 4}.png",
            "messages": [
                {"role": "user", "content": f"what is {number}?"},
                {"role": "assistant", "content": "it is " + "so " * (number % 3) + "red"},
            ],
            "targets": {"ground": [{"turn": 0, "end": 5, "words": ["r"]}]},
        }
        for number in range(ROWS)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data" / "train.jsonl").write_text(text)
    sources = [(path.name, path) for path in sorted(images.iterdir())]
    write_cache(load(folder / "model").encoder, sources, folder / "cache", codec="float32")
    return folder


def train(place: Path, stage: str, out: Path, **flags) -> Trainer:
    trainer = Trainer(stage_config(stage, _flags(place, out) | flags))
    trainer.run()
    return trainer


def test_rows_in_tars_train_as_rows_beside_files_do(place, tmp_path):
    """With pictures read out of the tar, and from a cache once the tar is only its name."""
    (tmp_path / "shards").mkdir()
    rows = (place / "data" / "train.jsonl").read_text().splitlines()
    with tarfile.open(tmp_path / "shards" / "part-000.tar", "w") as tar:
        for number, row in enumerate(rows):
            tar.add(place / "data" / "images" / f"{number % 4}.png", f"{number:03}.png")
            info = tarfile.TarInfo(f"{number:03}.json")
            info.size = len(row.encode())
            tar.addfile(info, io.BytesIO(row.encode()))
    flags = {"iters": 6, "data": str(tmp_path / "shards")}
    train(place, "pretrain", tmp_path / "files", iters=6)
    train(place, "pretrain", tmp_path / "tar", **flags, images="")
    sources, _ = picture_sources(tmp_path / "shards")
    write_cache(load(place / "model").encoder, sources, tmp_path / "cache")
    train(place, "pretrain", tmp_path / "cached", cache=str(tmp_path / "cache"), **flags)
    assert losses(tmp_path / "tar") == losses(tmp_path / "files")
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "tar"), rtol=1e-5)


def losses(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(vlm: VLM) -> dict[str, mx.array]:
    return dict(tree_flatten(vlm.parameters()))


def same(a: VLM, b: VLM, prefix: str = "") -> bool:
    ours, theirs = weights(a), weights(b)
    names = [name for name in ours if name.startswith(prefix)]
    assert names and ours.keys() == theirs.keys()
    return all(mx.array_equal(ours[name], theirs[name]).item() for name in names)


def test_cached_pretraining_equals_uncached(place, tmp_path):
    train(place, "pretrain", tmp_path / "a", iters=20)
    train(place, "pretrain", tmp_path / "b", iters=20, cache=str(place / "cache"))
    uncached, cached = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert len(cached) == 20 and uncached[0] - uncached[-1] > 0.1
    np.testing.assert_allclose(cached, uncached, rtol=1e-5)


def test_a_cached_run_holds_no_encoder_and_saves_it_all_the_same(place, tmp_path):
    config = stage_config(
        "pretrain", _flags(place, tmp_path) | {"cache": str(place / "cache"), "iters": 1}
    )
    trainer = Trainer(config)
    assert not [name for name in weights(trainer.vlm) if name.startswith("vision.")]
    trainer.run()
    assert same(load(place / "model"), load(tmp_path), "vision.")


def test_a_cache_serves_names_whose_pictures_are_gone(place, tmp_path):
    (tmp_path / "rows.jsonl").write_text((place / "data" / "train.jsonl").read_text())
    flags = {"data": str(tmp_path / "rows.jsonl"), "images": str(tmp_path / "gone"), "iters": 20}
    train(place, "pretrain", tmp_path / "a", **flags, cache=str(place / "cache"))
    train(place, "pretrain", tmp_path / "b", iters=20, cache=str(place / "cache"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_stages_train_their_parts_and_nothing_else(place, tmp_path):
    base = load(place / "model")
    train(place, "pretrain", tmp_path / "a", iters=2)
    projector = load(tmp_path / "a")
    assert same(base, projector, "vision.") and same(base, projector, "language.")
    assert not same(base, projector, "projector.")
    train(place, "sft", tmp_path / "b", iters=2, model=str(tmp_path / "a"))
    both = load(tmp_path / "b")
    assert same(projector, both, "vision.")
    assert not same(projector, both, "projector.") and not same(projector, both, "language.")


def test_lora_loads_as_adapter_and_fuses(place, tmp_path):
    flags = {"lora_rank": 4, "lora_dropout": 0.5, "learning_rate": 1e-2}
    trainer = train(place, "lora", tmp_path / "a", iters=3, **flags)
    trainer.vlm.eval()
    tokens = np.array([[1, 2, *[IMAGE] * 16, 50, 51, 52]])
    images = trainer.vlm.look([picture(0)])
    expected = trainer.vlm(tokens, images)
    adapted = load(place / "model", adapter=tmp_path / "a")
    assert mx.array_equal(adapted(tokens, images), expected).item()
    assert not mx.allclose(load(place / "model")(tokens, images), expected, atol=1e-3).item()
    fuse(adapted.language)
    save(adapted, tmp_path / "fused")
    fused = load(tmp_path / "fused")(tokens, images)
    assert mx.allclose(fused, expected, atol=1e-4).item()


@pytest.mark.parametrize(
    ("stage", "micro", "batching"),
    [
        ("sft", 1, "buckets"),
        ("sft", 2, "pack"),
        ("lora", 1, "pack"),
        ("lora", 2, "buckets"),
        ("lora", 1, "internvl"),
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(place, tmp_path, stage, micro, batching):
    """Over several epochs: a dozen rows are four micro-batches or fewer."""
    flags = {
        "batching": batching,
        "pack_length": 160,
        "iters": 9,
        "save_every": 2,
        "grad_accumulation_steps": micro,
        "lora_dropout": 0.2,
        "cache": str(place / "cache"),
    }
    whole = train(place, stage, tmp_path / "whole", **flags)

    def stop(kind, values):
        if kind == "checkpoint" and values["step"] == 4:
            raise RuntimeError("pulled the plug")

    config = stage_config(stage, {**_flags(place, tmp_path / "cut"), **flags})
    with pytest.raises(RuntimeError, match="plug"):
        Trainer(config, stop).run()
    resumed = train(place, stage, tmp_path / "cut", **flags, resume=True)
    assert same(whole.vlm, resumed.vlm)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def _flags(place: Path, out: Path) -> dict:
    return {
        "model": str(place / "model"),
        "data": str(place / "data"),
        "images": str(place / "data" / "images"),
        "out": str(out),
        "batch_size": 3,
        "length_multiple": 16,
    }


def test_a_run_goes_on_with_its_own_model_and_rows_only(place, tmp_path):
    train(place, "pretrain", tmp_path / "run", iters=4, save_every=2)
    again = {"iters": 4, "save_every": 2, "resume": True}
    save(tiny_vlm(seed=9), tmp_path / "other")
    with pytest.raises(ConfigError, match="model's tensors"):
        train(place, "pretrain", tmp_path / "run", **again, model=str(tmp_path / "other"))
    tower = load(place / "model")
    tower.vision.update(tree_map(lambda x: x + 0.5, tower.vision.parameters()))
    save(tower, tmp_path / "tower")  # frozen, and what is learnt depends on it all the same
    with pytest.raises(ConfigError, match="model's tensors"):
        train(place, "pretrain", tmp_path / "run", **again, model=str(tmp_path / "tower"))
    rows = (place / "data" / "train.jsonl").read_text().replace("red", "bed")
    (tmp_path / "rows.jsonl").write_text(rows)
    with pytest.raises(ConfigError, match="rows"):
        train(place, "pretrain", tmp_path / "run", **again, data=str(tmp_path / "rows.jsonl"))
    with pytest.raises(ConfigError, match="but batch_size was 3, now 2; iters was 4, now 5. Use"):
        train(place, "pretrain", tmp_path / "run", **again | {"iters": 5, "batch_size": 2})
    train(place, "pretrain", tmp_path / "run", **again)


def test_a_run_goes_on_with_features_as_exact_as_before(place, tmp_path):
    sources = [(path.name, path) for path in sorted((place / "data" / "images").glob("?.png"))]
    write_cache(load(place / "model").encoder, sources, tmp_path / "int8", codec="int8")
    train(place, "pretrain", tmp_path / "run", iters=4, save_every=2)
    again = {"iters": 4, "save_every": 2, "resume": True}
    with pytest.raises(ConfigError, match=r"features was \['float32'\], now \['int8'\]"):
        train(place, "pretrain", tmp_path / "run", **again, cache=str(tmp_path / "int8"))
    train(place, "pretrain", tmp_path / "run", **again, cache=str(place / "cache"))


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_process_resumes(place, tmp_path, kill):
    """Ctrl-C saves and exits; kill -9 loses what came after the last checkpoint. Both resume."""
    flags = _flags(place, tmp_path) | {"iters": 100000, "save_every": 3, "schedule": "constant"}
    code = (
        "import sys, json; from mlxvlm.train.loop import Trainer;"
        "from mlxvlm.train.stages import stage_config;"
        "Trainer(stage_config('pretrain', json.loads(sys.argv[1]))).run()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(flags)],
        stderr=subprocess.PIPE,
        env=os.environ | {"MLX_DISABLE_COMPILE": "1"},
    )
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.is_file() and metrics.read_text().count("\n") > 7):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(kill)
    process.communicate(timeout=30)
    # Python turns an interrupt that nobody handles into death by SIGINT; the command into 130.
    assert process.returncode == (-signal.SIGKILL if kill == signal.SIGKILL else -signal.SIGINT)
    done = metrics.read_text().count("\n") + 5
    config = stage_config("pretrain", flags | {"iters": 100000, "resume": True})
    trainer = Trainer(config)
    trainer.steps = done
    trainer.run()
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, done + 1))
    load(tmp_path)


def test_bad_rows_cost_themselves(place, tmp_path):
    data = tmp_path / "data.jsonl"
    good = (place / "data" / "train.jsonl").read_text()
    answerless = {"image": "0.png", "messages": [{"role": "user", "content": "and?"}]}
    long = {"image": "0.png", "text": "word " * 900}
    missing = {"image": "no.png", "text": "a"}
    bad = [json.dumps(row) for row in (answerless, long, missing)] + ["{not json"]
    data.write_text(good + "\n".join(bad) + "\n")
    (place / "data" / "images" / "torn.png").write_bytes(b"\x89PNG torn")
    with data.open("a") as handle:
        handle.write(json.dumps({"image": "torn.png", "text": "a"}) + "\n")
    seen = {}
    flags = _flags(place, tmp_path / "out") | {"data": str(data), "epochs": 2}
    trainer = Trainer(stage_config("pretrain", flags), seen.__setitem__)
    summary = trainer.run()
    assert seen["data"]["rows"] == ROWS + 1 and len(seen["data"]["skipped"]) == 4
    reasons = " ".join(one.reason for one in seen["data"]["skipped"])
    assert "supervised" in reasons and "--max-seq-length 2048" in reasons and "no.png" in reasons
    assert {name for name, _ in summary["failed_pictures"]} == {"torn.png"}
    flags["out"] = str(tmp_path / "strict")
    with pytest.raises(DataError, match="4 rows cannot be used"):
        Trainer(stage_config("pretrain", flags | {"strict": True}))
    only = tmp_path / "torn.jsonl"
    only.write_text(json.dumps({"image": "torn.png", "text": "a"}) + "\n")
    with pytest.raises(PictureError, match="torn.png"):
        Trainer(stage_config("pretrain", flags | {"data": str(only), "strict": True})).run()


def test_cache_of_another_encoder_is_refused(place, tmp_path):
    config = tiny_config()
    config.vision.vision_feature_layer = -2
    save(tiny_vlm(config), tmp_path / "other")
    with pytest.raises(CacheError, match="layer"):
        train(
            place, "pretrain", tmp_path, model=str(tmp_path / "other"), cache=str(place / "cache")
        )


def test_auxiliary_targets_are_in_the_metrics_and_not_in_the_model(place, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[targets.ground]\nlayer = 1\nweight = 0.5\n")
    config = stage_config("sft", _flags(place, tmp_path / "out") | {"iters": 2}, recipe)
    Trainer(config).run()
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["ground_loss"] > 0
    assert weights(load(tmp_path / "out")).keys() == weights(load(place / "model")).keys()


def test_validation_and_unfinished_out_folder(place, tmp_path):
    trainer = train(
        place,
        "pretrain",
        tmp_path,
        iters=4,
        save_every=2,
        val_data=str(place / "data"),
        steps_per_eval=2,
    )
    assert trainer.vlm.training
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [("val_loss" in line) for line in lines] == [False, True, False, True]
    assert lines[3]["val_loss"] == pytest.approx(trainer.evaluate(trainer.val), rel=1e-6)
    with pytest.raises(UsageError, match="--resume"):
        train(place, "pretrain", tmp_path, iters=4)


def test_what_is_there_is_not_overwritten(place, tmp_path):
    with pytest.raises(UsageError, match="holds a model"):
        train(place, "sft", place / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        train(place, "sft", tmp_path / "file")


def test_packed_training_equals_one_by_one(place, tmp_path):
    """One step over all rows, however they meet, with and without a cache."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[targets.ground]\nlayer = 1\nweight = 0.5\n")
    runs = {
        "alone": {"batching": "buckets", "batch_size": 1, "grad_accumulation_steps": ROWS},
        "buckets": {"batching": "buckets", "batch_size": ROWS},
        "pack": {"batching": "pack", "batch_size": ROWS, "pack_length": 160},
        "internvl": {"batching": "internvl", "batch_size": ROWS, "pack_length": 160},
        # Six lines.
        "halves": {
            "batching": "pack",
            "batch_size": 3,
            "pack_length": 160,
            "grad_accumulation_steps": 2,
        },
        "cached": {
            "batching": "pack",
            "batch_size": ROWS,
            "pack_length": 160,
            "cache": str(place / "cache"),
        },
    }
    found = {}
    for name, flags in runs.items():
        seen = {}
        flags = _flags(place, tmp_path / name) | {"iters": 1, "warmup": 0.0} | flags
        trainer = Trainer(stage_config("sft", flags, recipe), seen.__setitem__)
        trainer.run()
        lines = [line for micro in trainer.feed.plan.epoch(0) for line in micro.lines]
        line = json.loads((tmp_path / name / "metrics.jsonl").read_text())
        assert seen["data"]["batching"]["kind"] == flags["batching"]
        found[name] = {k: line[k] for k in ("loss", "ground_loss", "grad_norm")}
        assert (line["rows"], line["tokens"]) == (ROWS, sum(r.length for r in trainer.feed.samples))
        if flags["batching"] != "buckets":
            assert len(lines) == 6
    for name, values in found.items():
        assert values == pytest.approx(found["alone"], rel=1e-5), name


def test_a_torn_picture_costs_its_own_row_of_a_pack(place, tmp_path):
    (place / "data" / "images" / "torn.png").write_bytes(b"\x89PNG torn")
    data = tmp_path / "data.jsonl"
    torn = json.dumps({"image": "torn.png", "text": "a"})
    data.write_text((place / "data" / "train.jsonl").read_text() + torn + "\n")
    flags = {"data": str(data), "batching": "pack", "batch_size": ROWS, "iters": 1}
    train(place, "pretrain", tmp_path / "a", **flags)
    train(place, "pretrain", tmp_path / "b", **flags | {"data": str(place / "data")})
    line = json.loads((tmp_path / "a" / "metrics.jsonl").read_text())
    assert line["rows"] == ROWS
    assert line["loss"] == pytest.approx(losses(tmp_path / "b")[0], rel=1e-5)


WRONG = [
    ({"batching": "boxes"}, "--batching .* must be in auto"),
    ({"batching": "pack", "share_prefix": 2}, "--share-prefix do not go together"),
    ({"train": "nose"}, "parts are projector"),
    ({"train": "lm,lora:lm"}, "choose one"),
    ({"schedule": "cube"}, "must be in cosine"),
    ({"iters": -3}, r"--iters \(=-3\) must be at least 0"),
    ({"epochs": 0.0}, "--epochs .* above 0"),
    ({"lora_rank": 0}, "--lora-rank"),
    ({"learning_rate": 0.0}, "--learning-rate .* above 0"),
    ({"learning_rate": float("inf")}, "--learning-rate .* must be finite"),
    ({"epochs": float("inf")}, "--epochs .* must be finite"),
    ({"seed": -3}, "--seed .* must be at least 0"),
    ({"hold": 1.5}, "0 to 1"),
    ({"out": ""}, "--out is missing"),
    ({"grad_checkpoint": True, "share_prefix": 2}, "drop one"),
    ({"images": "/nowhere"}, "--images must name a folder"),
]


@pytest.mark.parametrize(("flags", "says"), WRONG)
def test_flags_that_cannot_be_meant(place, tmp_path, flags, says):
    with pytest.raises(UsageError, match=says):
        Trainer(stage_config("lora", _flags(place, tmp_path) | flags))


def test_a_projector_alone_needs_pictures(place, tmp_path):
    data = tmp_path / "text.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    flags = _flags(place, tmp_path / "out") | {"data": str(data), "images": ""}
    with pytest.raises(DataError, match="no row with a picture"):
        Trainer(stage_config("pretrain", flags))
    Trainer(stage_config("sft", flags | {"iters": 1})).run()


def test_recipes(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('learning-rate = 3\nbatch_size = 2\ndata = "rows"\nmodel = "org/name"\n')
    config = stage_config("pretrain", {"out": "o", "batch_size": 7}, recipe)
    assert (config.learning_rate, config.batch_size, config.model) == (3, 7, "org/name")
    assert config.data == str(tmp_path / "rows") and config.parts == ["projector"]
    for text, says in (
        ('iters = "3"', 'iters in .* must be a whole number, not "3"'),
        ("iters = true", "iters in .* must be a whole number"),
        ("strict = 1", "strict in .* must be true or false"),
        ("itres = 3", "unknown field .* itres"),
        ("iters = ", "cannot be read"),
    ):
        recipe.write_text(text + "\n")
        with pytest.raises(ConfigError, match=says):
            stage_config("pretrain", {"model": "m", "data": "d", "out": "o"}, recipe)


def test_what_a_frozen_projector_gives_can_be_cached(place, tmp_path):
    """Training the language model on it equals training it from pictures; the projector cannot."""
    images = place / "data" / "images"
    sources = [(path.name, path) for path in sorted(images.iterdir()) if path.name != "torn.png"]
    write_cache(load_projected(place / "model"), sources, tmp_path / "cache", codec="float32")
    flags = {"train": "lm", "iters": 6, "learning_rate": 1e-3}
    uncached = train(place, "sft", tmp_path / "a", **flags)
    trainer = train(place, "sft", tmp_path / "b", **flags, cache=str(tmp_path / "cache"))
    np.testing.assert_allclose(losses(tmp_path / "b"), losses(tmp_path / "a"), atol=1e-5)
    assert same(load(place / "model"), load(tmp_path / "b"), "projector.")
    wanted = uncached.evaluate(uncached.feed)
    assert trainer.evaluate(trainer.feed) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ConfigError, match="projector cannot train"):
        train(place, "pretrain", tmp_path / "c", cache=str(tmp_path / "cache"))
    other = tiny_vlm()
    other.projector.out_proj.bias = other.projector.out_proj.bias + 1e-3
    save(other, tmp_path / "other")
    with pytest.raises(CacheError, match="projector"):
        train(
            place,
            "sft",
            tmp_path / "d",
            **flags,
            model=str(tmp_path / "other"),
            cache=str(tmp_path / "cache"),
        )
    with EmbeddingCache.open(tmp_path / "cache") as cache, pytest.raises(CacheError, match="at "):
        cache.require(load(place / "model").encoder.identity())


def test_recipes_say_what_is_wrong_with_them(tmp_path):
    recipe = tmp_path / "recipe.toml"
    for text, says in (
        ('targets = "lm"', "must be tables"),
        ("[targets]\nx = 3", "must be tables"),
        ("batch_size = 8\nbatch-size = 4", "batch-size twice"),
        ("[targets.x]\nlayer = 1.5", "layer in 'targets.x' must be a whole number"),
    ):
        recipe.write_text(text + "\n")
        with pytest.raises(ConfigError, match=says):
            stage_config("pretrain", {"model": "m", "data": "d", "out": "o"}, recipe)


@pytest.mark.parametrize("optimizer", ["adafactor", "muon", "lion"])
def test_other_optimizers_resume_bit_for_bit(place, tmp_path, optimizer):
    flags = {"iters": 6, "save_every": 3, "optimizer": optimizer, "weight_decay": 0.1}
    whole = train(place, "sft", tmp_path / "whole", **flags)

    def stop(kind, values):
        if kind == "checkpoint":
            raise RuntimeError("pulled the plug")

    config = stage_config("sft", _flags(place, tmp_path / "cut") | flags)
    with pytest.raises(RuntimeError, match="plug"):
        Trainer(config, stop).run()
    resumed = train(place, "sft", tmp_path / "cut", **flags, resume=True)
    assert same(whole.vlm, resumed.vlm)


@pytest.mark.parametrize("loss", ["token", "sample", "square"])
def test_accumulation_equals_one_large_batch(place, tmp_path, loss):
    """4 x 2 is 8, with answers of 1 to 40 tokens: a mean of two means would weigh them wrongly."""
    rows = [
        {"image": f"{number % 4}.png", "text": "red " * (1 + 9 * (number % 2) * (number > 3))}
        for number in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"data": str(tmp_path / "rows.jsonl"), "iters": 3, "loss": loss, "warmup": 0}
    flags |= {"learning_rate": 0.1, "optimizer": "sgd", "batching": "buckets"}
    whole = train(place, "sft", tmp_path / "8", **flags, batch_size=8)
    parts = train(place, "sft", tmp_path / "4x2", **flags, batch_size=4, grad_accumulation_steps=2)
    np.testing.assert_allclose(losses(tmp_path / "4x2"), losses(tmp_path / "8"), rtol=1e-5)
    ours, theirs = weights(parts.vlm), weights(whole.vlm)
    for name, value in theirs.items():
        assert mx.allclose(ours[name], value, atol=1e-5).item(), name
    line = json.loads((tmp_path / "8" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["supervised_tokens"] == sum(len(row["text"].strip()) + 1 for row in rows)


@pytest.mark.parametrize("micro", [1, 3])
def test_a_step_holds_its_gradients_once(place, tmp_path, micro, monkeypatch):
    """When the optimizer starts, its input is all that there is more than between steps."""
    real, found = Optimizer.apply, []

    def apply(self, gradients, parameters, share):
        mx.eval(gradients)
        found.append(mx.get_active_memory())
        return real(self, gradients, parameters, share)

    def report(kind, values):
        if kind == "step":
            found.append(mx.get_active_memory())

    monkeypatch.setattr(Optimizer, "apply", apply)
    flags = {"iters": 3, "grad_accumulation_steps": micro}
    trainer = Trainer(stage_config("sft", _flags(place, tmp_path) | flags), report)
    trainer.run()
    size = sum(value.nbytes for value in trainer.trainable().values())
    assert size / 2 < found[4] - found[3] < 1.5 * size
