"""LLaVA in its authors' layout: the model that transformers' conversion of it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import old_rope, read, rename, rewrite, write
from mlx.utils import tree_flatten
from tiny_vlm import picture

import mlxvlm
from mlxvlm.errors import ConfigError, HubError, WeightsError
from mlxvlm.weights.load import load_encoder, load_projected
from mlxvlm.weights.save import save

GOLDEN = Path(__file__).parent / "golden"
LLAVA = GOLDEN / "llava"
PINPOINTS = [[14, 28], [28, 14], [28, 28], [42, 14], [14, 42]]
VOCAB = 512  # the golden one has fewer rows than its tokenizer has ids
PLACES = ("inside", "apart")


def original(folder: Path, tower: str = "inside", **changes: Any) -> Path:
    """The golden LLaVA as its authors would save it; changes: of config.json, None removes."""
    config, tensors = read(LLAVA)
    vision = {k: v for k, v in tensors.items() if k.startswith("vision_tower.")}
    rest = {k: v for k, v in tensors.items() if k not in vision}
    for old, new in (
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ):
        rest = rename(rest, old, new)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rest[name] = mx.pad(rest[name], ((0, VOCAB - len(rest[name])), (0, 0)))
    text = {**config["text_config"], "vocab_size": VOCAB}
    old_rope(text)
    apart = folder / "tower"
    raw = {
        **text,
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(apart),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 2048,
        **changes,
    }
    if raw.get("image_aspect_ratio") == "anyres":
        rest["model.image_newline"] = mx.arange(32) / 32
    processor = json.loads((LLAVA / "preprocessor_config.json").read_text())
    if tower == "inside":
        rest |= rename(vision, "vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        apart.mkdir(parents=True)
        (apart / "config.json").write_text(json.dumps(config["vision_config"]))
        (apart / "preprocessor_config.json").write_text(json.dumps(processor))
    else:
        theirs = rename(vision, "vision_tower.", "vision_model.")
        whole = {"model_type": "siglip", "vision_config": config["vision_config"]}
        theirs["text_model.final_layer_norm.weight"] = mx.ones((3,))
        theirs |= {"logit_scale": mx.ones((1,)), "logit_bias": mx.ones((1,))}
        write(apart, whole, theirs, preprocessor_config=processor)
    return write(folder / "model", {k: v for k, v in raw.items() if v is not None}, rest)


def parameters(module: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


@pytest.mark.parametrize("tower", PLACES)
def test_it_gives_transformers_logits(tmp_path: Path, tower: str) -> None:
    vlm = mlxvlm.load(original(tmp_path, tower), dtype="float32")
    io = mx.load(str(GOLDEN / "llava.safetensors"))
    tokens = np.array(io["tokens"])
    assert vlm.config.prompt.image_token_id == VOCAB  # theirs is a row of the table: 63
    tokens = np.where(tokens == 63, VOCAB, tokens)
    found = np.array(vlm(tokens, [mlxvlm.Picture([view]) for view in np.array(io["pixels"])]))
    theirs = np.array(io["logits"])
    assert np.abs(found[..., : theirs.shape[-1]] - theirs).max() < 1e-4
    assert vlm.config.prompt.layout == "vicuna_v1"
    assert not [name for name in vlm.config.language if name.startswith(("mm_", "image_"))]


@pytest.mark.parametrize("tower", PLACES)
def test_each_way_of_loading_finds_the_tower(tmp_path: Path, tower: str) -> None:
    folder = original(tmp_path, tower)
    vlm = mlxvlm.load(folder)
    assert load_encoder(folder).identity() == vlm.encoder.identity()
    assert load_projected(folder).identity() == vlm.projected_encoder.identity()
    save(vlm, tmp_path / "own")
    again = mlxvlm.load(tmp_path / "own")
    assert again.config == vlm.config
    ours, theirs = parameters(again), parameters(vlm)
    assert all(mx.array_equal(ours[name], value).item() for name, value in theirs.items())
    reply = again.generate([{"role": "user", "content": "Hm"}], [picture(1)], max_tokens=4)
    assert reply.generation_tokens


def test_pictures_are_prepared_as_config_says(tmp_path: Path) -> None:
    padded = mlxvlm.load(original(tmp_path / "pad")).config.tiling
    assert padded.resize == "pad" and padded.background == (127, 127, 127)
    for number, aspect in enumerate(("square", None)):
        folder = original(tmp_path / str(number), image_aspect_ratio=aspect)
        plain = mlxvlm.load(rewrite(LLAVA, tmp_path / f"plain{number}", "hub"))
        assert mlxvlm.load(folder).config.tiling == plain.config.tiling
    with pytest.raises(ConfigError, match="square, pad or anyres"):
        mlxvlm.load(original(tmp_path / "other", image_aspect_ratio="anyres_max_9"))


def test_any_resolution(tmp_path: Path) -> None:
    changes = {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": PINPOINTS,
    }
    vlm = mlxvlm.load(original(tmp_path / "a", "apart", **changes))
    # A pinpoint's width stands first, which decides between grids that fit alike.
    assert vlm.config.tiling.grids == ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    assert vlm.config.prompt.merge == "spatial_unpad"
    assert np.allclose(np.array(vlm.projector.image_newline), np.arange(32) / 32)
    (seen,) = vlm.look([picture(1)])
    prompt = vlm.tokenize([{"role": "user", "content": "Hm"}], [seen])
    assert vlm(prompt.tokens[None], [seen]).shape[1] == len(prompt)
    for wrong, told in (
        ({"image_grid_pinpoints": [[14, 20]]}, "multiples of the tower's 14 pixels"),
        ({"mm_patch_merge_type": "flat"}, "must be spatial_unpad"),
    ):
        with pytest.raises(ConfigError, match=told):
            mlxvlm.load(original(tmp_path / told, **{**changes, **wrong}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mm_projector_type": "linear"}, "only mlp2x_gelu"),
        ({"mm_projector_type": None}, "only mlp2x_gelu"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_vision_select_feature": "all"}, "patch or cls_patch"),
        ({"mm_vision_tower": 3}, "must name a repository"),
    ],
)
def test_what_it_cannot_be_is_named(tmp_path: Path, changes: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        mlxvlm.load(original(tmp_path, **changes))


def test_a_tower_that_is_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="no/where at all"):
        mlxvlm.load(original(tmp_path / "a", mm_vision_tower="no/where at all"))
    folder = original(tmp_path / "b")
    (tmp_path / "b" / "tower" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ConfigError, match="'vit'; only CLIP and SigLIP"):
        mlxvlm.load(folder)
    folder = original(tmp_path / "c", "apart")
    (tmp_path / "c" / "tower" / "model.safetensors").rename(tmp_path / "c" / "tower" / "model.bin")
    with pytest.raises(WeightsError, match="tower has its weights only as pickles"):
        mlxvlm.load(folder)


def test_conversations_are_the_language_models(tmp_path: Path) -> None:
    mistral = original(tmp_path / "m", model_type="llava_mistral")
    vlm = mlxvlm.load(mistral)
    assert vlm.config.prompt.layout == "mistral" and vlm.config.language["model_type"] == "mistral"
    # "llava" is transformers' name too: what tells them apart is the tower's.
    assert (
        mlxvlm.load(original(tmp_path / "l", model_type="llava")).config
        == mlxvlm.load(original(tmp_path / "ll")).config
    )


def nan(tensors: dict[str, mx.array]) -> None:
    tensors["model.mm_projector.2.bias"] = mx.full((32,), mx.nan)


def short(tensors: dict[str, mx.array]) -> None:
    tensors["model.mm_projector.2.bias"] = mx.zeros((31,))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda t: t.pop("model.mm_projector.0.weight"), "missing: projector.linear_1.weight"),
        (lambda t: t.update(stray=mx.zeros((1,))), "unexpected: (vision.)?stray"),
        (short, r"projector.linear_2.bias is \[31\] and should be \[32\]"),
        (nan, "with NaN or infinite values: projector.linear_2.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, harm: Any, told: str) -> None:
    folder = original(tmp_path)
    _, tensors = read(folder)
    mx.eval(tensors)
    harm(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    with pytest.raises(WeightsError, match=told):
        mlxvlm.load(folder)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model_type is 'llava_mpt', not one of"):
        mlxvlm.load(original(tmp_path / "a", model_type="llava_mpt"))
