"""weights/: what is loaded is what was stored, in every layout, and what does not fit is named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import LAYOUTS, quantise, read, rewrite, write
from mlx.utils import tree_flatten
from tiny_vlm import IMAGE, picture, tiny_config, tiny_vlm

import mlxvlm
from mlxvlm import Picture
from mlxvlm.config import VisionConfig
from mlxvlm.errors import ConfigError, PromptError, UsageError, VLMError, WeightsError
from mlxvlm.score import score
from mlxvlm.weights.check import check, grouped
from mlxvlm.weights.families.towers import CLIP_MEAN, CLIP_STD, preprocessing
from mlxvlm.weights.load import load_encoder, load_siglip
from mlxvlm.weights.save import quantization_of, save

GOLDEN = Path(__file__).parent / "golden"
LLAVA = GOLDEN / "llava"


def golden() -> tuple[np.ndarray, list[Picture], np.ndarray]:
    """Tokens, pictures, and transformers' logits."""
    io = mx.load(str(GOLDEN / "llava.safetensors"))
    pictures = [Picture([view]) for view in np.array(io["pixels"])]
    return np.array(io["tokens"]), pictures, np.array(io["logits"])


def logits(vlm: Any) -> np.ndarray:
    tokens, pictures, _ = golden()
    return np.array(vlm(tokens, pictures).astype(mx.float32))


