"""LLaVA-UHD from its authors' layout: ids, features and logits of a float64 reference, training,
conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import read
from mlx.utils import tree_flatten
from PIL import Image
from reference import llama, normalised, uhd_embeddings, uhd_features, uhd_view
from uhd_folders import TOWER, numbers, write_uhd

import mlxvlm
from mlxvlm.config import ProjectorConfig
from mlxvlm.data.buckets import collate, group
from mlxvlm.data.samples import Sample
from mlxvlm.errors import ConfigError
from mlxvlm.projectors.spatial_resampler import SpatialResampler, _samples
from mlxvlm.prompts.vicuna import SYSTEM
from mlxvlm.train.losses import batch_loss, count
from mlxvlm.weights.convert import convert

SIZES = ((32, 32), (40, 30), (100, 30), (60, 64), (20, 97))
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_uhd(tmp_path_factory.mktemp("uhd"))


def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for size in SIZES
    ]


def parameters(module: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


def test_the_five_choices(folder: Path) -> None:
    config = mlxvlm.load(folder).config
    assert (config.tiling.type, config.tiling.max_tiles, config.tiling.rounding) == (
        "slices",
        7,
        "down",
    )
    assert (config.vision.positions, config.vision.vision_feature_layer) == ("bicubic", -2)
    assert (config.projector.type, config.tokens_per_view) == ("spatial_resampler", 9)
    assert (config.prompt.layout, config.prompt.merge) == ("vicuna_v1", "uhd")


@pytest.fixture(scope="module")
def vlm(folder: Path) -> Any:
    return mlxvlm.load(folder)


def test_features_and_projected_views(vlm: Any, folder: Path) -> None:
    weights = numbers(read(folder)[1])
    for picture in vlm.look(images()):
        (features,) = vlm.features([picture])
        (done,) = vlm.projected_encoder.encode([picture])
        for view, found, seen in zip(picture.views, features.views, done.views, strict=True):
            pixels = normalised(Image.fromarray(view), MEAN, STD)
            wanted = uhd_features(pixels, weights, TOWER)
            assert np.abs(wanted).max() > 1 and np.abs(np.array(found) - wanted).max() < 1e-4
            wanted = uhd_view(pixels, weights, TOWER)
            assert np.abs(wanted).max() > 1 and np.abs(np.array(seen) - wanted).max() < 1e-4


def test_ids_and_logits(vlm: Any, folder: Path) -> None:
    config, stored = read(folder)
    weights = numbers(stored)
    backend = vlm.tokenizer.backend
    words = backend.token_to_id(","), backend.token_to_id("<0x0A>")
    image_id = vlm.config.prompt.image_token_id
    assert image_id == config["vocab_size"]
    for shown in ([images()[0]], [images()[2]], images()[1:4]):
        turns = [{"role": "user", "content": "What is this?"}]
        prompt = vlm.tokenize(turns, shown)
        seen = [uhd_embeddings(image, weights, TOWER, words) for image in shown]
        head = [1, *backend.encode(f"{SYSTEM} USER: ", add_special_tokens=False).ids]
        found = prompt.tokens.tolist()
        assert found[: len(head)] == head
        slots = prompt.slots
        assert [length for _, length in slots] == [len(one) for one in seen]
        embeddings = weights["model.embed_tokens.weight"][
            [0 if token == image_id else token for token in found]
        ]
        for (start, length), one in zip(slots, seen, strict=True):
            own = prompt.tokens[start : start + length]
            text = own != image_id
            assert set(own[text].tolist()) <= set(words)
            expected = weights["model.embed_tokens.weight"][own[text]]
            assert np.array_equal(one[text], expected)
            embeddings[start : start + length] = one
        expected = llama(embeddings, weights, "model", config) @ weights["lm_head.weight"].T
        logits = np.array(vlm(prompt.tokens, prompt.pictures))[0]
        assert np.abs(expected).max() > 1 and np.abs(logits - expected).max() < 1e-4
    text = vlm.tokenize([{"role": "user", "content": "Only text"}])
    expected = llama(weights["model.embed_tokens.weight"][text.tokens], weights, "model", config)
    logits = np.array(vlm(text.tokens))[0]
    assert np.abs(logits - expected @ weights["lm_head.weight"].T).max() < 1e-4


def test_the_tower_may_lie_elsewhere(vlm: Any, tmp_path: Path) -> None:
    other = mlxvlm.load(write_uhd(tmp_path, inside=False))
    ours, theirs = parameters(vlm), parameters(other)
    assert all(mx.array_equal(x, theirs.pop(name)) for name, x in ours.items()) and not theirs


def test_conversion_loses_nothing(folder: Path, vlm: Any, tmp_path: Path) -> None:
    convert(folder, tmp_path / "ours")
    other = mlxvlm.load(tmp_path / "ours")
    assert other.config.to_dict() == vlm.config.to_dict()
    ours, theirs = parameters(vlm), parameters(other)
    assert all(mx.array_equal(x, theirs.pop(name)) for name, x in ours.items()) and not theirs
    # Of the folder's tensors all but the tower's last block and norm, which no feature sees.
    unseen = ("encoder.layers.2.", "post_layernorm.")
    kept = [name for name in read(folder)[1] if not any(part in name for part in unseen)]
    assert len(kept) == len(ours)


def test_two_steps_with_and_without_features(vlm: Any, folder: Path) -> None:
    """Of the projector, on pixels' features and on the same from the host, as of a cache."""
    pictures = vlm.look(images()[1:4])
    rows = []
    for number, shown in enumerate((pictures[:2], [], pictures[2:])):
        turns = [
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": f"It is {number}."},
        ]
        prompt = vlm.tokenize(turns, shown)
        names = [f"{number}.{i}" for i in range(len(shown))]
        cuts = [picture.cut for picture in shown]
        rows.append(Sample(prompt.tokens, prompt.supervised, names, slots=prompt.slots, cuts=cuts))
    batch = collate(group(rows, 0), 8)
    losses = {}
    for way in ("computed", "stored"):
        model = mlxvlm.load(folder)
        model.freeze()
        model.projector.unfreeze()
        model.train()
        losses[way] = []
        for _ in range(2):
            views = [v for one in model.encoder.encode(pictures) for v in one.views]
            if way == "stored":
                views = [mx.array(np.array(view)) for view in views]
            (_, parts), tree = nn.value_and_grad(model, batch_loss)(
                model, batch, views, {}, count([batch])
            )
            losses[way].append(parts["loss"].item())
            flat: Any = tree_flatten(tree)
            old = parameters(model)
            model.load_weights([(n, old[n] - 1e-4 * g) for n, g in flat], strict=False)
    assert losses["computed"] == losses["stored"]
    assert losses["computed"][1] < losses["computed"][0]


