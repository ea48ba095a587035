"""The encoder: normalisation, batches, dtypes, and an identity that moves when it must."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlxvlm.config import TilingConfig, VisionConfig
from mlxvlm.errors import ConfigError, PictureError
from mlxvlm.images.picture import Picture
from mlxvlm.vision.build import build_vision
from mlxvlm.vision.encoder import Encoder
from mlxvlm.vision.pooling import mean2

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)
CONFIG = VisionConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=30,
    patch_size=10,
    vision_feature_layer=-2,
    vision_use_head=True,
    image_mean=MEAN,
    image_std=STD,
)
TILING = TilingConfig(image_size=30)


def make(config: VisionConfig = CONFIG, tiling: TilingConfig = TILING, **options: Any) -> Encoder:
    """The same weights each time, as far as the config has the same tensors."""
    mx.random.seed(0)
    whole = build_vision(dataclasses.replace(CONFIG, model_type="siglip_vision_model"))
    tower = build_vision(config)
    weights = [(n, p) for n, p in tree_flatten(whole.parameters()) if not tower.unused(n)]
    tower.load_weights(weights, strict=False)
    mx.eval(tower.parameters())
    return Encoder(tower, config, tiling, **options)


def view(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (30, 30, 3), dtype=np.uint8)


def normalised(x: np.ndarray) -> np.ndarray:
    return ((x / 255 - np.array(MEAN)) / np.array(STD)).astype(np.float32)


def difference(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    return mx.abs(a - b).max().item()


def test_normalises_in_float32_then_casts():
    views = [view(0), view(1)]
    want = np.stack([normalised(v) for v in views])
    got = make().normalise(views)
    assert got.dtype == mx.float32
    np.testing.assert_allclose(np.array(got), want, atol=1e-6)
    half = make(dtype=mx.bfloat16).normalise(views)
    assert mx.array_equal(half, got.astype(mx.bfloat16))


def test_float_views_are_taken_as_normalised_and_order_is_kept():
    encoder = make()
    views: list[np.ndarray] = [view(0), normalised(view(1)), view(2), normalised(view(3)), view(4)]
    got = encoder.normalise(views)
    want = np.stack([v if v.dtype == np.float32 else normalised(v) for v in views])
    np.testing.assert_allclose(np.array(got), want, atol=1e-6)
    # float64 is another spelling of the same
    assert mx.array_equal(encoder.normalise([v.astype(np.float64) for v in views[1::2]]), got[1::2])


def test_features_are_the_towers_in_the_pictures_order():
    encoder = make()
    pictures = [
        Picture([view(0), normalised(view(1))], (1, 2), (60, 30), "aa"),
        Picture([]),
        Picture([normalised(view(2))], (1, 1), None, "bb"),
        Picture([view(3), view(4), view(5)], (3, 1)),
    ]
    got = encoder.encode(pictures)
    assert [len(f.views) for f in got] == [2, 0, 1, 3]
    assert [(f.grid, f.size, f.sha256) for f in got] == [
        (p.grid, p.size, p.sha256) for p in pictures
    ]
    flat = [v for f in got for v in f.views]
    for seed, features in enumerate(flat):
        assert features.shape == (encoder.tokens, encoder.width) == (9, 16)
        alone = encoder.vision(mx.array(normalised(view(seed)))[None])[0]
        assert difference(features, alone) < 1e-5
    assert got[0].array.shape == (2, 9, 16)
    backwards = encoder.encode(pictures[::-1])
    assert difference(backwards[0].array, got[3].array) < 1e-5
    assert encoder.encode([]) == []


def test_views_of_one_size_are_one_batch_and_sizes_do_not_mix(monkeypatch):
    encoder = make()
    seen = []

    def tower(pixels: mx.array) -> mx.array:
        # Any size passes here: the mean colour of a view stands for its features.
        seen.append(pixels.shape)
        return mx.broadcast_to(pixels.mean(axis=(1, 2))[:, None], (pixels.shape[0], 2, 3))

    monkeypatch.setattr(encoder, "run", tower)
    rng = np.random.default_rng(0)
    sizes = [(30, 30), (20, 40), (30, 30), (40, 20), (20, 40)]
    views = [rng.normal(size=(*s, 3)).astype(np.float32) for s in sizes]
    got = encoder.encode([Picture(views[:3]), Picture(views[3:])])
    assert sorted(seen) == [(1, 40, 20, 3), (2, 20, 40, 3), (2, 30, 30, 3)]
    for features, v in zip(got[0].views + got[1].views, views, strict=True):
        np.testing.assert_allclose(np.array(features[0]), v.mean((0, 1)), atol=1e-6)


def test_nothing_is_computed_before_it_is_asked_for(monkeypatch):
    encoder = make()

    def refuse(*_: Any) -> None:
        raise AssertionError("encode() evaluated something")

    for name in ("eval", "async_eval", "synchronize"):
        monkeypatch.setattr(mx, name, refuse)
    before = mx.get_active_memory()
    features = encoder.encode([Picture([view(i) for i in range(64)])])
    lazy = mx.get_active_memory() - before
    monkeypatch.undo()
    assert lazy <= 2 * 64 * view(0).nbytes  # the uint8 views themselves, and no float pixels
    mx.reset_peak_memory()
    mx.eval(features[0].views)
    assert mx.get_peak_memory() - before > 5 * 64 * view(0).nbytes


def test_looks_at_files_arrays_and_pictures(tmp_path):
    encoder = make()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    ready = Picture([view(0)])
    pictures = encoder.look([tmp_path / "a.png", np.asarray(image), ready])
    assert [p.size for p in pictures] == [(50, 20), (50, 20), None]
    assert pictures[2] is ready
    a, b, _ = encoder.encode(pictures)
    assert mx.array_equal(a.array, b.array)
    assert a.size == (50, 20) and a.sha256 == pictures[0].sha256 and len(a.sha256) == 64


def test_mean2_is_pooled_by_the_encoder():
    plain, pooled = make(), make(pool="mean2")
    assert (plain.tokens, pooled.tokens) == (9, 4)
    picture = Picture([view(0), view(1)])
    want = mean2(plain.encode([picture])[0].array, 3)
    assert difference(pooled.encode([picture])[0].array, want) < 1e-6


def test_bfloat16_is_finite_and_near_float32():
    picture = Picture([view(0), view(1)])
    exact = make().encode([picture])[0].array
    half = make(dtype=mx.bfloat16).encode([picture])[0].array
    assert half.dtype == mx.bfloat16
    assert mx.isfinite(half).all().item()
    a, b = exact.flatten(), half.astype(mx.float32).flatten()
    assert ((a * b).sum() / mx.sqrt((a * a).sum() * (b * b).sum())).item() > 0.999


def test_large_activations_stay_finite_in_bfloat16():
    encoder = make(dtype=mx.bfloat16)
    fc2 = encoder.vision.encoder.layers[0].mlp.fc2
    fc2.weight = fc2.weight * 1e6  # beyond float16's 65504, as real towers' outliers are
    features = encoder.encode([Picture([view(0)])])[0].array
    assert mx.isfinite(features).all().item()


def test_weights_loaded_later_are_cast():
    encoder = make(dtype=mx.bfloat16)
    weight = encoder.vision.post_layernorm.weight
    encoder.vision.load_weights(
        [("post_layernorm.weight", weight.astype(mx.float16))], strict=False
    )
    assert encoder.encode([Picture([view(0)])])[0].array.dtype == mx.bfloat16
    assert encoder.vision.post_layernorm.weight.dtype == mx.bfloat16


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ConfigError, match="float16 overflows"):
        make(dtype=mx.float16)
    with pytest.raises(ConfigError, match="not in int32"):
        make(dtype=mx.int32)
    with pytest.raises(ConfigError, match="'concat2'.*projector"):
        make(pool="concat2")
    with pytest.raises(ConfigError, match="fixed grid"):
        make(tiling=TilingConfig(image_size=32))
    with pytest.raises(PictureError, match=r"\[30, 30, 3\].*\[20, 30, 3\]"):
        make().encode([Picture([view(0)[:20]])])
    with pytest.raises(PictureError, match="int64"):
        make().encode([Picture([view(0), view(0).astype(np.int64)])])
    for shape in [(30, 30), (30, 30, 4), (30, 30, 1)]:
        with pytest.raises(PictureError, match=r"must be \[H, W, 3\]"):
            make().encode([Picture([np.zeros(shape, dtype=np.uint8)])])


# What each change of the encoder does to its identity: the fields that must move.
MOVES: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "layer": (dict(vision_feature_layer=-3), {}, {"vision_feature_layer", "sha256"}),
    "norm": (dict(vision_feature_norm=False), {}, {"vision_feature_norm", "sha256"}),
    "heads": (dict(num_attention_heads=4), {}, {"num_attention_heads"}),
    "act": (dict(hidden_act="gelu"), {}, {"hidden_act"}),
    "eps": (dict(layer_norm_eps=1e-5), {}, {"layer_norm_eps"}),
    "mean": (dict(image_mean=(0.5, 0.45, 0.4)), {}, {"image_mean"}),
    "std": (dict(image_std=(0.5, 0.27, 0.28)), {}, {"image_std"}),
    "dtype": ({}, dict(dtype=mx.bfloat16), {"dtype", "sha256"}),
    "pool": ({}, dict(pool="mean2"), {"pool"}),
    "resize": ({}, dict(tiling=TilingConfig(image_size=30, resize="crop")), {"tiling.resize"}),
    "resample": (
        {},
        dict(tiling=TilingConfig(image_size=30, resample="bilinear")),
        {"tiling.resample"},
    ),
    "background": (
        {},
        dict(tiling=TilingConfig(image_size=30, background=(0, 0, 0))),
        {"tiling.background"},
    ),
    "image_size": (
        dict(image_size=33),
        dict(tiling=TilingConfig(image_size=33)),
        {"image_size", "tiling.image_size"},
    ),
}


@pytest.mark.parametrize("change", MOVES)
def test_identity_moves_with(change):
    config, options, fields = MOVES[change]
    before, after = (
        make().identity(),
        make(dataclasses.replace(CONFIG, **config), **options).identity(),
    )
    assert set(before) == set(after)
    assert {name for name in before if before[name] != after[name]} == fields


def test_identity_moves_with_patch_size_and_class_token():
    # These have other tensors, so they are told apart by more than one field.
    small = make(dataclasses.replace(CONFIG, patch_size=15, vision_feature_layer=0)).identity()
    assert small["patch_size"] == 15
    clip = dataclasses.replace(
        CONFIG, model_type="clip_vision_model", vision_use_head=False, vision_feature_norm=False
    )
    mx.random.seed(0)
    tower = build_vision(clip)
    full = Encoder(tower, clip, TILING).identity()
    drop = dataclasses.replace(clip, vision_feature_select_strategy="default")
    dropped = Encoder(tower, drop, TILING).identity()
    assert {k for k in full if full[k] != dropped[k]} == {"vision_feature_select_strategy"}
    assert full["model_type"] == "clip_vision_model"


def flip_last_bit(p: mx.array) -> mx.array:
    kind = mx.uint16 if p.itemsize == 2 else mx.uint32
    bits = np.array(p.view(kind)).copy()
    bits.reshape(-1)[-1] ^= 1
    return mx.array(bits).view(p.dtype)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_identity_moves_with_each_bit_that_counts_and_with_no_other(dtype):
    encoder = make(dtype=dtype)
    before = encoder.identity()
    assert encoder.identity() == before
    count = {True: 0, False: 0}
    for name, p in tree_flatten(encoder.vision.parameters()):
        encoder.vision.load_weights([(name, flip_last_bit(p))], strict=False)
        used = encoder.vision.feeds_features(name)
        count[used] += 1
        assert (encoder.identity() != before) == used, name
        encoder.vision.load_weights([(name, p)], strict=False)
    assert encoder.identity() == before
    # Two blocks, embeddings and the norm count; the third block and the head do not.
    assert count == {True: 2 * 16 + 3 + 2, False: 16 + 11}


def test_identity_is_the_same_for_the_same_encoder_built_otherwise():
    before = make().identity()
    bare = make(dataclasses.replace(CONFIG, vision_use_head=False))
    assert bare.identity() == before  # without the tensors that it does not need
    assert make(dataclasses.replace(CONFIG, vision_feature_layer=2)).identity() == before
    assert json.loads(json.dumps(before)) == before
    # The digest is over the tensors as they compute: rounding first or later is one.
    rounded = make()
    rounded.vision.set_dtype(mx.bfloat16)
    late = Encoder(rounded.vision, CONFIG, TILING, dtype=mx.bfloat16).identity()
    assert late == make(dtype=mx.bfloat16).identity()


def test_the_digest_is_what_caches_on_disk_were_made_with():
    # Written out a second time: another order, header or byte would orphan every cache there is.
    config = dataclasses.replace(CONFIG, vision_use_head=False, vision_feature_layer=-2)
    encoder = make(config)
    digest = hashlib.sha256()
    for name, p in sorted(dict(tree_flatten(encoder.vision.parameters())).items()):
        shape = ", ".join(str(side) for side in p.shape)
        digest.update(f"{name} [{shape}] float32\n".encode() + np.array(p).tobytes())
    assert encoder.identity()["sha256"] == digest.hexdigest()


def test_many_views_go_through_in_batches(monkeypatch):
    from mlxvlm.vision import encoder as module

    encoder = make()
    pictures = [Picture([view(i)]) for i in range(7)]
    whole = encoder.encode(pictures)
    sizes = []
    run = encoder.run
    monkeypatch.setattr(module, "MOST_TOKENS", 3 * encoder.config.num_tokens)
    monkeypatch.setattr(encoder, "run", lambda x: (sizes.append(len(x)), run(x))[1])
    parts = encoder.encode(pictures)
    assert sizes == [3, 3, 1]
    for one, other in zip(parts, whole, strict=True):
        assert difference(one.array, other.array) < 1e-6
