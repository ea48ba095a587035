"""InternViT against transformers' InternVLVisionModel, small and large kind, at every layer."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.config import VisionConfig
from mlxvlm.vision.internvit import InternVit
from mlxvlm.weights.families import internvit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

KINDS = {
    "300M": VisionConfig(
        model_type="internvl_vision",
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        hidden_act="gelu",
        vision_feature_norm=False,
        vision_feature_select_strategy="default",
    )
}
KINDS["6B"] = dataclasses.replace(
    KINDS["300M"],
    hidden_size=60,
    num_attention_heads=5,
    norm_type="rms_norm",
    attention_bias=False,
    use_qk_norm=True,
)


def reference_of(config: VisionConfig):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "image_size", "patch_size", "hidden_act", "layer_norm_eps", "norm_type",
             "attention_bias", "use_qk_norm")  # fmt: skip
    model = transformers.InternVLVisionModel(
        transformers.InternVLVisionConfig(**{n: getattr(config, n) for n in names})
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            matrix = p.ndim in (2, 4)
            p.copy_(torch.randn(p.shape) * (p[0].numel() ** -0.5 if matrix else 0.5))
            if name.endswith("weight") and p.ndim == 1:
                p.add_(1)
    return model.eval()


def ours(config: VisionConfig, reference) -> InternVit:
    tower, weights = InternVit(config), {}
    for name, value in reference.state_dict().items():
        renamed = internvit.rename(name).removeprefix("vision.")
        moved = value.permute(0, 2, 3, 1) if value.ndim == 4 else value
        weights[renamed] = mx.array(moved.numpy())
    weights = tower.sanitize(weights)
    tower.load_weights([(n, w) for n, w in weights.items() if not tower.unused(n)], strict=True)
    return tower


@pytest.mark.parametrize("kind", KINDS)
def test_features_at_every_layer(kind):
    base = KINDS[kind]
    reference = reference_of(base)
    x = np.random.default_rng(0).uniform(-2, 2, (3, 56, 56, 3)).astype(np.float32)
    with torch.no_grad():
        out = reference(torch.from_numpy(x).permute(0, 3, 1, 2), output_hidden_states=True)
    assert len(out.hidden_states) == 5
    for layer in range(-5, 5):
        for select in ("full", "default"):
            config = dataclasses.replace(
                base, vision_feature_layer=layer, vision_feature_select_strategy=select
            )
            got = np.array(ours(config, reference)(mx.array(x)))
            want = out.hidden_states[layer][:, int(select == "default") :].numpy()
            assert got.shape == want.shape == (3, config.num_tokens, base.hidden_size)
            gap = np.abs(got - want).max()
            print(f"layer {layer}: max |difference| {gap:.1e} of {np.abs(want).max():.1f}")
            assert gap < 1e-5 * max(1.0, np.abs(want).max())
