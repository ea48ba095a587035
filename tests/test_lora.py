"""Adapters of every kind: the formula, the files, quantised bases, the tower, and the merge."""

# ruff: noqa: F811 (a fixture of test_train's)

import json
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_train import _flags, place, same, train, weights  # noqa: F401
from tiny_vlm import IMAGE, picture, tiny_config, tiny_vlm
from typer.testing import CliRunner

from mlxvlm.config import LoRAConfig, is_adapter
from mlxvlm.errors import ConfigError, UsageError, WeightsError
from mlxvlm.language.forward import blocks_of
from mlxvlm.language.lora import add_lora, add_vision_lora, fuse, linear_keys, matching
from mlxvlm.train.stages import TrainConfig, stage_config
from mlxvlm.weights.adapter import load_adapter, save_adapter
from mlxvlm.weights.load import load
from mlxvlm.weights.save import save

TOKENS = np.array([[1, 2, *[IMAGE] * 16, 50, 51, 52]])


def logits(vlm) -> mx.array:
    return vlm(TOKENS, vlm.look([picture(0)])).astype(mx.float32)


def stir(module: nn.Module, size: float = 0.05) -> None:
    """Adapters as training leaves them: B away from zero, magnitudes away from the norms."""
    for m in module.modules():
        if "lora_b" in m:
            m.lora_b = size * mx.random.normal(m.lora_b.shape)
            if "m" in m:
                m.m = m.m * (1 + size * mx.random.normal(m.m.shape))


SCALES = [
    ({}, 2.0),
    ({"lora_rank": 4}, 2.0),
    ({"lora_rank": 8, "lora_alpha": 4.0}, 0.5),
    ({"lora_rank": 16, "lora_alpha": 8.0, "rslora": True}, 2.0),
    ({"lora_rank": 16, "rslora": True}, 8.0),
]


@pytest.mark.parametrize(("fields", "scale"), SCALES)
def test_alpha_is_hugging_faces(fields, scale):
    assert TrainConfig(train="lora:lm", **fields).lora().scale == pytest.approx(scale)


def test_layers_are_named_whole_by_their_ends_or_all():
    blocks = blocks_of(tiny_vlm().language)
    assert matching(["q_proj", "mlp.up_proj"], blocks) == ["mlp.up_proj", "self_attn.q_proj"]
    assert matching(["proj", "mlp"], blocks) == []
    keys = {"lora_keys": "q_proj, v_proj"}
    assert TrainConfig(train="lora:lm", **keys).lora().keys == ["q_proj", "v_proj"]
    assert TrainConfig(train="lora:lm", lora_keys="all-linear").lora().keys is None
    assert len(linear_keys(blocks)) == 7
    config = LoRAConfig(rank=2, keys=["v_proj"])
    vlm = tiny_vlm()
    add_lora(vlm.language, config)
    assert config.keys == ["self_attn.v_proj"]
    assert "lora_a" in blocks_of(vlm.language)[0].self_attn.v_proj
    with pytest.raises(ConfigError, match="nose.* name no layer"):
        add_lora(tiny_vlm().language, LoRAConfig(keys=["v_proj", "nose"]))


def test_dora_is_its_formula():
    """y = m / |W + s B A| * (W + s B A) x in float64, with |.| the norm of each row."""
    vlm = tiny_vlm()
    add_lora(vlm.language, LoRAConfig(rank=2, scale=3.0, dora=True, keys=["q_proj"]))
    layer = blocks_of(vlm.language)[0].self_attn.q_proj
    W = np.array(layer.linear.weight, np.float64)
    np.testing.assert_allclose(np.array(layer.m), np.linalg.norm(W, axis=1), rtol=1e-6)
    stir(vlm)
    A, B, m = (np.array(layer[n], np.float64) for n in ("lora_a", "lora_b", "m"))
    x = mx.random.normal((3, 64))
    total = W + 3.0 * (A @ B).T
    wanted = np.array(x, np.float64) @ (m / np.linalg.norm(total, axis=1) * total.T)
    np.testing.assert_allclose(np.array(layer(x)), wanted, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_fused_is_adapted(dora, dtype):
    vlm = tiny_vlm()
    vlm.language.set_dtype(dtype)
    vlm.eval()
    add_lora(vlm.language, LoRAConfig(rank=4, dora=dora))
    stir(vlm)
    layer = blocks_of(vlm.language)[0].self_attn.q_proj
    exact = layer.linear.weight.astype(mx.float32) + 2 * (layer.lora_a @ layer.lora_b).T
    if dora:
        exact = (layer.m / mx.linalg.norm(exact, axis=1))[:, None] * exact
    wanted = logits(vlm)
    fuse(vlm)
    merged = blocks_of(vlm.language)[0].self_attn.q_proj.weight
    assert merged.dtype == dtype
    if dtype == mx.bfloat16:  # rounded once: the nearest bfloat16 to the sum, but for its last bits
        assert mx.mean(merged == exact.astype(dtype)).item() > 0.99
        return
    assert mx.allclose(logits(vlm), wanted, rtol=1e-4, atol=1e-3).item()


BASES = [(4, 32, "affine"), (8, 32, "affine"), (4, 32, "mxfp4")]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("bits", "group_size", "mode"), BASES)
def test_qlora(place, tmp_path, bits, group_size, mode, dora):
    """Adapters learn on a quantised base, which stays as it was; its copy fuses to floats."""
    base = tiny_vlm()
    nn.quantize(base.language, group_size, bits, mode=mode)
    save(base, tmp_path / "base")
    flags = {"model": str(tmp_path / "base"), "iters": 12, "lora_rank": 4, "learning_rate": 1e-2}
    trainer = train(place, "lora", tmp_path / "out", **flags, dora=dora, warmup=0)
    lines = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    before, after = weights(load(tmp_path / "base")), weights(trainer.vlm)
    packed = [n for n, v in before.items() if v.dtype == mx.uint32 and n.startswith("language.")]
    assert packed
    for name in packed:
        inner = name if name in after else name.replace(".weight", ".linear.weight")
        assert mx.array_equal(after[inner], before[name]).item()
    adapted = load(tmp_path / "base", adapter=tmp_path / "out")
    trainer.vlm.eval()
    wanted = logits(trainer.vlm)
    assert mx.array_equal(logits(adapted), wanted).item()
    fuse(adapted)
    close = 0.05 if mode == "mxfp4" else 1e-4
    assert (mx.abs(logits(adapted) - wanted).max() / mx.abs(wanted).max()).item() < close


