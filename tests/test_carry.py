"""Positions of a tower, and of a projector, carried to views of another size."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_vlm import tiny_config, tiny_vlm

from mlxvlm.config import ProjectorConfig
from mlxvlm.errors import ConfigError
from mlxvlm.model import VLM
from mlxvlm.vision.carry import resize_table
from mlxvlm.vision.positions import bicubic


def keys(d: float) -> float:
    """Keys' cubic of 1981 at a = -3/4, as he writes it."""
    d = abs(d)
    if d < 1:
        return 1.25 * d**3 - 2.25 * d**2 + 1
    return -0.75 * d**3 + 3.75 * d**2 - 6 * d + 3 if d < 2 else 0.0


@pytest.mark.parametrize(("old", "new"), [(27, 48), (4, 6), (24, 11), (3, 9), (2, 5), (1, 3)])
def test_a_table_is_interpolated_bicubically(old, new):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((1 + old * old, 3)).astype(np.float32)
    square = table[1:].reshape(old, old, 3).astype(np.float64)
    wanted = np.zeros((new, new, 3))
    for y in range(new):
        for x in range(new):
            down, across = ((i + 0.5) * old / new - 0.5 for i in (y, x))
            for r in range(int(np.floor(down)) - 1, int(np.floor(down)) + 3):
                for c in range(int(np.floor(across)) - 1, int(np.floor(across)) + 3):
                    share = keys(down - r) * keys(across - c)
                    at = min(max(r, 0), old - 1), min(max(c, 0), old - 1)
                    wanted[y, x] += share * square[at]
    found = np.array(resize_table(mx.array(table), old, new))
    assert (found[0] == table[0]).all()  # the class token's
    np.testing.assert_allclose(found[1:].reshape(new, new, 3), wanted, atol=1e-5)
    np.testing.assert_allclose(bicubic(old, new).sum(1), 1, atol=1e-6)


def test_the_same_size_changes_nothing():
    assert (bicubic(27, 27) == np.eye(27)).all()
    table = mx.random.normal((17, 5)).astype(mx.bfloat16)
    assert mx.array_equal(resize_table(table, 4, 4), table)


TOWERS = {
    "siglip_vision_model": {},
    "clip_vision_model": {
        "hidden_act": "quick_gelu",
        "vision_feature_select_strategy": "default",
    },
    "internvl_vision": {
        "hidden_act": "gelu",
        "vision_feature_norm": False,
        "vision_feature_select_strategy": "default",
    },
}
PROJECTORS = {
    "mlp": {},
    "attention": {"hidden_size": 32, "num_attention_heads": 2, "num_positions": 16},
    "c_abstractor": {"hidden_size": 24, "num_query_tokens": 9, "num_layers": 1},
    "resampler": {"hidden_size": 32, "num_attention_heads": 2, "num_query_tokens": 4},
}


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_a_model_takes_larger_views(kind, projector):
    config = tiny_config(projector=ProjectorConfig(type=projector, **PROJECTORS[projector]))
    config.vision = dataclasses.replace(config.vision, model_type=kind, **TOWERS[kind])
    vlm = VLM(config)
    before: dict[str, mx.array] = dict(tree_flatten(vlm.parameters()))
    vlm.resize_views(48)
    after: dict[str, mx.array] = dict(tree_flatten(vlm.parameters()))
    assert before.keys() == after.keys()
    changed = {name for name in after if not mx.array_equal(before[name], after[name])}
    tables = {name for name in after if "position_embedding" in name and "language" not in name}
    assert changed == tables and len(tables) == (
        2 if projector in ("attention", "c_abstractor") else 1
    )
    assert vlm.config.tiling.image_size == vlm.config.vision.image_size == 48
    features = vlm.features([np.zeros((60, 50, 3), np.uint8)])
    assert features[0].array.shape[:2] == (1, 36)
    shown = vlm.project(features)
    assert shown.shape == (vlm.config.tokens_per_view, 64)


def test_what_cannot_be_carried():
    vlm = tiny_vlm()
    with pytest.raises(ConfigError, match="must be at least vision.patch_size"):
        vlm.resize_views(4)
    nn.quantize(vlm.vision, 32, 8, class_predicate=lambda _, m: isinstance(m, nn.Linear))
    with pytest.raises(ConfigError, match="quantise afterwards"):
        vlm.resize_views(48)
