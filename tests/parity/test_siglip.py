"""SigLIP against transformers: features, scores and gradients of tiny random models."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxvlm.config import VisionConfig
from mlxvlm.vision.siglip import Siglip, SiglipText, SiglipTextConfig, SiglipVision

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

VISION = VisionConfig(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=62,
    patch_size=14,
)  # a grid of 4 and 6 pixels unused
TEXT = SiglipTextConfig(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=16,
    projection_size=48,
)
SHARED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def draw(model, seed: int):
    """Every parameter, biases and norms too, so that none can be dropped unnoticed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * (0.5 if p.ndim < 2 else p[0].numel() ** -0.5))
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return model.eval()


def to_mlx(state: dict) -> list[tuple[str, mx.array]]:
    """Tensors of one tower in our layout."""
    out = []
    for name, value in state.items():
        if value.is_floating_point():
            value = value.detach()
            if name.endswith("patch_embedding.weight"):
                value = value.permute(0, 2, 3, 1)
            out.append((name.removeprefix("vision_model."), mx.array(value.numpy())))
    return out


def reference_vision(config: VisionConfig = VISION):
    names = (*SHARED, "image_size", "patch_size")
    theirs = transformers.SiglipVisionConfig(**{n: getattr(config, n) for n in names})
    return draw(transformers.SiglipVisionModel(theirs), 0)


def ours(config: VisionConfig, reference) -> SiglipVision:
    tower = SiglipVision(config)
    weights = to_mlx(reference.state_dict())
    tower.load_weights([(n, v) for n, v in weights if not tower.unused(n)], strict=True)
    return tower


def pixels(n: int, size: int = VISION.image_size) -> np.ndarray:
    return np.random.default_rng(n).uniform(-1, 1, (n, size, size, 3)).astype(np.float32)


def to_torch(x: np.ndarray):
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def assert_near(got: mx.array, want, limit: float = 1e-5) -> None:
    want = want.detach().numpy()
    assert got.shape == want.shape
    gap = np.abs(np.array(got) - want).max() / max(1.0, np.abs(want).max())
    print(f"max |difference| {gap:.1e}, of values up to {np.abs(want).max():.2f}")
    assert gap < limit


def test_features_at_every_layer_head_and_norm():
    reference = reference_vision()
    x = pixels(3)
    with torch.no_grad():
        want = reference(to_torch(x), output_hidden_states=True)
    for layer in range(-5, 5):
        config = dataclasses.replace(VISION, vision_feature_layer=layer, vision_feature_norm=False)
        assert_near(ours(config, reference)(mx.array(x)), want.hidden_states[layer])
    tower = ours(dataclasses.replace(VISION, vision_use_head=True), reference)
    assert_near(tower(mx.array(x)), want.last_hidden_state)
    assert_near(tower.pooled(mx.array(x)), want.pooler_output)


def test_text():
    names = (*SHARED, "vocab_size", "max_position_embeddings", "projection_size")
    theirs = transformers.SiglipTextConfig(**{n: getattr(TEXT, n) for n in names})
    reference = draw(transformers.SiglipTextModel(theirs), 1)
    text = SiglipText(TEXT)
    weights = [(n.removeprefix("text_model."), v) for n, v in to_mlx(reference.state_dict())]
    text.load_weights(weights, strict=True)
    for length in (1, 9, 16):
        ids = np.random.default_rng(length).integers(0, 99, (5, length))
        with torch.no_grad():
            want = reference(torch.from_numpy(ids)).pooler_output
        assert_near(text(mx.array(ids)), want)


def test_scores_with_a_text_tower_of_another_width():
    names = (*SHARED, "image_size", "patch_size")
    text_names = (*SHARED, "vocab_size", "max_position_embeddings", "projection_size")
    theirs = transformers.SiglipConfig(
        vision_config={n: getattr(VISION, n) for n in names},
        text_config={n: getattr(TEXT, n) for n in text_names},
    )
    reference = draw(transformers.SiglipModel(theirs), 2)
    model = Siglip(VISION, TEXT)
    weights = []
    for name, value in reference.state_dict().items():
        if value.is_floating_point():
            moved = value.permute(0, 2, 3, 1) if name.endswith("patch_embedding.weight") else value
            weights.append((name, mx.array(moved.numpy())))
    model.load_weights(weights, strict=True)
    x, ids = pixels(3), np.random.default_rng(0).integers(0, 99, (4, 16))
    with torch.no_grad():
        want = reference(input_ids=torch.from_numpy(ids), pixel_values=to_torch(x))
    assert_near(model.logits(mx.array(x), mx.array(ids)), want.logits_per_image)
    scores = model.scores(mx.array(x), mx.array(ids))
    assert scores.shape == (3, 4)
    assert_near(scores, torch.sigmoid(want.logits_per_image))


def test_siglip_2_at_a_fixed_resolution_is_the_same_model(tmp_path):
    # google/siglip2-*-patch16-*: model_type "siglip", a vocabulary of 256k, 64 positions.
    theirs = transformers.SiglipConfig(
        vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=2, image_size=64, patch_size=16),
        text_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, vocab_size=300, max_position_embeddings=64),
    )  # fmt: skip
    reference = draw(transformers.SiglipModel(theirs), 3)
    reference.save_pretrained(tmp_path)
    stored = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(stored, dict)
    key = "vision_model.embeddings.patch_embedding.weight"
    stored[key] = stored[key].transpose(0, 2, 3, 1)
    vision = VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
    )
    text = SiglipTextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = Siglip(vision, text)
    model.load_weights(list(stored.items()), strict=True)
    x, ids = pixels(2, 64), np.random.default_rng(0).integers(0, 300, (3, 64))
    with torch.no_grad():
        want = reference(input_ids=torch.from_numpy(ids), pixel_values=to_torch(x))
    assert_near(model.scores(mx.array(x), mx.array(ids)), torch.sigmoid(want.logits_per_image))


@pytest.mark.parametrize("part", ["features", "pooled"])
def test_gradients_of_every_weight(part):
    reference = reference_vision()
    tower = ours(dataclasses.replace(VISION, vision_use_head=True), reference)
    x = pixels(2)
    out = reference(to_torch(x))
    value = out.last_hidden_state if part == "features" else out.pooler_output
    weight = torch.sin(torch.arange(value.numel(), dtype=torch.float32)).reshape(value.shape)
    loss = (value.square() * weight).mean()
    loss.backward()

    def ours_loss(pixels: mx.array) -> mx.array:
        value = tower(pixels) if part == "features" else tower.pooled(pixels)
        return (value.square() * mx.array(weight.numpy())).mean()

    got, gradients = nn.value_and_grad(tower, ours_loss)(mx.array(x))
    assert abs(got.item() - loss.item()) < 1e-6
    want = dict(to_mlx({n: p.grad for n, p in reference.named_parameters() if p.grad is not None}))
    found = dict(tree_flatten(gradients))
    assert set(want) == {n for n in found if part == "pooled" or tower.feeds_features(n)}
    largest = max(np.abs(np.array(g)).max() for g in want.values())
    gaps = {n: np.abs(np.array(found[n]) - np.array(g)).max() / largest for n, g in want.items()}
    worst = max(gaps, key=lambda n: gaps[n])
    print(f"gradients differ by up to {gaps[worst]:.1e} of the largest ({largest:.2e}), {worst}")
    assert gaps[worst] < 1e-5
