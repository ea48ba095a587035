"""LLaVA: logits equal transformers' in every layout, with both towers and both kinds of RoPE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mlx.core as mx  # noqa: E402
from checkpoints import LAYOUTS, rewrite  # noqa: E402
from PIL import Image  # noqa: E402

import mlxvlm  # noqa: E402
from mlxvlm import Picture  # noqa: E402

pytestmark = pytest.mark.parity

IMAGE = 99
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 30,
    "patch_size": 8,
}
DECODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 112,
}


def draw(model: Any) -> None:
    """Every parameter random, so that none can be dropped or mistaken unnoticed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.2 + (1 if "norm" in name and p.ndim == 1 else 0))


@pytest.fixture(scope="module", params=["siglip", "clip", "siglip-last", "clip-full", "qwen2"])
def llava(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    kind: str = request.param
    clip = kind.startswith("clip")
    vision = transformers.CLIPVisionConfig if clip else transformers.SiglipVisionConfig
    if kind == "qwen2":
        text = transformers.Qwen2Config(**DECODER)
    else:
        rope = LLAMA3 if kind.startswith("siglip") else None
        text = transformers.LlamaConfig(**DECODER, rope_parameters=rope)
    config = transformers.LlavaConfig(
        vision_config=vision(**TOWER),
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-1 if kind == "siglip-last" else -2,
        vision_feature_select_strategy="default" if kind == "clip" else "full",
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    draw(model)
    folder = tmp_path_factory.mktemp(kind)
    model.save_pretrained(folder)
    return kind, model, folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits(llava: Any, layout: str, tmp_path: Path) -> None:
    kind, model, folder = llava
    vlm = mlxvlm.load(rewrite(folder, tmp_path / layout, layout))
    count = vlm.config.tokens_per_view
    assert count == (10 if kind == "clip-full" else 9)
    rng = np.random.default_rng(1)
    pixels = rng.standard_normal((3, 30, 30, 3)).astype(np.float32)
    one = [IMAGE] * count
    words = rng.integers(0, 90, 12).tolist()
    rows = np.array([[*words[:4], *one, *words[4:7], *one, *words[7:]], words + one + [5] * count])
    with torch.no_grad():
        wanted = model(
            input_ids=torch.tensor(rows),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)),
        ).logits.numpy()
    found = np.array(vlm(rows, [Picture([p]) for p in pixels]))
    assert np.abs(wanted).max() > 1
    assert np.abs(found - wanted).max() < 1e-4, np.abs(found - wanted).max()
    assert vlm.config.language["model_type"] == ("qwen2" if kind == "qwen2" else "llama")


def test_without_rope_parameters_the_logits_differ(llava: Any, tmp_path: Path) -> None:
    """The check above would notice a RoPE that was read wrongly."""
    kind, _, folder = llava
    if not kind.startswith("siglip"):
        pytest.skip("plain RoPE")
    vlm = mlxvlm.load(rewrite(folder, tmp_path / "hub", "hub"))
    tokens = np.arange(40)[None] % 90
    before = vlm(tokens)
    plain = mlxvlm.load(rewrite(folder, tmp_path / "again", "hub"))
    from mlxvlm.language.load import build_language

    config = {**vlm.config.language, "rope_theta": 10000.0, "rope_scaling": None}
    language = build_language(config)
    language.update(plain.language.parameters())
    plain.language = language
    assert mx.abs(plain(tokens) - before).max().item() > 1e-2


@pytest.mark.parametrize("pad", (False, True))
def test_a_picture_goes_through_the_processor_of_the_file(tmp_path: Path, pad: bool) -> None:
    vision = transformers.CLIPVisionConfig(**{**TOWER, "image_size": 32})
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**DECODER),
        image_token_index=IMAGE,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    draw(model)
    model.save_pretrained(tmp_path / "t")
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    crop = {"height": 32, "width": 32}
    processor = LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size=crop, do_pad=pad)
    processor.save_pretrained(tmp_path / "t")
    vlm = mlxvlm.load(rewrite(tmp_path / "t", tmp_path / "m", "transformers5"))
    assert vlm.config.tiling.resize == ("pad" if pad else "crop")
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    ours = vlm.encoder.normalise([vlm.look([image])[0].views[0]])
    assert np.abs(np.array(ours).transpose(0, 3, 1, 2) - pixels.numpy()).max() < 1e-5
    rows = np.array([[1, *[IMAGE] * 16, 2, 3]])
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor(rows), pixel_values=pixels).logits.numpy()
    assert np.abs(np.array(vlm(rows, vlm.look([image]))) - wanted).max() < 1e-4
