"""Views of any grid: transformers' Idefics2 tower, and torch's bicubic resizing of positions."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mlx.core as mx  # noqa: E402
from transformers.models.idefics2.configuration_idefics2 import (  # noqa: E402
    Idefics2VisionConfig,
)
from transformers.models.idefics2.modeling_idefics2 import (  # noqa: E402
    Idefics2VisionTransformer,
)

from mlxvlm.config import VisionConfig  # noqa: E402
from mlxvlm.vision.build import build_vision  # noqa: E402
from mlxvlm.vision.positions import buckets, place  # noqa: E402

pytestmark = pytest.mark.parity

FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
}


def test_the_tower_is_idefics2s() -> None:
    config = Idefics2VisionConfig(**FIELDS, image_size=80)
    theirs = Idefics2VisionTransformer(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    ours = build_vision(
        VisionConfig(**FIELDS, image_size=32, positions="buckets", position_grid=10)
    )
    weights = []
    for name, value in theirs.state_dict().items():
        array = value.numpy()
        if name.endswith("patch_embedding.weight"):
            array = array.transpose(0, 2, 3, 1)
        weights.append((name, mx.array(array)))
    ours.load_weights(weights)
    rng = np.random.default_rng(0)
    for rows, columns in ((1, 1), (4, 4), (3, 7), (10, 10), (12, 2), (1, 40)):
        pixels = rng.normal(size=(2, 8 * rows, 8 * columns, 3)).astype(np.float32)
        with torch.no_grad():
            out = theirs(torch.tensor(pixels.transpose(0, 3, 1, 2)))
        found = np.array(ours(mx.array(pixels)))
        wanted = out.last_hidden_state.numpy()
        assert np.abs(wanted).max() > 0.1
        assert np.abs(found - wanted).max() < 1e-4, (rows, columns)


def test_shares_are_float32s() -> None:
    """The division of i by the grid, in float32, finds the same entries as exact fractions."""
    edges = torch.arange(1 / 70, 1.0, 1 / 70)
    for n in range(1, 400):
        shares = torch.clamp(torch.arange(n, dtype=torch.float32) / n, max=1 - 1e-6)
        wanted = torch.bucketize(shares, edges, right=True).numpy()
        assert np.array_equal(buckets(70, (1, n)), wanted), n


@pytest.mark.parametrize("grid", [(4, 4), (7, 3), (1, 1), (12, 30)])
def test_a_table_is_resized_as_torch_does(grid: tuple[int, int]) -> None:
    table = np.random.default_rng(0).normal(size=(36, 5)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(
        torch.tensor(table.reshape(1, 6, 6, 5).transpose(0, 3, 1, 2)), size=grid, mode="bicubic"
    )
    found = np.array(place(mx.array(table), "bicubic", grid))
    assert np.abs(found - wanted[0].permute(1, 2, 0).reshape(-1, 5).numpy()).max() < 1e-5
