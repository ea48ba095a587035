"""Rates are of the work that was done, and ceilings of the work that a model asks for."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_vlm import IMAGE, LFM2, VOCAB, tiny_config, tiny_tokenizer, tiny_vlm
from typer.testing import CliRunner

from mlxvlm.cli.bench import page
from mlxvlm.cli.main import app
from mlxvlm.config import ModelConfig, ProjectorConfig, PromptConfig, TilingConfig
from mlxvlm.errors import ConfigError, UsageError
from mlxvlm.machine import bench, ceilings
from mlxvlm.machine.bench import Bench, Rate, timed
from mlxvlm.machine.step import step_of
from mlxvlm.machine.work import decode_work, encoder_flops, prefill_flops, projector_flops
from mlxvlm.model import VLM
from mlxvlm.weights.save import save

# The tiny model: 16 patches of 8 x 8, width 32; a decoder of 2 layers, width 64, 4 heads of 16.
T, WIDTH, MLP, PATCH = 16, 32, 64, 8
D, KV, INNER = 64, 32, 96
LAYER = 2 * D * D + 2 * D * KV + 3 * D * INNER


def tiny_vlm_of(config: ModelConfig) -> VLM:
    """Of another kind, or with a decoder of another kind, than `tiny_vlm` knows to mend."""
    mx.random.seed(1)
    vlm = VLM(config, tiny_tokenizer()).eval()
    mx.eval(vlm.parameters())
    return vlm


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Ceilings of arrays that a test can afford; no bound on MLX's cache is left behind."""
    monkeypatch.setattr(ceilings, "STREAM", (2**20, 2**20))
    monkeypatch.setattr(ceilings, "LONG_ENOUGH", 1e-5)
    monkeypatch.setattr(bench, "MOST_PICTURES", 16)
    monkeypatch.setattr(bench.limits, "limit_training", lambda: 0)


# What the work comes to, counted by hand


def test_the_encoders_flops():
    block = 2 * T * (4 * WIDTH**2 + 2 * WIDTH * MLP) + 4 * T**2 * WIDTH
    patches = 2 * T * WIDTH * 3 * PATCH**2
    vlm = tiny_vlm()
    assert encoder_flops(vlm) == patches + 2 * block
    assert encoder_flops(vlm, 3) == 3 * (patches + 2 * block)


def test_the_projectors_flops():
    block = 2 * T * (4 * 32**2 + 2 * 32 * 128) + 4 * T**2 * 32
    assert projector_flops(tiny_vlm()) == 2 * T * WIDTH * 32 + 2 * block + 2 * T * 32 * D


@pytest.mark.parametrize("length", [1, 2, 40])
def test_a_prompts_flops(length):
    """All but the last token: of the last layer keys and values alone, and no head."""
    last = 2 * (2 * LAYER + D * VOCAB) + 2 * 4 * D * length
    before = length - 1
    first = 2 * before * LAYER + 4 * D * before**2 if before else 0
    state = 2 * before * 2 * D * KV
    assert prefill_flops(tiny_vlm(), length) == first + state + last


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_tokens_flops_and_bytes(tied, dtype):
    config = tiny_config()
    config.language["tie_word_embeddings"] = tied
    vlm = tiny_vlm_of(config)
    vlm.set_dtype(dtype)
    mx.eval(vlm.parameters())
    flops, read = decode_work(vlm)
    assert flops == 2 * (2 * LAYER + D * VOCAB) + 2 * 4 * D
    norms = 5 * D
    table = D * VOCAB if tied else D * VOCAB + D  # the head, and one row of a table of its own
    # A few scalars are the code's own.
    assert read == pytest.approx(dtype.size * (2 * LAYER + norms + table), abs=64)


def test_a_quantised_token_reads_what_is_stored():
    vlm = tiny_vlm()
    nn.quantize(vlm.language, group_size=32, bits=4)
    mx.eval(vlm.parameters())
    flops, read = decode_work(vlm)
    assert flops == 2 * (2 * LAYER + D * VOCAB) + 2 * 4 * D
    linear = (2 * LAYER + D * VOCAB) * (0.5 + 8 / 32)
    row = D * (0.5 + 8 / 32)
    assert read == pytest.approx(linear + row + 4 * 5 * D, abs=64)