def test_dora_says_what_it_cannot_adapt():
    vlm = tiny_vlm()
    nn.quantize(vlm.language, 32, 6)
    with pytest.raises(ConfigError, match="6 bits"):
        add_lora(vlm.language, LoRAConfig(rank=2, dora=True))
    add_lora(vlm.language, LoRAConfig(rank=2))


def part_of(name: str) -> str:
    return ("lora:" if is_adapter(name) else "") + {"language": "lm"}.get(
        name.split(".")[0], name.split(".")[0]
    )


COMBINATIONS = [
    "vision",
    "lora:vision",
    "projector,vision",
    "projector,lora:vision",
    "projector,lm,vision",
    "projector,lora:lm,lora:vision",
    "vision,lora:lm",
    "lm,lora:vision",
]


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("parts", COMBINATIONS)
def test_any_parts_train_save_and_load(place, tmp_path, parts, grad_checkpoint):
    flags = {"lora_rank": 2, "learning_rate": 5e-3, "iters": 3, "grad_checkpoint": grad_checkpoint}
    trainer = train(place, "sft", tmp_path, train=parts, **flags)
    base = weights(load(place / "model"))
    moved = set()
    for name, value in weights(trainer.vlm).items():
        stored = base.get(name.replace(".linear.", "."))
        if is_adapter(name):
            if name.endswith("lora_b") and mx.abs(value).max().item() > 0:
                moved.add(part_of(name))
        elif not mx.array_equal(value, stored).item():
            moved.add(part_of(name))
    # Where the language model is saved whole, so is the tower, with its adapters merged.
    wanted = parts.replace("lora:vision", "vision") if parts == "lm,lora:vision" else parts
    assert moved == set(wanted.split(","))
    trainer.vlm.eval()
    wanted = logits(trainer.vlm)
    files = {file.name for file in tmp_path.glob("*.safetensors")}
    if not trainer.config.gives_adapters:
        assert files == {"model.safetensors"}
        assert mx.array_equal(logits(load(tmp_path)), wanted).item()
        return
    kinds = {
        "lora:lm": "adapters",
        "lora:vision": "vision_adapters",
        "projector": "projector",
        "vision": "vision",
    }
    assert files == {f"{kinds[part]}.safetensors" for part in parts.split(",")}
    adapted = load(place / "model", adapter=tmp_path)
    assert mx.array_equal(logits(adapted), wanted).item()
    fuse(adapted)
    save(adapted, tmp_path / "fused")
    assert mx.allclose(logits(load(tmp_path / "fused")), wanted, rtol=1e-4, atol=1e-3).item()


def test_a_tower_that_trains_starts_from_what_the_encoder_gives(place, tmp_path):
    """The first loss is a frozen tower's, for pictures that need resizing and normalising."""
    first = []
    for number, parts in enumerate(("projector", "vision", "lora:vision")):
        out = tmp_path / str(number)
        train(place, "pretrain", out, train=parts, iters=1)
        first.append(json.loads((out / "metrics.jsonl").read_text())["loss"])
    assert first[1:] == pytest.approx([first[0]] * 2, rel=1e-6)