def test_a_query_sees_its_own_part_of_the_view_alone() -> None:
    mx.random.seed(0)
    config = ProjectorConfig("spatial_resampler", num_query_tokens=16, num_attention_heads=2)
    projector = SpatialResampler(config, 8, 32, 4)
    x = mx.random.normal((1, 12 * 12, 8))
    changed = np.array(x)
    changed[0, :12] += 5  # the first row of twelve
    a, b = (np.array(projector(mx.array(one), [(12, 12)]))[0] for one in (x, changed))
    moved = np.abs(a - b).max(axis=-1).reshape(4, 4) > 1e-5
    assert moved[0].all() and not moved[1:].any()
    # Half as many patches as windows, and many more: all of them have a say, each as much.
    for length in (1, 2, 4, 7, 24, 100):
        matrix = _samples(length, 4, 3)
        assert np.allclose(matrix.sum(axis=1), 1, atol=1e-6) or length < 4


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (1, 60), (24, 24), (31, 17)])
def test_any_grid_gives_as_many_finite_tokens(grid: tuple[int, int]) -> None:
    mx.random.seed(0)
    projector = SpatialResampler(ProjectorConfig("spatial_resampler"), 8, 32, 24)
    found = projector(mx.random.normal((2, grid[0] * grid[1], 8)), [grid] * 2)
    assert found.shape == (2, 144, 32) and mx.isfinite(found).all().item()


def test_what_it_cannot_take_is_refused() -> None:
    with pytest.raises(ConfigError, match="a square number for 'spatial_resampler': 81 or 100"):
        ProjectorConfig("spatial_resampler", num_query_tokens=96)
    with pytest.raises(ConfigError, match="queries pool the patches"):
        ProjectorConfig("spatial_resampler", pool="mean2")
    projector = SpatialResampler(ProjectorConfig("spatial_resampler"), 8, 32, 4)
    with pytest.raises(ConfigError, match="views of one grid"):
        projector(mx.zeros((2, 15, 8)))