def test_of_experts_only_those_that_are_asked():
    config = tiny_config()
    config.language |= {"model_type": "mixtral", "num_local_experts": 8, "rope_theta": 1e4}
    config.language |= {"num_experts_per_tok": 2}
    vlm = tiny_vlm_of(config)
    sizes: dict[str, int] = {}
    for name, value in tree_flatten(vlm.language.parameters()):
        kind = "experts" if "switch_mlp" in name else "table" if "embed" in name else "rest"
        sizes[kind] = sizes.get(kind, 0) + value.nbytes
    _, read = decode_work(vlm)
    assert sizes["experts"] == 4 * 2 * 8 * 3 * D * INNER
    wanted = sizes["experts"] * 2 / 8 + sizes["rest"] + 4 * D
    assert read == pytest.approx(wanted, abs=64)


# The runs


def test_runs_are_timed_after_one_that_is_not(monkeypatch):
    runs = itertools.count()
    seconds = timed(lambda: time.sleep(0.02 if next(runs) else 0.2), 4)
    assert next(runs) == 5 and len(seconds) == 4
    assert all(0.02 <= s < 0.2 for s in seconds)
    monkeypatch.setattr(bench, "MOST_SECONDS", 0.01)
    assert len(timed(lambda: time.sleep(0.02), 9)) == bench.FEWEST


def test_rates_and_shares_belong_together():
    rate = Rate("encoder", "img/s", 8, [2.0, 1.0, 4.0], flops=1e9, ceiling=16, bound="x")
    assert (rate.low, rate.median, rate.high, rate.share) == (2, 4, 8, 0.25)
    found = Bench("here", "float32", "float32", "bfloat16", 1, 1, 1, 1, 1, "lora")
    found.matmul, found.memory = {"bfloat16": 1e12}, 1e11
    assert found.ceiling("bfloat16", 1e9) == (1000, "bfloat16 products")
    assert found.ceiling("bfloat16", 1e9, 1e9) == (100, "memory")


def test_a_whole_bench(tmp_path):
    vlm = tiny_vlm()
    tower = {n: np.array(v) for n, v in tree_flatten(vlm.vision.parameters())}
    projector = np.array(vlm.projector.in_proj.weight)
    told: list[str] = []
    started = time.perf_counter()
    found = bench.bench(
        vlm, length=64, answer=8, rows=2, repeats=2, folder=tmp_path, progress=told.append
    )
    wall = time.perf_counter() - started
    assert [rate.name for rate in found.rates] == [
        "encoder",
        "projector",
        "prefill",
        "decode",
        "training, lora",
        "cache, writing",
        "cache, reading",
    ]
    assert 0 < sum(sum(rate.seconds) for rate in found.rates) < wall
    for rate in found.rates:
        assert len(rate.seconds) == 2 and min(rate.seconds) > 0
        assert 0 < rate.low <= rate.median <= rate.high
        assert rate.ceiling and rate.share == pytest.approx(rate.median / rate.ceiling)
    by_name = {rate.name: rate for rate in found.rates}
    assert (found.visual, found.views, found.length) == (T, 1, 64)
    assert by_name["prefill"].amount == 64 and by_name["decode"].amount == 7
    assert by_name["training, lora"].amount == 128  # 2 rows
    assert by_name["encoder"].flops == encoder_flops(tiny_vlm())
    assert by_name["prefill"].flops == prefill_flops(tiny_vlm(), 64) / 64
    # A token reads the weights, and keys and values of those before it: 68 in the middle.
    weights = decode_work(tiny_vlm())[1]
    assert by_name["decode"].bytes == weights + 4 * 2 * 2 * KV * 68
    # int8: a byte a value and a scale a token, and what stands around them in the shards.
    assert T * WIDTH < by_name["cache, writing"].bytes < 6 * T * WIDTH
    assert found.disk_write > 0 and found.disk_read > 0 and found.memory > 0
    assert found.matmul.keys() == {"float32"} and found.peak_memory > 0
    # The steps were real: the projector has learnt, adapters are there, the tower is as it was.
    assert not np.array_equal(np.array(vlm.projector.in_proj.weight), projector)
    assert any("lora_b" in n and mx.abs(v).max() > 0 for n, v in tree_flatten(vlm.parameters()))
    assert all(np.array_equal(np.array(v), tower[n]) for n, v in tree_flatten(vlm.vision))
    assert not [*tmp_path.iterdir()] and len(told) == 5


