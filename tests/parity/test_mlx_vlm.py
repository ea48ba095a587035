"""mlx-vlm's converted folders (mlx-community's): read whole, with its own logits or better.

mlx-vlm takes LLaVA in the hub's older layout only, and runs a SigLIP tower with CLIP's activation,
so each folder is also turned back into transformers' weights: those logits hold for both towers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
mlx_vlm = pytest.importorskip("mlx_vlm")
mlx_vlm_utils = pytest.importorskip("mlx_vlm.utils")

import mlx.core as mx  # noqa: E402
from checkpoints import old_rope, read, rename  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from tiny_tokenizers import sentencepiece, write_folder  # noqa: E402

import mlxvlm  # noqa: E402
from mlxvlm import Picture  # noqa: E402
from mlxvlm.weights.save import save  # noqa: E402

pytestmark = pytest.mark.parity

IMAGE = 499  # of tiny_tokenizers' sentencepiece
SIDE, PATCH = 32, 8
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
DECODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
LINEAR = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}


def whole(path: str, module: Any) -> bool:
    """As early mlx-vlm releases did: the tower and its position table are quantised too."""
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 64 == 0


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"dtype": "bfloat16"},
    "q4": {"quantize": True, "q_bits": 4, "q_group_size": 64},
    "q4-bf16": {"quantize": True, "q_bits": 4, "q_group_size": 32, "dtype": "bfloat16"},
    "q8": {"quantize": True, "q_bits": 8, "q_group_size": 32},
    "mixed": {"quantize": True, "quant_predicate": "mixed_4_8"},
    "whole-f16": {"quantize": True, "q_bits": 8, "dtype": "float16", "quant_predicate": whole},
    "mxfp4": {"quantize": True, "q_mode": "mxfp4", "q_bits": 4, "q_group_size": 32},
    "nvfp4": {"quantize": True, "q_mode": "nvfp4", "q_bits": 4, "q_group_size": 16},
}


@pytest.fixture(scope="module", params=["clip", "siglip"])
def llava(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random LLaVA of transformers, and its folder in the hub's older layout."""
    clip = request.param == "clip"
    vision = transformers.CLIPVisionConfig if clip else transformers.SiglipVisionConfig
    text = transformers.LlamaConfig(**DECODER, rope_parameters=None if clip else LINEAR)
    config = transformers.LlavaConfig(
        vision_config=vision(**TOWER),
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_select_strategy="default" if clip else "full",
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.2 + (1 if "norm" in name and p.ndim == 1 else 0))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "new")
    raw, tensors = read(folder / "new")
    old_rope(raw["text_config"])
    if not clip:
        raw["text_config"]["rope_scaling"] = {"type": "linear", "factor": 4.0}
    tensors = rename(tensors, "vision_tower.", "vision_tower.vision_model.")
    tensors = {k: v for k, v in tensors.items() if ".head." not in k}  # mlx-vlm refuses these
    size = {"shortest_edge": SIDE} if clip else {"height": SIDE, "width": SIDE}
    image = {
        "image_processor_type": "CLIPImageProcessor" if clip else "SiglipImageProcessor",
        "size": size,
        "do_center_crop": clip,
        "crop_size": {"height": SIDE, "width": SIDE},
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": PATCH,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "image_token": "<image>",
        "num_additional_image_tokens": int(clip),
    }
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    write_folder(
        folder / "old",
        sentencepiece(),
        config=raw,
        preprocessor_config=image,
        processor_config=processor,
        tokenizer_config={**names, "tokenizer_class": "LlamaTokenizer"},
        special_tokens_map=names,
    )
    mx.save_safetensors(str(folder / "old/model.safetensors"), tensors, {"format": "pt"})
    return request.param, model, folder / "old"


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Tokens [1, L] around one picture, and its pixels [1, H, W, 3]."""
    rng = np.random.default_rng(1)
    words = rng.integers(3, 400, 12).tolist()
    count = (SIDE // PATCH) ** 2
    pixels = rng.standard_normal((1, SIDE, SIDE, 3)).astype(np.float32)
    return np.array([[1, *words[:4], *[IMAGE] * count, *words[4:]]]), pixels


def ours(folder: Path, dtype: str | None = None) -> tuple[mlxvlm.VLM, np.ndarray]:
    tokens, pixels = inputs()
    vlm = mlxvlm.load(folder, dtype=dtype)
    return vlm, np.array(vlm(tokens, [Picture([p]) for p in pixels]).astype(mx.float32))


def peers(folder: Path) -> np.ndarray:
    """mlx-vlm's own logits."""
    tokens, pixels = inputs()
    model: Any = mlx_vlm_utils.load_model(folder)
    out = model(mx.array(tokens), mx.array(pixels.transpose(0, 3, 1, 2)), None)
    return np.array(getattr(out, "logits", out).astype(mx.float32))


def reference(model: Any, folder: Path) -> np.ndarray:
    """transformers' float32 logits from mlx-vlm's tensors, dequantised here."""
    config, tensors = read(folder)
    block = config.get("quantization") or {}
    state = {}
    for key, value in tensors.items():
        if key.endswith((".scales", ".biases")):
            continue
        stem = key.removesuffix(".weight")
        if (scales := tensors.get(stem + ".scales")) is not None:
            own = block.get(stem)
            settings = {k: block[k] for k in ("group_size", "bits", "mode")}
            settings |= own if isinstance(own, dict) else {}
            if (biases := tensors.get(stem + ".biases")) is not None:
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            value = mx.dequantize(value, scales, biases, **settings)
        value = value.astype(mx.float32)
        if key.endswith("patch_embedding.weight"):
            value = value.transpose(0, 3, 1, 2)
        for old, new in (
            ("language_model.lm_head.", "lm_head."),
            ("language_model.model.", "model.language_model."),
            ("vision_tower.vision_model.", "model.vision_tower."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
        ):
            if key.startswith(old):
                key = new + key.removeprefix(old)
        state[key] = torch.tensor(np.array(value))
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and all(".head." in k for k in left.missing_keys)
    tokens, pixels = inputs()
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(tokens),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)),
        ).logits.numpy()


@pytest.mark.parametrize("name", CASES)
def test_converted(llava: Any, name: str, tmp_path: Path) -> None:
    kind, model, source = llava
    case, folder = CASES[name], tmp_path / "converted"
    mlx_vlm.convert(str(source), str(folder), **case)
    block = json.loads((folder / "config.json").read_text()).get("quantization")
    assert (block is not None) == case.get("quantize", False)

    vlm, found = ours(folder)
    if block:
        assert hasattr(vlm.language.model.layers[0].mlp.up_proj, "bits")
    wanted, theirs = reference(model, folder), peers(folder)
    assert np.abs(wanted).max() > 1
    # In float32 nothing but the order of sums is left. A table of floating blocks gives bfloat16
    # embeddings, and so rounds the picture's beside them.
    close = 1e-4 if "fp4" not in name else 0.1
    assert np.abs(ours(folder, "float32")[1] - wanted).max() < close
    if kind == "clip" and "dtype" not in case:
        assert np.abs(found - theirs).max() < 1e-5
    # As stored: no further from the truth than mlx-vlm, to rounding.
    assert rms(found - wanted) < 1.5 * rms(theirs - wanted) + 1e-5

    save(vlm, tmp_path / "ours")
    again, repeated = ours(tmp_path / "ours")
    assert np.array_equal(repeated, found)
    a, b = (dict(tree_flatten(m.parameters())) for m in (vlm, again))
    assert a.keys() == b.keys()
    assert all(a[n].dtype == b[n].dtype and mx.array_equal(a[n], b[n]).item() for n in a)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))
