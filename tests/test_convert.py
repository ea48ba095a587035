"""`mlxvlm convert`: nothing is lost unless asked for, and what is quantised is what mlx would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import LAYOUTS, read, rewrite, write
from mlx.utils import tree_flatten
from test_llava_original import original
from tiny_vlm import IMAGE, picture, tiny_config, tiny_vlm
from typer.testing import CliRunner

import mlxvlm
from mlxvlm import Picture
from mlxvlm.cli.main import app
from mlxvlm.config import ProjectorConfig
from mlxvlm.errors import ConfigError, UsageError, WeightsError
from mlxvlm.language.quantise import MODES, Quantisation, choose
from mlxvlm.weights.adapter import save_adapter
from mlxvlm.weights.convert import convert
from mlxvlm.weights.save import save

LLAVA = Path(__file__).parent / "golden/llava"


def parameters(module: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


def same(a: Any, b: Any) -> bool:
    x, y = parameters(a), parameters(b)
    return x.keys() == y.keys() and all(
        x[n].dtype == y[n].dtype and mx.array_equal(x[n], y[n]).item() for n in x
    )


def logits(vlm: Any) -> np.ndarray:
    count, image = vlm.config.tokens_per_view, vlm.config.prompt.image_token_id
    rows = np.array([[1, 5, *[image] * count, 7, 9, 11]])
    side = vlm.config.vision.image_size
    return np.array(vlm(rows, [Picture([picture(3, side)])]).astype(mx.float32))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in our layout, with the files that a folder may have beside it."""
    folder = tmp_path_factory.mktemp("convert") / "tiny"
    save(tiny_vlm(), folder)
    (folder / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (folder / "LICENSE.txt").write_text("do as you like")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_lost(tmp_path: Path, layout: str) -> None:
    source = rewrite(LLAVA, tmp_path / layout, layout)
    (source / "tokenizer.model").write_bytes(b"pieces")
    (source / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    convert(source, tmp_path / "once")
    convert(tmp_path / "once", tmp_path / "twice")
    first, once = mlxvlm.load(source), mlxvlm.load(tmp_path / "once")
    assert json.loads((tmp_path / "once/config.json").read_text())["model_type"] == "mlxvlm"
    assert same(first, once) and np.array_equal(logits(first), logits(once))
    assert once.config == first.config and once.tokenizer.chat_template == TEMPLATE
    kept = contents(tmp_path / "once")
    assert kept == contents(tmp_path / "twice")
    assert {"preprocessor_config.json", "tokenizer.model", "tokenizer.json"} <= kept.keys()
    assert not any(name.startswith(".") for name in kept)


def test_authors_layout_with_its_tower_elsewhere(tmp_path: Path) -> None:
    source = original(tmp_path / "theirs", "apart")
    convert(source, tmp_path / "out")
    first, found = mlxvlm.load(source), mlxvlm.load(tmp_path / "out")
    assert same(first, found) and found.config == first.config


TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + ' ' }}{% endfor %}"
    "ASSISTANT:"
)


def test_files_of_the_folder_are_kept(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tiny)