def test_training_costs_what_the_step_says(tmp_path):
    vlm = tiny_vlm()
    work = bench._Work(vlm, 64, 8, 2, "pretrain", 1, lambda what: None)
    work.found.matmul, work.found.memory = {"float32": 1e10}, 1e10
    seen = {}
    real = bench.step_of

    def kept(vlm, config, batch, views):
        seen["batch"], seen["views"] = batch, views
        seen["step"] = real(vlm, config, batch, views)
        return seen["step"]

    bench.step_of = kept
    try:
        rate = work.training()
    finally:
        bench.step_of = real
    assert real is step_of and seen["views"] == 2
    assert rate.flops == seen["step"].flops / 128
    # A frozen decoder is run forward and back, but for the last layer's MLP and the head, which
    # only what is learnt goes through; its own gradients are not made.
    whole = 128 * 2 * 2 * LAYER
    assert 1.5 * whole < seen["step"].flops < 4 * whole
    assert seen["batch"].supervised_tokens == 2 * (64 - T) // 2


@pytest.mark.parametrize("stage", ["pretrain", "sft", "lora"])
def test_every_stage_trains_its_parts(stage):
    vlm = tiny_vlm()
    before = np.array(vlm.language.lm_head.weight)
    work = bench._Work(vlm, 32, 4, 1, stage, 1, lambda what: None)
    work.found.matmul, work.found.memory = {"float32": 1e10}, 1e10
    assert work.training().median > 0
    assert np.array_equal(before, np.array(vlm.language.lm_head.weight)) == (stage != "sft")


def test_a_quantised_model_trains_adapters_alone():
    vlm = tiny_vlm()
    nn.quantize(vlm.language, group_size=32, bits=4)
    work = bench._Work(vlm, 32, 4, 1, "lora", 1, lambda what: None)
    work.found.matmul, work.found.memory = {"float32": 1e10}, 1e10
    assert work.training().median > 0
    work.found.stage = "sft"
    with pytest.raises(ConfigError, match="quantised language model cannot be trained itself"):
        work.training()


def test_a_decoder_with_another_state():
    """Nothing but keys and values is counted as a transformer's, and it runs all the same."""
    config = tiny_config()
    config.language = {"model_type": "lfm2", "hidden_size": 64, "num_hidden_layers": 2, **LFM2}
    config.language |= {"vocab_size": VOCAB}
    vlm = tiny_vlm_of(config)
    work = bench._Work(vlm, 32, 4, 1, "lora", 1, lambda what: None)
    work.found.matmul, work.found.memory = {"float32": 1e10}, 1e10
    prefill, decode = work.generation()
    assert prefill.median > 0 and decode.median > 0 and decode.flops > 0


def test_pictures_of_several_views():
    """The whole and its tiles as one map: a view costs what a view costs."""
    config = tiny_config(
        tiling=TilingConfig(type="anyres", image_size=32, grids=((2, 1), (1, 2))),
        projector=ProjectorConfig(type="mlp"),
        prompt=PromptConfig(image_token_id=IMAGE, merge="spatial_unpad"),
    )
    vlm = tiny_vlm_of(config)
    work = bench._Work(vlm, None, 8, 1, "pretrain", 1, lambda what: None)
    found = work.found
    found.matmul, found.memory = {"float32": 1e10}, 1e10
    assert found.views == 3 and found.visual > T and found.length > found.visual
    assert work.encoder().flops == 3 * encoder_flops(vlm)
    assert work.projector().flops == 3 * projector_flops(vlm)
    assert [rate.amount for rate in work.generation()] == [found.length, 7]
    assert work.training().amount == found.length


