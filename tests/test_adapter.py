"""Adapters on disk: whole or absent, and nothing of an earlier run among them."""

import errno
import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from tiny_vlm import tiny_vlm
from typer.testing import CliRunner

from mlxvlm.config import LoRAConfig
from mlxvlm.errors import ConfigError, WeightsError
from mlxvlm.language.forward import blocks_of
from mlxvlm.language.lora import add_lora
from mlxvlm.weights import adapter as module
from mlxvlm.weights.adapter import load_adapter, save_adapter
from mlxvlm.weights.load import load
from mlxvlm.weights.save import save


def adapted(seed: int = 1):
    vlm, config = tiny_vlm(seed=seed), LoRAConfig(rank=2)
    add_lora(vlm.language, config)
    return vlm, config


def test_an_earlier_projector_is_not_left_beside_new_adapters(tmp_path):
    vlm, config = adapted()
    save_adapter(vlm, config, tmp_path)
    save_adapter(vlm, config, tmp_path, projector=False)
    other = tiny_vlm(seed=5)
    before = other.projector.out_proj.weight
    load_adapter(other, tmp_path)
    assert mx.array_equal(other.projector.out_proj.weight, before).item()


def test_a_save_that_fails_leaves_the_earlier_adapters(tmp_path, monkeypatch):
    vlm, config = adapted()
    save_adapter(vlm, config, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == [module.ADAPTER_CONFIG, module.ADAPTERS, module.PROJECTOR]

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    changed, config = adapted(seed=2)
    monkeypatch.setattr(module, "sync_path", full)
    with pytest.raises(OSError, match="No space"):
        save_adapter(changed, config, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_fuse_does_not_overwrite_its_model_or_another_kind(tmp_path):
    from mlxvlm.cli.main import app

    vlm, config = adapted()
    save(tiny_vlm(), tmp_path / "model")
    save_adapter(vlm, config, tmp_path / "adapter")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    for out, message in (("model", "folder of its own"), ("llama", "holds a model already")):
        flags = ["--adapter-path", str(tmp_path / "adapter"), "--out", str(tmp_path / out)]
        done = CliRunner().invoke(app, ["fuse", "-m", str(tmp_path / "model"), *flags])
        assert done.exit_code and message in done.output


def test_adapters_of_another_model_are_refused_by_what_differs(tmp_path):
    vlm, config = adapted()
    save_adapter(vlm, config, tmp_path)
    other = tiny_vlm()
    other.config.projector.pool = "mean2"
    with pytest.raises(WeightsError, match="trained on another model: its projector differ"):
        load_adapter(other, tmp_path)
    load_adapter(tiny_vlm(), tmp_path)


def test_a_folder_of_adapters_is_no_model(tmp_path):
    vlm, config = adapted()
    save_adapter(vlm, config, tmp_path / "adapters")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="--adapter-path"):
        load(tmp_path / "adapters")
    with pytest.raises(ConfigError, match="--resume"):
        load(tmp_path / "run")


def test_adapters_of_a_release_with_fewer_fields_still_fit(tmp_path):
    """A field that their config does not name is at its default."""
    save_adapter(*adapted(), tmp_path)
    path = tmp_path / "adapter_config.json"
    raw = json.loads(path.read_text())
    for part, name in (("tiling", "grids"), ("prompt", "merge")):
        del raw["trained_on"][part][name]
    path.write_text(json.dumps(raw))
    load_adapter(tiny_vlm(), tmp_path)
    raw["trained_on"]["tiling"]["max_tiles"] = 3
    path.write_text(json.dumps(raw))
    with pytest.raises(WeightsError, match="its tiling differ"):
        load_adapter(tiny_vlm(), tmp_path)


@pytest.mark.parametrize(("bits", "mode"), [(4, "affine"), (4, "mxfp4")])
def test_fuse_quantises_again_only_when_told(tmp_path, bits, mode):
    from mlxvlm.cli.main import app

    base = tiny_vlm()
    nn.quantize(base.language, 32, bits, mode=mode)
    save(base, tmp_path / "model")
    vlm, config = adapted()
    layer = blocks_of(vlm.language)[0].self_attn.q_proj
    layer.lora_b = 0.05 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(0))
    save_adapter(vlm, config, tmp_path / "adapter")
    old = blocks_of(base.language)[0].self_attn.q_proj
    exact = whole(old) + layer.scale * (layer.lora_a @ layer.lora_b).T
    off, sizes = {}, {}
    for name, flags in (("whole", []), ("small", ["--requantize"])):
        out = tmp_path / name
        given = ["--adapter-path", str(tmp_path / "adapter"), "--out", str(out), *flags]
        done = CliRunner().invoke(app, ["fuse", "-m", str(tmp_path / "model"), *given])
        assert done.exit_code == 0, done.output
        said = " ".join(done.output.split())
        assert ("GB instead of" in said) == (name == "whole")
        assert ("quantised again" in said) == (name == "small")
        fused = blocks_of(load(out).language)[0].self_attn.q_proj
        assert isinstance(fused, nn.QuantizedLinear) == (name == "small")
        if name == "small":
            assert (fused.bits, fused.group_size, fused.mode) == (bits, 32, mode)
        off[name] = mx.abs(whole(fused) - exact).max().item()
        sizes[name] = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert off["whole"] < 1e-5 and 1e-3 < off["small"] < 0.5
    assert sizes["small"] < sizes["whole"]


def whole(layer) -> mx.array:
    """A layer's weight in float32, quantised or not."""
    if not isinstance(layer, nn.QuantizedLinear):
        return layer.weight.astype(mx.float32)
    settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **settings).astype(
        mx.float32
    )