def parameters(module: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


def same(a: Any, b: Any) -> bool:
    x, y = parameters(a), parameters(b)
    return x.keys() == y.keys() and all(
        x[n].dtype == y[n].dtype and mx.array_equal(x[n], y[n]).item() for n in x
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_llava_layouts_give_transformers_logits(tmp_path: Path, layout: str) -> None:
    vlm = mlxvlm.load(rewrite(LLAVA, tmp_path / layout, layout), dtype="float32")
    assert np.abs(logits(vlm) - golden()[2]).max() < 1e-4
    assert vlm.config.prompt.layout == "vicuna_v1"
    assert vlm.config.prompt.image_token_id == 63


@pytest.mark.parametrize("overrides", (False, True))
def test_mlx_community_quantised(tmp_path: Path, overrides: bool) -> None:
    source = rewrite(LLAVA, tmp_path / "mlx", "mlx")
    config, tensors = read(source)
    tensors = {k: v.astype(mx.float32) for k, v in tensors.items()}
    # One matrix of four bits among those of eight, and a tower and projector quantised in part.
    special = "language_model.model.layers.1.mlp.up_proj"
    some = (
        "language_model",
        "multi_modal_projector.linear_1",
        "layers.0.mlp",
        "position_embedding",
    )
    packed, dense = quantise(tensors, lambda n: any(s in n for s in some))
    block: dict[str, Any] = {"group_size": 32, "bits": 8}
    if overrides:
        four, dense_four = quantise(tensors, lambda n: n.startswith(special), bits=4)
        packed |= {k: v for k, v in four.items() if k.startswith(special)}
        dense |= {k: v for k, v in dense_four.items() if k.startswith(special)}
        block |= {special: {"group_size": 32, "bits": 4}, "vision_tower.vision_model": False}
    files = {"preprocessor_config": json.loads((LLAVA / "preprocessor_config.json").read_text())}
    a = write(tmp_path / "a", {**config, "quantization": block}, packed, "mlx", **files)
    b = write(tmp_path / "b", config, dense, "mlx", **files)
    quantised, plain = mlxvlm.load(a), mlxvlm.load(b)
    assert np.abs(logits(quantised) - logits(plain)).max() < 1e-4
    up = quantised.language.model.layers[1].mlp.up_proj
    assert up.bits == (4 if overrides else 8)
    # The position table is added as it is, so it is held dense.
    table = quantised.vision.embeddings.position_embedding.weight
    assert table.shape == (9, 32) and table.dtype == mx.float32
    save(quantised, tmp_path / "out")
    again = mlxvlm.load(tmp_path / "out")
    assert same(again, quantised)
    assert again.config.quantization == quantization_of(quantised)


@pytest.mark.parametrize("bits, group_size, mode", [(4, 32, "mxfp4"), (4, 16, "nvfp4")])
def test_quantised_in_floating_blocks(
    tmp_path: Path, bits: int, group_size: int, mode: str
) -> None:
    config, tensors = read(rewrite(LLAVA, tmp_path / "mlx", "mlx"))
    tensors = {k: v.astype(mx.float32) for k, v in tensors.items()}
    # Not the table: one of this kind gives bfloat16 embeddings.
    packed, dense = quantise(
        tensors, lambda n: "language_model.model.layers" in n, bits, group_size, mode
    )
    block = {"group_size": group_size, "bits": bits, "mode": mode}
    files = {"preprocessor_config": json.loads((LLAVA / "preprocessor_config.json").read_text())}
    a = write(tmp_path / "a", {**config, "quantization": block}, packed, "mlx", **files)
    quantised = mlxvlm.load(a)
    plain = mlxvlm.load(write(tmp_path / "b", config, dense, "mlx", **files))
    assert quantised.language.model.layers[0].mlp.up_proj.mode == mode
    assert np.abs(logits(quantised) - logits(plain)).max() < 1e-4
    save(quantised, tmp_path / "out")
    again = mlxvlm.load(tmp_path / "out")
    assert same(again, quantised) and again.config.quantization == block


def test_a_quantised_position_table_is_made_dense_in_the_dtype_asked_for(tmp_path: Path) -> None:
    """Made dense in the half precision of its scales, it would be rounded twice."""
    config, tensors = read(rewrite(LLAVA, tmp_path / "mlx", "mlx"))
    tensors = {k: v.astype(mx.float16) for k, v in tensors.items()}
    packed, _ = quantise(tensors, lambda n: "position_embedding" in n)
    block = {"group_size": 32, "bits": 8}
    files = {"preprocessor_config": json.loads((LLAVA / "preprocessor_config.json").read_text())}
    folder = write(tmp_path / "a", {**config, "quantization": block}, packed, "mlx", **files)
    stem = "vision_tower.vision_model.embeddings.position_embedding."
    scales, biases = (packed[stem + part].astype(mx.float32) for part in ("scales", "biases"))
    wanted = mx.dequantize(packed[stem + "weight"], scales, biases, **block)
    found = mlxvlm.load(folder, dtype="float32").vision.embeddings.position_embedding.weight
    assert mx.array_equal(found, wanted).item()


def test_feature_head_and_unused_blocks_are_left_out() -> None:
    names = parameters(mlxvlm.load(with_tokenizer(LLAVA)).vision)
    assert not any(".layers.1." in n or n.startswith(("head", "post_layernorm")) for n in names)


def with_tokenizer(source: Path) -> Path:
    """The golden folder itself has no tokenizer: it is the tests' own."""
    target = Path(os.environ["PYTEST_TMP"]) / "llava"
    if not target.exists():
        rewrite(source, target, "transformers5")
    return target


@pytest.fixture(autouse=True)
def _tmp(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path_factory.getbasetemp()))


# dtype


def test_dtype_stays_as_stored_but_a_tower_is_never_float16(tmp_path: Path) -> None:
    config, tensors = read(with_tokenizer(LLAVA))
    half = {k: v.astype(mx.float16) for k, v in tensors.items()}
    folder = write(tmp_path / "half", config, half)
    vlm = mlxvlm.load(folder)
    kinds = {(n.split(".")[0], v.dtype) for n, v in parameters(vlm).items()}
    assert kinds == {("vision", mx.float32), ("projector", mx.float16), ("language", mx.float16)}
    stored = half["vision_tower.embeddings.position_embedding.weight"]
    found = vlm.vision.embeddings.position_embedding.weight
    assert mx.array_equal(found, stored.astype(mx.float32)).item()
    vlm = mlxvlm.load(folder, dtype="bfloat16")
    assert {v.dtype for v in parameters(vlm).values()} == {mx.bfloat16}
    kinds = {
        (n.split(".")[0], v.dtype)
        for n, v in parameters(mlxvlm.load(folder, dtype="float16")).items()
    }
    assert ("vision", mx.float32) in kinds and ("language", mx.float16) in kinds
    with pytest.raises(ConfigError, match="dtype"):
        mlxvlm.load(folder, dtype="int8")


# Our own layout


@pytest.mark.parametrize("dtype", (mx.float32, mx.bfloat16))
def test_save_and_load_bit_for_bit(tmp_path: Path, dtype: mx.Dtype) -> None:
    vlm = tiny_vlm()
    vlm.set_dtype(dtype)
    save(vlm, tmp_path / "m")
    again = mlxvlm.load(tmp_path / "m")
    assert same(again, vlm)
    assert again.config.to_dict() == vlm.config.to_dict()
    text = "What is <|eot_id|> in here?"
    assert again.tokenizer.encode(text) == vlm.tokenizer.encode(text)
    prompt = again.tokenize([{"role": "user", "content": "Hi"}], [picture(0)])
    assert mx.array_equal(
        vlm(prompt.tokens[None], prompt.pictures), again(prompt.tokens[None], prompt.pictures)
    ).item()


def test_save_over_its_own_source_and_change_of_sharding(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    first = tiny_vlm()
    save(first, folder, shard_bytes=100_000)
    (folder / "metrics.jsonl").write_text("{}\n")
    shards = sorted(f.name for f in folder.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    for file in folder.glob("*.safetensors"):
        assert file.stat().st_size < 130_000
    vlm = mlxvlm.load(folder)
    assert same(vlm, first)
    save(vlm, folder)
    assert [f.name for f in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert same(mlxvlm.load(folder), vlm)
    assert (folder / "metrics.jsonl").exists() and not list(folder.glob(".saving-*"))


def test_a_save_that_fails_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = tiny_vlm()
    save(vlm, tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlxvlm.weights.save.write_tensors", full)
    with pytest.raises(OSError):
        save(tiny_vlm(seed=2), tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_save_refuses_adapters_and_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = tiny_vlm()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(WeightsError, match="only 1 bytes are free"):
        save(vlm, tmp_path / "m")
    vlm.language.lora_a = mx.zeros((2, 2))
    vlm.language.model.layers[0].lora_a = mx.zeros((2, 2))
    with pytest.raises(WeightsError, match="fuse"):
        save(vlm, tmp_path / "m")


def test_quantised_language_is_saved_with_its_block(tmp_path: Path) -> None:
    import mlx.nn as nn

    vlm = tiny_vlm()
    nn.quantize(vlm.language, group_size=32, bits=4)
    save(vlm, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert same(mlxvlm.load(tmp_path), vlm)
    del raw["quantization"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="no quantization block"):
        mlxvlm.load(tmp_path)


# What is wrong with a checkpoint


def broken(folder: Path, change: Any) -> str:
    """The message of loading the golden LLaVA after `change(config, tensors)`."""
    config, tensors = read(with_tokenizer(LLAVA))
    change(config, tensors)
    write(folder, config, tensors)
    with pytest.raises(VLMError) as caught:
        mlxvlm.load(folder)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_every_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    def change(_: Any, tensors: dict[str, mx.array]) -> None:
        for layer in (0, 1):
            del tensors[f"language_model.model.layers.{layer}.mlp.up_proj.weight"]
        del tensors["multi_modal_projector.linear_2.bias"]
        tensors["language_model.model.layers.7.mlp.up_proj.weight"] = mx.zeros((32, 32))
        tensors["image_newline"] = mx.zeros((32,))
        tensors["vision_tower.embeddings.position_embedding.weight"] = mx.zeros((16, 32))

    message = broken(tmp_path, change)
    assert message.startswith("WeightsError")
    for name in (
        "missing: language.model.layers.{0-1}.mlp.up_proj.weight, projector.linear_2.bias",
        "unexpected: image_newline, language.model.layers.7.mlp.up_proj.weight",
        "misshapen: vision.embeddings.position_embedding.weight is [16, 32] and should be [9, 32]",
    ):
        assert name in message


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_not_finite(tmp_path: Path, value: float) -> None:
    def change(_: Any, tensors: dict[str, mx.array]) -> None:
        for name in ("language_model.lm_head.weight", "multi_modal_projector.linear_1.bias"):
            tensors[name] = mx.where(mx.arange(tensors[name].shape[-1]) == 3, value, tensors[name])

    message = broken(tmp_path, change)
    assert "NaN or infinite values: language.lm_head.weight, projector.linear_1.bias" in message


def test_a_block_beyond_the_tower_is_unexpected(tmp_path: Path) -> None:
    name = "vision_tower.encoder.layers.2.layer_norm1.weight"
    message = broken(tmp_path, lambda c, t: t.update({name: mx.ones((32,))}))
    assert "unexpected: vision.encoder.layers.2.layer_norm1.weight" in message


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    message = broken(tmp_path, lambda c, t: t.update({"lm_head.weight": mx.ones((64, 32))}))
    assert "lm_head.weight" in message and "two names" in message


@pytest.mark.parametrize(
    ("change", "says"),
    (
        (lambda c: c.update(model_type="gpt9"), "model_type is 'gpt9'"),
        (lambda c: c["text_config"].update(model_type="gpt9"), "type 'gpt9' are not known"),
        (lambda c: c["text_config"].update(attention_chunk=9), "attention_chunk (=9)"),
        (lambda c: c["vision_config"].update(model_type="pixtral"), "type 'pixtral'"),
        (lambda c: c.update(vision_feature_layer=[-2, -1]), "must be one layer"),
        (lambda c: c.update(quantization_config={"quant_method": "gptq"}), "'gptq'"),
        (lambda c: c["text_config"].update(hidden_size="wide"), "ConfigError"),
    ),
)
def test_configs_that_cannot_be_meant(tmp_path: Path, change: Any, says: str) -> None:
    message = broken(tmp_path, lambda config, _: change(config))
    assert message.startswith("ConfigError") and says in message


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    def message(folder: Path) -> str:
        with pytest.raises(VLMError) as caught:
            mlxvlm.load(folder)
        return str(caught.value)

    source = with_tokenizer(LLAVA)
    folder = tmp_path / "m"
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (4, 300, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        assert "truncated" in message(folder)
    weights.write_bytes(whole[:8] + b"?" * 200 + whole[208:])
    assert "damaged header" in message(folder)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in message(folder)
    weights.unlink()
    assert "has no weights" in message(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/x'\ntR.")
    assert "pickles (pytorch_model.bin)" in message(folder)
    (folder / "training_args.bin").write_bytes(b"\x80")  # no weights, so no part of the command
    told = message(folder)
    assert "weights_only=True" in told and told.endswith(
        f'sys.argv[1:]]" {folder}/pytorch_model.bin'
    )
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(whole)
    assert "lacks model-2.safetensors" in message(folder)
    index["weight_map"]["a"] = "../m/model-1.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "no file beside it" in message(folder)
    (folder / "config.json").write_text("{not json")
    assert "config.json is not readable JSON" in message(folder)
    (folder / "config.json").unlink()
    assert "config.json does not exist" in message(folder)


def test_names_of_layers_are_grouped() -> None:
    names = [f"a.layers.{i}.w" for i in (0, 1, 2, 5)] + ["b", "a.layers.3.v"]
    assert grouped(names) == ["a.layers.3.v", "a.layers.{0-2,5}.w", "b"]


def test_check_passes_what_fits() -> None:
    check({"a": (2,)}, {"a": mx.zeros((2,))}, "here")
    with pytest.raises(WeightsError, match="here: .*missing: b.*unexpected: a"):
        check({"b": (2,)}, {"a": mx.zeros((2,))}, "here")


# Encoders


def tower_folder(folder: Path, kind: str) -> tuple[Path, dict[str, mx.array]]:
    """A SigLIP or a CLIP tower as on the hub, out of the golden file; and what it should answer."""
    stored = mx.load(str(GOLDEN / f"{kind}.safetensors"))
    weights = {k.removeprefix("weight."): v for k, v in stored.items() if k.startswith("weight.")}
    size = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 30,
        "patch_size": 8,
    }
    if kind == "siglip":
        text = {k: v for k, v in size.items() if k not in ("image_size", "patch_size")}
        text |= {"hidden_size": 12, "projection_size": 16, "vocab_size": 40}
        text["max_position_embeddings"] = 6
        config = {"model_type": "siglip", "vision_config": size, "text_config": text}
    else:
        config = {"model_type": "clip_vision_model", **size}
    write(folder, config, weights, tokenizer_config={"eos_token": "</s>", "pad_token": "</s>"})
    return folder, stored


def test_siglip_scores(tmp_path: Path) -> None:
    folder, io = tower_folder(tmp_path / "siglip", "siglip")
    model, tokenizer, tiling = load_siglip(folder)
    views = list(np.array(io["in.pixels"]))

    class Ids:  # the golden ids, in place of what a tokenizer would say
        def __call__(self, texts: Any) -> np.ndarray:
            return np.array(io["in.ids"])

    found = score(model, Ids(), tiling, [Picture([v]) for v in views], ["a", "b", "c"])  # type: ignore[arg-type]
    assert np.abs(found - np.array(io["out.scores"])).max() < 1e-4
    ids = tokenizer(["What, is\n THIS?", "", "a" * 99])
    assert ids.shape == (3, 6) and ids.dtype == np.int32
    plain = tokenizer.tokenizer.encode("what is this")[0][:5]
    assert ids[0].tolist() == [*plain, *[2] * (6 - len(plain))]
    assert ids[1].tolist() == [2] * 6 and ids[2, -1] == 2


@pytest.mark.parametrize("layer", (None, -2, 0))
def test_encoder_of_a_siglip(tmp_path: Path, layer: int | None) -> None:
    folder, io = tower_folder(tmp_path / "siglip", "siglip")
    encoder = load_encoder(folder, feature_layer=layer)
    views = [Picture([v]) for v in np.array(io["in.pixels"])]
    found = np.stack([np.array(f.array[0]) for f in encoder.encode(views)])
    wanted = io["out.last_hidden_state"] if layer is None else io["out.hidden_states"][layer]
    assert np.abs(found - np.array(wanted)).max() < 1e-4


def test_encoder_of_a_clip_and_of_a_whole_model(tmp_path: Path) -> None:
    folder, io = tower_folder(tmp_path / "clip", "clip")
    encoder = load_encoder(folder)
    views = [Picture([v]) for v in np.array(io["in.pixels"])]
    found = np.stack([np.array(f.array[0]) for f in encoder.encode(views)])
    assert np.abs(found - np.array(io["out.hidden_states"])[-2][:, 1:]).max() < 1e-4
    assert encoder.tiling.resize == "crop" and encoder.config.image_mean == CLIP_MEAN
    vlm = mlxvlm.load(with_tokenizer(LLAVA), dtype="float32")
    alone = load_encoder(with_tokenizer(LLAVA), dtype="float32")
    assert alone.identity() == vlm.encoder.identity()
    assert load_encoder(LLAVA, tiling={"resize": "pad"}).tiling.resize == "pad"
    with pytest.raises(ConfigError, match="text tower"):
        config, tensors = read(folder)
        load_siglip(write(tmp_path / "v", {**config, "model_type": "siglip_vision_model"}, tensors))


# Preprocessing


CLIP = VisionConfig(model_type="clip_vision_model", image_size=28, patch_size=7)
SIGLIP = VisionConfig(image_size=28, patch_size=7)


def told(folder: Path, vision: VisionConfig, raw: dict[str, Any] | None, name: str = "pre") -> Any:
    if raw is not None:
        (folder / f"{name}processor_config.json").write_text(json.dumps(raw))
    return preprocessing(folder, vision)


def test_preprocessing_of_each_kind(tmp_path: Path) -> None:
    tiling, mean, std = told(tmp_path, SIGLIP, None)
    assert (tiling.resize, tiling.resample, mean, std) == (
        "squash",
        "bicubic",
        (0.5,) * 3,
        (0.5,) * 3,
    )
    tiling, mean, std = told(tmp_path, CLIP, None)
    assert (tiling.resize, mean, std) == ("crop", CLIP_MEAN, CLIP_STD)
    raw: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    assert told(tmp_path, CLIP, raw)[0].resize == "crop"
    assert told(tmp_path, CLIP, {"size": 28, "crop_size": 28})[0].resize == "crop"
    tiling = told(tmp_path, CLIP, {**raw, "do_pad": True})[0]
    assert tiling.resize == "pad" and tiling.background == (122, 116, 104)
    raw = {"size": {"height": 28, "width": 28}, "resample": 2, "image_mean": [0.1, 0.2, 0.3]}
    tiling, mean, std = told(tmp_path, SIGLIP, raw)
    assert (tiling.resize, tiling.resample, mean) == ("squash", "bilinear", (0.1, 0.2, 0.3))
    assert told(tmp_path, SIGLIP, {"size": 28, "do_normalize": False})[1:] == (
        (0.0,) * 3,
        (1.0,) * 3,
    )
    (tmp_path / "preprocessor_config.json").unlink()
    nested = {"processor_class": "LlavaProcessor", "image_processor": {"size": 28, "resample": 2}}
    assert told(tmp_path, SIGLIP, nested, "")[0].resample == "bilinear"


@pytest.mark.parametrize(
    ("raw", "says"),
    (
        ({"size": {"height": 56, "width": 56}}, "fixed"),
        ({"size": {"height": 28, "width": 56}}, "no square"),
        ({"size": {"shortest_edge": 32}, "crop_size": 28, "do_center_crop": True}, "equal"),
        ({"size": {"shortest_edge": 28}, "do_center_crop": False}, "neither"),
        ({"size": 28, "resample": 1}, "lanczos"),
        ({"size": 28, "do_resize": False}, "do_resize"),
        ({"size": 28, "rescale_factor": 1.0}, "rescale_factor"),
    ),
)
def test_preprocessing_that_is_refused(tmp_path: Path, raw: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        told(tmp_path, SIGLIP, raw)


# Joining


def language_folder(folder: Path) -> Path:
    """A language model's own repository, quantised to eight bits as mlx-lm does it."""
    vlm = tiny_vlm()
    tensors, _ = quantise(parameters(vlm.language), lambda n: "mlp.down_proj" not in n)
    block = {"group_size": 32, "bits": 8}
    config = {**tiny_config().language, "quantization": block, "quantization_config": block}
    write(folder, config, tensors, "mlx")
    vlm.tokenizer.save(folder)
    return folder


def test_join(tmp_path: Path) -> None:
    from mlxvlm.config import ProjectorConfig
    from mlxvlm.weights.join import join

    eyes, _ = tower_folder(tmp_path / "siglip", "siglip")
    mouth = language_folder(tmp_path / "lm")
    projector = ProjectorConfig(hidden_size=16, num_attention_heads=2, pool="mean2")
    state = mx.array(mx.random.state[0])
    vlm = join(eyes, mouth, projector, about="A test.", refusal="Pardon?", seed=7)
    assert mx.array_equal(mx.random.state[0], state).item()
    assert vlm.config.prompt.layout == "llama-3"
    assert vlm.config.prompt.image_token_id == IMAGE  # the tokenizer's own <|image|>
    assert vlm.language.model.layers[0].self_attn.q_proj.bits == 8
    assert not hasattr(vlm.language.model.layers[0].mlp.down_proj, "bits")
    again = join(eyes, mouth, projector, seed=7)
    assert same(vlm.projector, again.projector)
    assert not same(vlm.projector, join(eyes, mouth, projector, seed=8).projector)
    save(vlm, tmp_path / "out")
    loaded = mlxvlm.load(tmp_path / "out")
    assert same(loaded, vlm) and loaded.config.about == "A test."
    assert loaded.config.refusal == "Pardon?"
    assert load_encoder(eyes).identity()["sha256"] == loaded.encoder.identity()["sha256"]
    whole = join(tmp_path / "out", mouth, projector)
    assert same(whole.vision, vlm.vision)


def test_the_image_token_is_reserved_or_beyond_the_vocabulary() -> None:
    from tiny_tokenizers import byte_level

    from mlxvlm.language.tokenizer import Tokenizer
    from mlxvlm.weights.join import image_token_id

    llama3 = Tokenizer(byte_level(), None, {})
    assert image_token_id(llama3, {}) == llama3.id("<|reserved_special_token_0|>")
    backend = byte_level(control=("<|eot_id|>",)).to_str().replace("<image>", "<imagine>")
    bare = Tokenizer(type(byte_level()).from_str(backend), None, {})
    assert image_token_id(bare, {"vocab_size": 3}) == bare.vocab_size
    assert image_token_id(bare, {"vocab_size": 9999}) == 9999


def test_join_with_a_fresh_language_model(tmp_path: Path) -> None:
    from mlxvlm.weights.join import check_out, join

    eyes, _ = tower_folder(tmp_path / "siglip", "siglip")
    mouth = language_folder(tmp_path / "lm")
    (mouth / "model.safetensors").unlink()
    config = {k: v for k, v in json.loads((mouth / "config.json").read_text()).items()}
    for name in ("quantization", "quantization_config"):
        del config[name]
    (mouth / "config.json").write_text(json.dumps(config))
    from mlxvlm.config import ProjectorConfig

    projector = ProjectorConfig(type="mlp")
    with pytest.raises(WeightsError, match="--fresh-language"):
        join(eyes, mouth, projector)
    a, b = (join(eyes, mouth, projector, fresh_language=True, seed=s) for s in (1, 1))
    assert same(a, b)
    with pytest.raises(ConfigError, match="one of the parts"):
        check_out(mouth, eyes, mouth)
    with pytest.raises(ConfigError, match="holds a model"):
        check_out(mouth, eyes)
    save(a, tmp_path / "whole")
    with pytest.raises(ConfigError, match="whole vision-language model"):
        join(eyes, tmp_path / "whole", projector)


# Commands


def run(function: Any, *arguments: Any) -> Any:
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(function)
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_build_command(tmp_path: Path) -> None:
    from mlxvlm.cli.build import build

    eyes, _ = tower_folder(tmp_path / "siglip", "siglip")
    parts = ("--vision", eyes, "--language", language_folder(tmp_path / "lm"))
    shape = ("--projector-width", 16, "--projector-heads", 2, "--num-positions", 9)
    out = tmp_path / "out"
    result = run(
        build,
        *parts,
        *shape,
        "--out",
        out,
        "--feature-layer",
        -2,
        "--about",
        "Hello.",
        "--refusal",
        "No.",
    )
    assert result.exit_code == 0 and "9 visual tokens" in result.stdout
    vlm = mlxvlm.load(out)
    assert (
        vlm.config.vision.vision_feature_layer == -2 and not vlm.config.vision.vision_feature_norm
    )
    assert vlm.config.projector.num_positions == 9 and vlm.config.about == "Hello."
    assert vlm.config.refusal == "No."
    with pytest.raises(UsageError, match="holds a model already"):
        run(build, *parts, *shape, "--out", out)
    with pytest.raises(UsageError, match="--projector-heads belongs to --projector attention or"):
        run(build, *parts, *shape, "--projector", "mlp", "--out", tmp_path / "mlp")
    with pytest.raises(PromptError, match="control tokens that this tokenizer lacks: </s>"):
        run(build, *parts, "--layout", "vicuna_v1", "--out", tmp_path / "vicuna")
    assert not (tmp_path / "vicuna").exists()


def test_score_command(tmp_path: Path) -> None:
    from mlxvlm.cli.score import score as command

    folder, _ = tower_folder(tmp_path / "siglip", "siglip")
    file = folder / "model.safetensors"
    weights = dict(mx.load(str(file)))
    # A vocabulary of forty ids is too small for the tokenizer: give it rows.
    table = "text_model.embeddings.token_embedding.weight"
    weights[table] = mx.random.normal((2000, 12))
    mx.save_safetensors(str(file), weights)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 2000
    (folder / "config.json").write_text(json.dumps(config))
    from PIL import Image

    Image.fromarray(picture(3)).save(tmp_path / "p.png")
    arguments = (tmp_path / "p.png", "A red circle.", "blue", "-m", folder)
    told = json.loads(run(command, *arguments, "--json").stdout)
    assert [s["text"] for s in told["scores"]] == ["A red circle.", "blue"]
    values = [s["score"] for s in told["scores"]]
    assert all(0 < v < 1 for v in values) and abs(values[0] - values[1]) > 1e-6
    plain = json.loads(
        run(command, tmp_path / "p.png", "a  RED circle", "-m", folder, "--json").stdout
    )
    assert plain["scores"][0]["score"] == pytest.approx(values[0], rel=1e-5)
    assert f"{values[1]:7.2%}  blue" in run(command, *arguments).stdout


def test_a_tokenizer_that_writes_ids_beyond_the_table_is_refused(tmp_path):
    # MLX would read what lies behind the table, and training would write there.
    vlm = mlxvlm.load(with_tokenizer(LLAVA), dtype="float32")
    with pytest.raises(PromptError, match="embeddings for ids below 64: they do not belong"):
        vlm.generate([{"role": "user", "content": "Hm"}], [picture(1)], max_tokens=2)