def test_a_length_that_cannot_be():
    vlm = tiny_vlm()
    for length, answer, word in ((16, 8, "above 16"), (510, 8, "at most 512 together")):
        with pytest.raises(UsageError, match=word):
            bench._Work(vlm, length, answer, 1, "lora", 1, lambda what: None)
    config = tiny_config()
    config.language["max_position_embeddings"] = 100
    assert bench._Work(tiny_vlm(config), None, 8, 1, "lora", 1, print).found.length == 92
    with pytest.raises(UsageError, match="--stage"):
        bench.bench(vlm, stage="nothing")


# Ceilings


def test_ceilings_are_of_the_work_that_is_timed(monkeypatch, tmp_path):
    times: list[float] = []
    real = ceilings.best_seconds

    def best(work, seconds):
        times.append(real(work, seconds))
        return times[-1]

    monkeypatch.setattr(ceilings, "best_seconds", best)
    monkeypatch.setattr(ceilings, "LARGEST", 256)
    assert ceilings.matmul_rate(mx.bfloat16, 0.01) == 2 * 256**3 / min(times)
    times.clear()
    assert ceilings.memory_rate(0.01) == max(2**20 / times[0], 3 * 2**20 / times[1])
    times.clear()
    written, read = ceilings.disk_rates(tmp_path, 3 * 2**20)
    assert (written, read) == (3 * 2**20 / times[0], 3 * 2**20 / times[1])
    assert not [*tmp_path.iterdir()]


def test_the_best_of_several():
    pauses = iter([0.05, 0.05, 0.01, 0.05, *[0.05] * 50])
    assert 0.01 <= ceilings.best_seconds(lambda: time.sleep(next(pauses)), 0.15) < 0.05


# The command


@pytest.fixture
def model(tmp_path) -> Path:
    save(tiny_vlm(), tmp_path / "model")
    return tmp_path / "model"


def test_the_command(model, tmp_path):
    flags = ["bench", "-m", str(model), "--length", "32", "--max-tokens", "4", "--repeats", "1"]
    flags += ["--batch-size", "1", "--folder", str(tmp_path)]
    done = CliRunner().invoke(app, [*flags, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["model"] == str(model) and len(told["rates"]) == 7
    for rate in told["rates"]:
        assert rate["median"] > 0 and rate["median"] == rate["low"] == rate["high"]
    assert [*tmp_path.iterdir()] == [model]
    done = CliRunner().invoke(app, flags[:-2] + ["--folder", str(tmp_path / "none")])
    assert done.exit_code == 2 and "no folder" in done.stderr


def test_the_table_fits_80_columns():
    found = Bench(
        "AMD EPYC (CPU)", "bfloat16", "float32", "bfloat16", 256, 64, 1, 64, 4, "pretrain"
    )
    found.matmul = {"bfloat16": 3.2e12, "float32": 4e9}
    found.rates = [
        Rate("training, pretrain", "tok/s", 1e6, [1, 2], ceiling=2e9, bound="bfloat16 products"),
        Rate("cache, reading", "img/s", 1e5, [1, 2], bytes=8200, ceiling=2.5, bound="the disk"),
    ]
    text = page("demo", found)
    assert max(map(len, text.splitlines())) <= 80
    assert "<0.1% bfloat16 products" in text and "3.2 TFLOP/s in bfloat16" in text


def test_the_commands_defaults_are_the_librarys():
    import inspect

    from mlxvlm.cli.bench import bench as command

    own = {k: v.default for k, v in inspect.signature(command).parameters.items()}
    theirs = {k: v.default for k, v in inspect.signature(bench.bench).parameters.items()}
    pairs = (("max_tokens", "answer"), ("batch_size", "rows"), ("repeats", "repeats"))
    assert all(own[a] == theirs[b] for a, b in (*pairs, ("stage", "stage")))
