"""SigLIP-So400m/14-384 against transformers at its real size: 27 layers, 413 M weights."""

from __future__ import annotations

import time

import mlx.core as mx
import numpy as np
import pytest

from mlxvlm.config import VisionConfig
from mlxvlm.vision.siglip import SiglipVision

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.slow]


def test_so400m_patch14_384():
    config = VisionConfig(vision_use_head=True)
    theirs = transformers.SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    torch.manual_seed(0)
    reference = transformers.SiglipVisionModel(theirs).eval()
    with torch.no_grad():
        # Each part adds to the stream, and every bias counts; activations stay near 1.
        for name, p in reference.named_parameters():
            if p.ndim < 2:
                p.normal_(float("norm" in name and "weight" in name), 0.1)
            elif "position_embedding" in name:
                p.normal_(0, 0.5)
            else:
                p.normal_(0, p[0].numel() ** -0.5)
    x = np.random.default_rng(0).uniform(-1, 1, (1, 384, 384, 3)).astype(np.float32)
    start = time.perf_counter()
    with torch.no_grad():
        out = reference(torch.from_numpy(x).permute(0, 3, 1, 2))
    theirs_s = time.perf_counter() - start

    tower = SiglipVision(config)
    weights = []
    for name, value in reference.state_dict().items():
        if value.is_floating_point():
            moved = value.permute(0, 2, 3, 1) if name.endswith("patch_embedding.weight") else value
            weights.append((name.removeprefix("vision_model."), mx.array(moved.numpy())))
    tower.load_weights(weights, strict=True)
    start = time.perf_counter()
    features = tower(mx.array(x))
    mx.eval(features)
    ours_s = time.perf_counter() - start
    pooled = tower.head(features)  # these are the last block's after the norm

    want = out.last_hidden_state.numpy()
    assert features.shape == want.shape == (1, 729, 1152)
    scale = want.std()
    assert 0.3 < scale < 3  # so that 1e-4 means something
    # Tokens differ from each other, so that a mix-up of places would show.
    assert want.std(axis=1).mean() > 0.3 * scale
    gap = np.abs(np.array(features) - want).max()
    head_gap = np.abs(np.array(pooled) - out.pooler_output.numpy()).max()
    print(
        f"features: max |difference| {gap:.1e} at scale {scale:.2f}; head {head_gap:.1e}; "
        f"{ours_s:.1f} s, torch {theirs_s:.1f} s"
    )
    assert gap <= 1e-4
    assert head_gap <= 1e-4 * max(1.0, np.abs(out.pooler_output.numpy()).max())