def test_a_trained_tower_goes_back_to_how_it_was_stored(place, tmp_path):
    vlm = tiny_vlm()
    vlm.vision.set_dtype(mx.bfloat16)
    save(vlm, tmp_path / "base")
    flags = {"model": str(tmp_path / "base"), "iters": 2, "learning_rate": 1e-2}
    masters = train(place, "sft", tmp_path / "a", train="vision", **flags)
    assert {v.dtype for n, v in weights(load(tmp_path / "a").vision).items()} == {mx.bfloat16}
    assert {v.dtype for v in masters.optimizer.state[0].values() if isinstance(v, mx.array)}
    adapters = train(place, "sft", tmp_path / "b", train="lora:vision", lora_rank=2, **flags)
    kinds = {n: v.dtype for n, v in weights(adapters.vlm.vision).items()}
    assert all(d == (mx.float32 if is_adapter(n) else mx.bfloat16) for n, d in kinds.items())
    adapters.vlm.features([picture(0)])  # encoding casts a tower, and must leave masters alone
    after = {n: v.dtype for n, v in weights(adapters.vlm.vision).items()}
    assert after == kinds


def test_only_what_feeds_the_features_trains(place, tmp_path):
    config = tiny_config()
    config.vision.vision_use_head = True
    config.vision.vision_feature_layer = -2
    config.vision.vision_feature_norm = False
    save(tiny_vlm(config), tmp_path / "base")
    flags = {"model": str(tmp_path / "base"), "train": "vision", "weight_decay": 0.1, "iters": 2}
    trainer = train(place, "sft", tmp_path / "out", **flags)
    names = {name.removeprefix("vision.") for name in trainer.trainable()}
    assert names and not [n for n in names if n.startswith(("head", "post", "encoder.layers.1"))]
    before, after = load(tmp_path / "base"), load(tmp_path / "out")
    assert same(before, after, "vision.head") and same(before, after, "vision.encoder.layers.1")
    flags["train"] = "lora:vision"
    trainer = train(place, "sft", tmp_path / "lora", **flags, lora_rank=2)
    assert {name.split(".")[3] for name in trainer.trainable()} == {"0"}


def test_a_cache_is_refused_where_the_encoder_trains(place, tmp_path):
    for parts in ("vision", "projector,lora:vision"):
        flags = _flags(place, tmp_path) | {"train": parts, "cache": str(place / "cache")}
        with pytest.raises(UsageError, match="features are frozen"):
            stage_config("sft", flags)


def test_keys_may_be_of_either_part(place, tmp_path):
    flags = {"train": "lora:lm,lora:vision", "lora_rank": 2, "iters": 1}
    train(place, "lora", tmp_path / "a", **flags, lora_keys="q_proj,fc1,up_proj")
    raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert raw["lora_parameters"]["keys"] == ["mlp.up_proj", "self_attn.q_proj"]
    assert raw["vision"]["lora_parameters"]["keys"] == ["mlp.fc1", "self_attn.q_proj"]
    with pytest.raises(ConfigError, match="names no layer for lora:vision"):
        train(place, "lora", tmp_path / "b", **flags, lora_keys="up_proj")
    with pytest.raises(ConfigError, match="nose"):
        train(place, "lora", tmp_path / "c", **flags, lora_keys="q_proj,nose")


def test_each_part_has_its_rate(place, tmp_path):
    parts = "projector,lora:lm,lora:vision"
    flags = {"learning_rate": 1e-3, "projector_learning_rate": 1e-4, "vision_learning_rate": 1e-5}
    trainer = train(place, "sft", tmp_path, train=parts, iters=1, lora_rank=2, **flags)
    rates = {group.names[0].split(".")[0]: group.peak for group in trainer.optimizer.groups}
    assert rates == {"projector": 1e-4, "language": 1e-3, "vision": 1e-5}


def test_adapters_of_a_tower_go_through_the_command(place, tmp_path):
    from mlxvlm.cli.main import app

    vlm, vision = tiny_vlm(), LoRAConfig(rank=2, dora=True)
    add_vision_lora(vlm.vision, vision)
    stir(vlm)
    save_adapter(vlm, None, tmp_path / "adapter", projector=False, vision=vision)
    flags = ["--adapter-path", str(tmp_path / "adapter"), "--out", str(tmp_path / "fused")]
    done = CliRunner().invoke(app, ["fuse", "-m", str(place / "model"), *flags])
    assert done.exit_code == 0, done.output
    adapted = load(place / "model", adapter=tmp_path / "adapter")
    assert mx.allclose(logits(load(tmp_path / "fused")), logits(adapted), atol=1e-3).item()
    assert not mx.allclose(logits(load(place / "model")), logits(adapted), atol=1e-2).item()
    (tmp_path / "adapter" / "vision_adapters.safetensors").unlink()
    with pytest.raises(WeightsError, match="has no adapters"):
        load_adapter(tiny_vlm(), Path(tmp_path / "adapter"))


def test_scale_of_rslora_is_in_mlx_lms_file(place, tmp_path):
    flags = {"lora_rank": 4, "lora_alpha": 6.0, "rslora": True, "dora": True, "iters": 1}
    train(place, "lora", tmp_path, **flags)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["fine_tune_type"] == "dora"
    assert raw["lora_parameters"]["scale"] == pytest.approx(6 / math.sqrt(4))
    assert set(raw["lora_parameters"]) == {"rank", "scale", "dropout", "keys"}
    names = {n for n, _ in tree_flatten(load(place / "model", adapter=tmp_path).parameters())}
    assert any(name.endswith(".m") for name in names)
