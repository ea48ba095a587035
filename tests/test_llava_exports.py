"""Projectors and adapters alone, as LLaVA's trainer leaves them: the model that the parts make."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import read
from llava_exports import (
    ALPHA,
    RANK,
    VOCAB,
    adapters,
    lora_export,
    merged,
    projector_export,
    whole,
    write_adapters,
)
from mlx.utils import tree_flatten
from tiny_vlm import picture
from typer.testing import CliRunner

import mlxvlm
from mlxvlm.cli.main import app
from mlxvlm.errors import ConfigError, HubError, VLMError, WeightsError
from mlxvlm.weights.load import load, load_encoder, load_projected

TOKENS = np.array([[1, 5, *[VOCAB] * 9, 7, 12, 33]])


def parameters(vlm: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(vlm.parameters()))


def same(one: Any, other: Any, atol: float = 0.0) -> None:
    ours, theirs = parameters(one), parameters(other)
    assert ours.keys() == theirs.keys()
    worst = max(mx.abs(ours[name] - theirs[name]).max().item() for name in ours)
    assert worst <= atol


def command(*args: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    assert done.exit_code == code, done.output
    return done.output


def test_a_projector_alone_and_its_base_are_one_model(tmp_path: Path) -> None:
    export = projector_export(tmp_path)
    vlm, expected = load(export), load(whole(tmp_path))
    same(vlm, expected)
    assert vlm.config == expected.config and vlm.config.tiling.resize == "pad"
    assert load_encoder(export).identity() == expected.encoder.identity()
    assert load_projected(export).identity() == expected.projected_encoder.identity()
    assert vlm.generate([{"role": "user", "content": "Hm"}], [picture(1)], max_tokens=3).tokens


def test_adapters_are_merged_and_the_projector_is_the_trained_one(tmp_path: Path) -> None:
    export = lora_export(tmp_path)
    language = read(tmp_path / "language")[1]
    expected = load(whole(tmp_path, merged(language, adapters(language))))
    vlm = load(export)
    same(vlm, expected, atol=1e-5)
    images = vlm.look([picture(1)])
    assert np.abs(np.array(vlm(TOKENS, images) - expected(TOKENS, images))).max() < 1e-3
    # The base itself answers otherwise: the adapters do something.
    plain = load(whole(tmp_path / "plain"))
    assert np.abs(np.array(vlm(TOKENS, images) - plain(TOKENS, images))).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({"use_rslora": True}, ALPHA / RANK**0.5),
        ({"lora_alpha": 1}, 1 / RANK),
        ({"alpha_pattern": {"q_proj": 30, "nothing": 1}}, None),
    ],
)
def test_scales(tmp_path: Path, changes: dict[str, Any], scale: float | None) -> None:
    export = lora_export(tmp_path, **changes)
    language = read(tmp_path / "language")[1]
    pairs = adapters(language)
    if scale is None:
        some = {n: v for n, v in pairs.items() if ".q_proj." in n}
        rest = {n: v for n, v in pairs.items() if n not in some}
        wanted = merged(merged(language, some, 30 / RANK), rest)
    else:
        wanted = merged(language, pairs, scale)
    same(load(export), load(whole(tmp_path, wanted)), atol=1e-5)


def test_dora_and_tensors_that_were_trained_whole(tmp_path: Path) -> None:
    export = lora_export(tmp_path, use_dora=True, modules_to_save=["lm_head"])
    language = read(tmp_path / "language")[1]
    pairs = adapters(language)
    wanted = merged(language, pairs)
    rng = np.random.default_rng(1)
    for name in [n for n in pairs if ".lora_A." in n]:
        key = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
        total = np.array(wanted[key], np.float64)
        m = rng.uniform(0.5, 2, len(total)).astype(np.float32)
        pairs[name.replace("lora_A.weight", "lora_magnitude_vector")] = mx.array(m)
        total *= (m / np.sqrt((total**2).sum(axis=1)))[:, None]
        wanted[key] = mx.array(total.astype(np.float32))
    head = mx.array(rng.standard_normal(language["lm_head.weight"].shape, np.float32))
    pairs["base_model.model.lm_head.weight"] = wanted["lm_head.weight"] = head
    changes = json.loads((export / "adapter_config.json").read_text())
    write_adapters(export, str(tmp_path / "language"), pairs, **changes)
    same(load(export), load(whole(tmp_path, wanted)), atol=1e-5)


def test_a_lora_of_a_whole_llava(tmp_path: Path) -> None:
    """As for a task of one's own: the base is a LLaVA, whose projector the export's replaces."""
    export = lora_export(tmp_path)
    language = read(tmp_path / "language")[1]
    base = whole(tmp_path)
    config, tensors = read(base)
    tensors |= {n: mx.zeros_like(v) for n, v in tensors.items() if "mm_projector" in n}
    mx.save_safetensors(str(base / "model.safetensors"), tensors, {"format": "pt"})
    vlm = load(export, language=str(base))
    wanted = merged(language, adapters(language))
    assert vlm.config.language["model_type"] == "llama" and config["model_type"] == "llava_llama"
    same(vlm, load(whole(tmp_path / "w", wanted)), atol=1e-5)


def test_a_quantised_base_takes_a_projector_and_no_adapters(tmp_path: Path) -> None:
    from checkpoints import quantise

    export, lora = projector_export(tmp_path), lora_export(tmp_path / "l")
    base = tmp_path / "language"
    config, tensors = read(base)
    packed, _ = quantise(tensors, lambda name: "layers" in name, bits=8, group_size=32)
    mx.save_safetensors(str(base / "model.safetensors"), packed, {"format": "mlx"})
    block = {"group_size": 32, "bits": 8}
    (base / "config.json").write_text(json.dumps({**config, "quantization": block}))
    # What bitsandbytes held in its trainer's memory is none of the base's.
    raw = json.loads((export / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (export / "config.json").write_text(json.dumps(raw))
    vlm = load(export)
    assert vlm.config.quantization is not None and vlm.config.quantization["bits"] == 8
    assert vlm.generate([{"role": "user", "content": "Hm"}], [picture(1)], max_tokens=2).tokens
    with pytest.raises(ConfigError, match="which is quantised .*: give the model in 16 bits"):
        load(lora, language=str(base))


def test_each_command_takes_them(tmp_path: Path) -> None:
    """chat, convert and fuse, with the base as the export names it and as a flag does."""
    export, language = lora_export(tmp_path), tmp_path / "language"
    picture_file = tmp_path / "a.png"
    from PIL import Image

    Image.fromarray(picture(1)).save(picture_file)
    words = ["-p", "What is this?", "--max-tokens", "5"]
    plain = command("chat", picture_file, "-m", export, *words)
    command("convert", "-m", export, "--out", tmp_path / "converted")
    command("fuse", "-m", export, "--out", tmp_path / "fused")
    expected = load(export)
    for name in ("converted", "fused"):
        same(load(tmp_path / name), expected)
        assert load(tmp_path / name).config == expected.config
    language.rename(tmp_path / "moved")
    said = command("chat", picture_file, "-m", export, *words, code=1)
    assert "the one that it names cannot be had" in said and "--language FOLDER_OR_REPO" in said
    flags = ["--language", tmp_path / "moved"]
    assert command("chat", picture_file, "-m", export, *flags, *words) == plain
    command("convert", "-m", export, *flags, "-q", "--q-group-size", 32, "--out", tmp_path / "q")
    command("fuse", "-m", export, *flags, "--out", tmp_path / "again")
    same(load(tmp_path / "again"), expected)
    (tmp_path / "tower").rename(tmp_path / "eyes")
    said = command("chat", picture_file, "-m", export, *flags, *words, code=1)
    assert "holds no vision tower" in said and "--vision FOLDER_OR_REPO" in said
    flags += ["--vision", tmp_path / "eyes"]
    assert command("chat", picture_file, "-m", export, *flags, *words) == plain


def test_adapters_of_peft_go_onto_any_layout(tmp_path: Path) -> None:
    """Trained with PEFT on transformers' own LLaVA, whose modules have other names than its
    files."""
    from checkpoints import rename, rewrite

    folder = rewrite(Path(__file__).parent / "golden" / "llava", tmp_path / "hub", "hub")
    _, tensors = read(folder)
    tensors = {name: value.astype(mx.float32) for name, value in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    only = {n: v for n, v in tensors.items() if n.startswith("language_model.")}
    pairs = adapters(rename(only, "language_model.model.", "model.language_model."))
    peft = write_adapters(tmp_path / "peft", "somewhere/else", pairs)
    language = merged(
        {n.removeprefix("language_model."): v for n, v in only.items()},
        rename(pairs, "base_model.model.model.language_model.", "base_model.model.model."),
    )
    vlm = load(folder, adapter=peft)
    for name, value in language.items():
        if not name.endswith("inv_freq"):
            assert mx.abs(parameters(vlm)["language." + name] - value).max().item() < 1e-5
    command("fuse", "-m", folder, "--adapter-path", peft, "--out", tmp_path / "fused")
    same(load(tmp_path / "fused"), vlm)


def lacks(tensors: dict[str, mx.array]) -> None:
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]


def lacks_half(tensors: dict[str, mx.array]) -> None:
    del tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]


def has_more(tensors: dict[str, mx.array]) -> None:
    tensors["base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"] = mx.zeros((3, 32))


def is_misshapen(tensors: dict[str, mx.array]) -> None:
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] = mx.zeros((3, 31))


def has_nan(tensors: dict[str, mx.array]) -> None:
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"] *= mx.nan


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lacks, r"missing: language.model.layers.1.self_attn.q_proj.lora_A"),
        (lacks_half, r"missing: model.layers.0.mlp.up_proj.lora_B"),
        (has_more, r"unexpected: base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"),
        (is_misshapen, r"layers.0.mlp.up_proj.lora_B lora_A is \[\d+, 31\] and should be"),
        (has_nan, r"NaN or infinite values: language.model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_adapters_that_do_not_fit_are_named(tmp_path: Path, harm: Any, told: str) -> None:
    export = lora_export(tmp_path)
    file = export / "adapter_model.safetensors"
    tensors: Any = mx.load(str(file))
    mx.eval(tensors)
    harm(tensors)
    mx.save_safetensors(str(file), tensors, {"format": "pt"})
    with pytest.raises(WeightsError, match=told):
        load(export)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "IA3"}, "of type 'IA3'; only LORA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_16"}, "base that was changed"),
        ({"alpha_pattern": {"(": 1}}, "no usable alpha"),
    ],
)
def test_kinds_of_adapters_that_cannot_be_merged(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        load(lora_export(tmp_path, **changes))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (projector_export, ["mm_projector"]),
        (lora_export, ["non_lora_trainables", "adapter_model"]),
        (lora_export, ["non_lora_trainables"]),
        (lora_export, ["adapter_model"]),
    ],
)
def test_pickles_are_never_opened_and_the_command_that_converts_them_is_shown(
    tmp_path: Path, make: Any, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    export = make(tmp_path)
    for name in names:
        (export / f"{name}.safetensors").rename(export / f"{name}.bin")
    monkeypatch.setattr(Path, "open", _no_bin(Path.open))
    with pytest.raises(WeightsError, match=r"only as pickles .* never loaded") as error:
        load(export)
    line = str(error.value).splitlines()[-1]
    files = [Path(word).name for word in shlex.split(line)[3:]]
    assert sorted(files) == sorted(f"{name}.bin" for name in names)


def _no_bin(opener: Any) -> Any:
    def open_(self: Path, *args: Any, **more: Any) -> Any:
        assert self.suffix != ".bin", f"{self} was opened"
        return opener(self, *args, **more)

    return open_


def test_what_an_export_lacks_is_said(tmp_path: Path) -> None:
    export = lora_export(tmp_path)
    (export / "non_lora_trainables.safetensors").unlink()
    with pytest.raises(WeightsError, match="lacks non_lora_trainables.safetensors.*hf download"):
        load(export)
    export = projector_export(tmp_path / "p", _name_or_path=None)
    with pytest.raises(ConfigError, match="does not say which one.*--language"):
        load(export)
    vlm = load(export, language=str(tmp_path / "p" / "language"))
    with pytest.raises(HubError, match="neither an existing folder"):
        load(export, language=str(tmp_path / "nowhere"))
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "p" / "language", other)
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(raw | {"model_type": "qwen2"}))
    with pytest.raises(ConfigError, match="of type 'qwen2'.*of type 'llama'"):
        load(export, language=str(other))
    # What lies in the folder is not to be named.
    mlxvlm.weights.save.save(vlm, tmp_path / "own")
    with pytest.raises(ConfigError, match="language model of its own: leave --language out"):
        load(tmp_path / "own", language=str(other))
    with pytest.raises(VLMError, match="give it as -m"):
        load(tmp_path / "own", adapter=lora_export(tmp_path / "l"))
    said = command("fuse", "-m", tmp_path / "own", "--out", tmp_path / "x", code=2)
    assert "holds no adapters" in said
