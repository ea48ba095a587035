"""CLIP's vision tower against transformers, at every layer."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.config import VisionConfig
from mlxvlm.vision.clip import ClipVision

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

CONFIG = VisionConfig(
    model_type="clip_vision_model",
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=62,
    patch_size=14,
    layer_norm_eps=1e-5,
    hidden_act="quick_gelu",
    vision_feature_layer=-2,
    vision_feature_norm=False,
    vision_feature_select_strategy="default",
)


def make_reference(config: VisionConfig):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "image_size", "patch_size", "hidden_act", "layer_norm_eps")  # fmt: skip
    model = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**{n: getattr(config, n) for n in names})
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * (0.5 if p.ndim < 2 else p[0].numel() ** -0.5))
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return model.eval()


def ours(config: VisionConfig, reference) -> ClipVision:
    tower, weights = ClipVision(config), []
    for name, value in reference.state_dict().items():
        name = name.removeprefix("vision_model.")
        if value.is_floating_point() and not tower.unused(name):
            moved = value.permute(0, 2, 3, 1) if name.endswith("patch_embedding.weight") else value
            weights.append((name, mx.array(moved.numpy())))
    tower.load_weights(weights, strict=True)
    return tower


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])  # OpenAI's; OpenCLIP's
def test_features_at_every_layer(act):
    base = dataclasses.replace(CONFIG, hidden_act=act)
    reference = make_reference(base)
    x = np.random.default_rng(0).uniform(-2, 2, (3, 62, 62, 3)).astype(np.float32)
    with torch.no_grad():
        out = reference(torch.from_numpy(x).permute(0, 3, 1, 2), output_hidden_states=True)
    for layer in range(-5, 5):
        for select in ("full", "default"):
            config = dataclasses.replace(
                base, vision_feature_layer=layer, vision_feature_select_strategy=select
            )
            got = np.array(ours(config, reference)(mx.array(x)))
            want = out.hidden_states[layer][:, int(select == "default") :].numpy()
            assert got.shape == want.shape == (3, config.num_tokens, 48)
            gap = np.abs(got - want).max()
            print(f"layer {layer}: max |difference| {gap:.1e} of {np.abs(want).max():.1f}")
            assert gap < 1e-5 * max(1.0, np.abs(want).max())
