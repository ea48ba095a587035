"""Views of many shapes: positions, towers, features, projections, training, what is refused."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from tiny_vlm import sliced_config, sliced_vlm, tiny_config, tiny_vlm

from mlxvlm.config import ProjectorConfig, TilingConfig, VisionConfig
from mlxvlm.data.buckets import collate, group
from mlxvlm.data.samples import Sample
from mlxvlm.errors import ConfigError, PictureError, PromptError
from mlxvlm.grids import view_grids
from mlxvlm.images.picture import Cut, Features, Picture
from mlxvlm.merge import visual_tokens
from mlxvlm.train.losses import batch_loss, count
from mlxvlm.vision.build import build_vision
from mlxvlm.vision.encoder import Encoder
from mlxvlm.vision.positions import bicubic, buckets, place

SIZES = ((100, 30), (30, 30), (20, 50), (64, 64))
CLIP = VisionConfig(
    model_type="clip_vision_model",
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
    vision_feature_select_strategy="default",
    positions="bicubic",
)


def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for size in SIZES
    ]


def test_a_patch_has_the_position_of_its_share_of_the_view():
    for grid in ((1, 1), (3, 7), (10, 10), (13, 4), (250, 1)):
        found = buckets(10, grid).reshape(grid)
        for i in range(grid[0]):
            for j in range(grid[1]):
                shares = Fraction(i, grid[0]), Fraction(j, grid[1])
                row, column = (sum(Fraction(k, 10) <= s for k in range(1, 10)) for s in shares)
                assert found[i, j] == 10 * row + column
    table = mx.random.normal((100, 6))
    assert mx.array_equal(place(table, "buckets", (10, 10)), table)
    assert mx.array_equal(place(table, "buckets", (1, 2)), table[mx.array([0, 5])])


def test_a_resized_table_is_the_bicubic_curve_through_it():
    assert np.array_equal(bicubic(7, 7), np.eye(7, dtype=np.float32))
    matrix = bicubic(9, 4)
    assert np.allclose(matrix.sum(axis=1), 1, atol=1e-6)
    # Of torch's interpolate(mode="bicubic") from [0, 1, 8, 27] to 3 and to 6.
    cubes = np.array([0, 1, 8, 27], np.float32)
    assert np.allclose(bicubic(4, 3) @ cubes, [0.02199036, 2.8125, 24.39467812], atol=1e-5)
    wanted = [-0.08680558, -0.15625, 1.76157236, 5.36342523, 18.15625, 28.64930534]
    assert np.allclose(bicubic(4, 6) @ cubes, wanted, atol=1e-5)
    rows = mx.array(np.repeat(cubes, 4)[:, None])  # 4 x 4, each row a constant
    found = np.array(place(rows, "bicubic", (3, 2))).reshape(3, 2)
    assert np.allclose(found, found[:, :1]) and np.allclose(found[:, 0], bicubic(4, 3) @ cubes)


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_a_view_has_the_same_features_alone_and_among_others(kind):
    config = sliced_config().vision if kind == "siglip" else CLIP
    mx.random.seed(0)
    encoder = Encoder(build_vision(config), config, sliced_config().tiling)
    pictures = encoder.look(images())
    together = encoder.encode(pictures)
    for picture, features in zip(pictures, together, strict=True):
        assert [len(v) for v in features.views] == [
            v.shape[0] // 8 * (v.shape[1] // 8) for v in picture.views
        ]
        for view, found in zip(picture.views, features.views, strict=True):
            (alone,) = encoder.encode([Picture([view])])
            assert mx.allclose(alone.views[0], found, atol=1e-5)
            assert encoder.shape_of(view.shape) == found.shape
    # What stands where matters.
    view = pictures[0].views[0]
    (other,) = encoder.encode([Picture([np.flip(view, 1)])])
    assert not mx.allclose(other.views[0].sum(0), together[0].views[0].sum(0), atol=1e-3)


def test_where_each_view_lies_follows_from_the_cut():
    vlm = sliced_vlm()
    for picture in vlm.look(images()):
        grids = view_grids(vlm.config.tiling, [picture.cut])
        assert [(v.shape[0] // 8, v.shape[1] // 8) for v in picture.views] == grids


def prompt_of(vlm, *shown):
    counts = [visual_tokens(vlm.config, picture.cut) for picture in shown]
    image = vlm.config.prompt.image_token_id
    return np.array([65, *[image] * sum(counts), 66, 67], np.int32)


def test_pictures_features_and_projected_ones_give_the_same_logits():
    vlm = sliced_vlm()
    pictures = vlm.look(images())
    tokens = prompt_of(vlm, *pictures)
    want = np.array(vlm(tokens, pictures))
    features = vlm.features(pictures)
    assert np.abs(np.array(vlm(tokens, features)) - want).max() < 1e-4
    host = [
        Features([np.array(v) for v in f.views], f.grid, f.size, projected=f.projected)
        for f in features
    ]
    assert np.abs(np.array(vlm(tokens, [pictures[0], *host[1:]])) - want).max() < 1e-4
    done = vlm.projected_encoder.encode(pictures)
    assert done[0].views[0].shape == (4, 64)
    assert np.abs(np.array(vlm(tokens, done)) - want).max() < 1e-4
    # Rows of a batch are those alone; one has text only.
    rows = np.zeros((3, len(tokens)), np.int32)
    rows[0] = tokens
    rows[1, :3] = 65, 66, 67
    short = prompt_of(vlm, pictures[2])
    rows[2, : len(short)] = short
    found = np.array(vlm(rows, [*pictures, pictures[2]]))
    assert np.abs(found[0] - want[0]).max() < 1e-4
    assert np.abs(found[1, :3] - np.array(vlm(rows[1:2, :3]))[0]).max() < 1e-4
    alone = np.array(vlm(short, [pictures[2]]))[0]
    assert np.abs(found[2, : len(short)] - alone).max() < 1e-4


def test_views_of_no_tilings_making_are_taken_as_they_are():
    vlm = sliced_vlm()
    rng = np.random.default_rng(1)
    views = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((8, 40), (33, 25))]
    picture = Picture(views)
    (features,) = vlm.features([picture])
    assert features.grids == [(1, 5), (4, 3)] and [len(v) for v in features.views] == [5, 12]
    tokens = prompt_of(vlm, picture)
    found = np.array(vlm(tokens, [picture]))
    assert np.isfinite(found).all() and np.abs(np.array(vlm(tokens, [features])) - found).max() == 0
    assert vlm.projected_encoder.encode([picture])[0].views[1].shape == (4, 64)


def test_features_that_do_not_fit_are_refused():
    vlm = sliced_vlm()
    (picture,) = vlm.look(images()[:1])
    (features,) = vlm.features([picture])
    tokens = prompt_of(vlm, picture)
    features.views[1] = features.views[1][:-1]
    with pytest.raises(PromptError, match="another encoder's"):
        vlm(tokens, [features])
    with pytest.raises(PictureError, match="size and grid"):
        vlm(tokens, [Features(vlm.features([picture])[0].views, picture.grid)])
    with pytest.raises(PictureError, match="size and grid"):
        view_grids(vlm.config.tiling, [Cut(2, (2, 2), (100, 30))])
    fixed = tiny_vlm(tiny_config())
    two = Features([mx.zeros((16, 32)), mx.zeros((12, 32))])
    with pytest.raises(PromptError, match="all of one size"):
        fixed(np.array([fixed.config.prompt.image_token_id] * 32), [two])
    with pytest.raises(PictureError, match="at least 8 pixels"):
        vlm.features([Picture([np.zeros((4, 30, 3), np.uint8)])])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vision": tiny_config().vision}, "grid is fixed"),
        ({"projector": ProjectorConfig("mlp")}, "'mlp' cannot take: choose resampler"),
        ({"projector": ProjectorConfig("c_abstractor", num_query_tokens=4)}, "choose resampler"),
        ({"projector": ProjectorConfig("resampler", pool="mean2")}, "one square grid"),
        ({"tiling": TilingConfig("slices", 32)}, "tiling.patch_size"),
    ],
)
def test_what_takes_one_shape_only_refuses_slices(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        sliced_config(**changes)


def test_an_encoder_alone_refuses_them_too():
    config = sliced_config()
    with pytest.raises(ConfigError, match="one square grid"):
        Encoder(build_vision(config.vision), config.vision, config.tiling, pool="mean2")
    with pytest.raises(ConfigError, match="'default' for CLIP"):
        Encoder(
            build_vision(CLIP),
            dataclasses.replace(CLIP, vision_feature_select_strategy="full"),
            config.tiling,
        )
    with pytest.raises(ConfigError, match="must be 'fixed' for internvl_vision"):
        dataclasses.replace(config.vision, model_type="internvl_vision")
    with pytest.raises(ConfigError, match="position_grid"):
        dataclasses.replace(config.vision, positions="fixed")


def test_a_table_of_another_grid_serves_squares():
    """Positions of 4 x 4 patches for views of 6 x 6, all of one size: any projector takes them."""
    tower = dataclasses.replace(
        tiny_config().vision, image_size=48, positions="bicubic", position_grid=4
    )
    vlm = tiny_vlm(tiny_config(vision=tower, tiling=TilingConfig(image_size=48)))
    assert vlm.vision.embeddings.position_embedding.weight.shape == (16, 32)
    (features,) = vlm.features(images()[:1])
    assert features.array.shape == (1, 36, 32) and vlm.config.tokens_per_view == 36


@pytest.mark.parametrize("checkpointed", [False, True])
def test_losses_and_gradients_are_the_same_from_pixels_and_features(checkpointed):
    vlm = sliced_vlm()
    pictures = vlm.look(images())
    samples = []
    for number, shown in enumerate((pictures[:2], pictures[2:])):
        tokens = prompt_of(vlm, *shown)
        learnt = np.arange(len(tokens)) >= len(tokens) - 2
        cuts = [picture.cut for picture in shown]
        samples.append(Sample(tokens, learnt, [str(number)] * 2, cuts=cuts))
    batch = collate(group(samples, 0), 8)
    found = {}
    for way in ("pixels", "features"):
        if way == "pixels":
            views = vlm.encoder.pixels(pictures)
        else:
            views = [v for one in vlm.features(pictures) for v in one.views]
        vlm.train()
        (_, parts), tree = nn.value_and_grad(vlm, batch_loss)(
            vlm, batch, views, {}, count([batch]), checkpointed
        )
        vlm.eval()
        found[way] = parts["loss"].item(), dict(tree_flatten(tree))
    assert found["pixels"][0] == pytest.approx(found["features"][0], abs=1e-5)
    for name, gradient in found["features"][1].items():
        if not name.startswith("vision."):
            # Bytes are normalised in the patches' weights, pixels before: other roundings.
            off = mx.abs(gradient - found["pixels"][1][name]).max().item()
            assert off < 1e-4 * max(1, mx.abs(gradient).max().item()), name
    table = found["pixels"][1]["vision.embeddings.position_embedding.weight"]
    assert mx.abs(table).max().item() > 1e-5