def test_shards(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "out", shard_bytes=40_000)
    shards = sorted(file.name for file in (tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 3 and (tmp_path / "out/model.safetensors.index.json").exists()
    assert same(mlxvlm.load(tiny), mlxvlm.load(tmp_path / "out"))


def test_dtype(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "half", dtype="bfloat16")
    found = parameters(mlxvlm.load(tmp_path / "half"))
    assert {x.dtype for x in found.values()} == {mx.bfloat16}
    whole = parameters(mlxvlm.load(tiny))
    assert all(mx.array_equal(found[n], whole[n].astype(mx.bfloat16)).item() for n in whole)


@pytest.mark.parametrize("mode", MODES)
def test_quantised_as_mlx_does_it(tiny: Path, tmp_path: Path, mode: str) -> None:
    done = convert(tiny, tmp_path / "out", quantisation=Quantisation(mode=mode))
    found, by_hand = mlxvlm.load(tmp_path / "out"), mlxvlm.load(tiny)
    sizes, bits = MODES[mode]
    settings = {"group_size": sizes[0], "bits": bits[0], "mode": mode}

    def predicate(path: str, module: Any) -> bool | dict[str, Any]:
        if not path.startswith("language.") or not hasattr(module, "to_quantized"):
            return False
        if module.weight.shape[-1] % sizes[0]:  # 96 inputs: not 64, but 32
            return {**settings, "group_size": 32}
        return settings

    nn.quantize(by_hand, class_predicate=predicate)
    assert same(found, by_hand) and np.array_equal(logits(found), logits(by_hand))
    assert found.language.model.layers[0].self_attn.q_proj.mode == mode
    assert type(found.vision.encoder.layers[0].mlp.fc1) is nn.Linear
    assert type(found.projector.out_proj) is nn.Linear
    assert sum(done.layers.values()) == 2 * 7 + 2 and not done.left
    held = parameters(found)
    assert done.bytes == sum(x.nbytes for x in held.values())
    assert done.bits_per_weight < 32


def test_other_parts(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(projector=ProjectorConfig(hidden_size=32, num_positions=16))
    save(tiny_vlm(config), tmp_path / "in")
    parts = ("language", "projector", "vision")
    wanted = Quantisation(bits=8, group_size=32)
    convert(tmp_path / "in", tmp_path / "out", quantisation=wanted, parts=parts)
    vlm = mlxvlm.load(tmp_path / "out")
    for layer in (vlm.vision.encoder.layers[0].mlp.fc1, vlm.projector.out_proj):
        assert isinstance(layer, nn.QuantizedLinear) and layer.bits == 8
    for module in (vlm.vision.embeddings, vlm.projector):
        assert type(module.position_embedding) is nn.Embedding
    close = np.abs(logits(vlm) - logits(mlxvlm.load(tmp_path / "in")))
    assert 0 < close.max() < 3


def test_a_recipe_of_mlx_lm(tmp_path: Path) -> None:
    config = tiny_config()
    config.language.update(num_hidden_layers=8, intermediate_size=128)
    save(tiny_vlm(config), tmp_path / "in")
    done = convert(tmp_path / "in", tmp_path / "out", quantisation=Quantisation(recipe="mixed_3_6"))
    assert set(done.layers) == {f"{n} bits (affine, groups of 64)" for n in (3, 6)}
    layers = mlxvlm.load(tmp_path / "out").language.model.layers
    assert [layer.mlp.down_proj.bits for layer in layers] == [6, 3, 3, 6, 3, 3, 6, 6]
    assert {layer.self_attn.q_proj.bits for layer in layers} == {3}


def test_what_no_group_fits_stays(tmp_path: Path) -> None:
    config = tiny_config()
    config.language["intermediate_size"] = 72
    save(tiny_vlm(config), tmp_path / "in")
    for wanted in (Quantisation(), Quantisation(group_size=32)):
        out = tmp_path / f"out{wanted.group_size}"
        done = convert(tmp_path / "in", out, quantisation=wanted)
        assert done.left == ["language.model.layers.{0-1}.mlp.down_proj"]
        assert type(mlxvlm.load(out).language.model.layers[1].mlp.down_proj) is nn.Linear


def test_sizes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    vlm = tiny_vlm()
    with pytest.raises(UsageError) as error:
        choose(vlm, Quantisation(group_size=64))
    said = str(error.value)
    assert (
        "--q-group-size (=64) does not divide the 96 inputs of language.model.layers.0.mlp.d"
        in said
    )
    assert "nor of 2 layers in all" in said and "use 32, or leave it out" in said
    config = tiny_config()
    config.language.update(hidden_size=20, intermediate_size=36, head_dim=4)
    with pytest.raises(ConfigError, match=r"groups of 32 or 64 or 128 .* 20 or 36.* nothing to"):
        choose(tiny_vlm(config), Quantisation())


@pytest.mark.parametrize(
    ("flags", "says"),
    (
        ("--q-bits 4", "--q-bits says how to quantise: add -q"),
        ("-q --q-mode int4", "'int4' is not one of 'affine', 'mxfp4'"),
        ("-q --q-bits 7", "--q-bits (=7) must be one of 2, 3, 4, 5, 6, 8"),
        ("-q --q-mode mxfp4 --q-bits 8", "--q-bits (=8) must be 4 for --q-mode mxfp4"),
        ("-q --q-mode nvfp4 --q-group-size 32", "--q-group-size (=32) must be 16 for"),
        ("-q --q-group-size 48", "must be one of 32, 64, 128"),
        ("-q --quant-predicate mixed_3_6 --q-mode mxfp4", "goes with --q-mode affine only"),
        ("-q --quant-predicate mixed_3_6 --q-bits 3", "sets the bits itself"),
        ("-q --q-parts language,tower", "not 'tower'"),
        ("-q --q-group-size 64", "does not divide the 96 inputs"),
    ),
)
def test_flags_that_cannot_be_meant(tiny: Path, tmp_path: Path, flags: str, says: str) -> None:
    command = ["convert", "-m", str(tiny), "--out", str(tmp_path / "out"), *flags.split()]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert done.exit_code == 2 and says in " ".join(done.output.split()), done.output
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_converted(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is one of the parts"):
        convert(tiny, tiny)
    convert(tiny, tmp_path / "four", quantisation=Quantisation())
    with pytest.raises(ConfigError, match=r"quantised already \(4 bits, groups of 64\).*error"):
        convert(tmp_path / "four", tmp_path / "again", quantisation=Quantisation(bits=2))
    convert(tmp_path / "four", tmp_path / "copy")  # as it is, it may go on
    with pytest.raises(UsageError, match="holds a model already"):
        convert(tiny, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(tmp_path / "four")

    vlm = mlxvlm.load(tiny)
    save_adapter(vlm, None, tmp_path / "adapters")
    shutil.copyfile(tmp_path / "four/model.safetensors", tmp_path / "adapters/adapters.safetensors")
    with pytest.raises(ConfigError, match="holds adapters .*mlxvlm fuse -m MODEL --adapter-path"):
        convert(tmp_path / "adapters", tmp_path / "no")
    config, tensors = read(tiny)
    tensors["language.model.layers.0.mlp.up_proj.weight"] *= float("nan")
    write(tmp_path / "nan", config, tensors, "mlx")
    with pytest.raises(WeightsError, match="NaN or infinite values: language.model.layers.0.mlp"):
        convert(tmp_path / "nan", tmp_path / "no", quantisation=Quantisation())
    assert not (tmp_path / "no").exists()


def test_the_command(tiny: Path, tmp_path: Path) -> None:
    command = ["convert", "-m", str(tiny), "--out", str(tmp_path / "out"), "-q", "--q-bits", "8"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert (
        "14 layers in 8 bits (affine, groups of 64)\n  2 layers in 8 bits (affine, groups of 32)"
        in done.output
    )
    assert f"mlxvlm chat -m {tmp_path / 'out'}" in done.output
    reply = mlxvlm.load(tmp_path / "out").generate(
        [{"role": "user", "content": "?"}], [picture(1)], max_tokens=3
    )
    assert len(reply.tokens) <= 3 and IMAGE not in reply.tokens
