"""A small CLIP tower that has seen the drawn things, at 36 pixels: what MM1.5 starts from, tiny.

CLIP's own training needs captions by the million. Here the generator knows what it drew, and a
throw-away head has each patch name its thing's shape and colour, and how far away its edges are, in
patches and in the view. The windows are as near and as far as the tiles and wholes of the model to
come, which takes 48 pixels: its positions are interpolated by `mlxvlm build --image-size 48`.

    python -m examples.grounding.tower --out runs/grounding/tower
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from examples.grounding.scenes import HELD_OUT, make, picture
from examples.shapes.drawing import box
from examples.shapes.encoder import fit, report
from examples.shapes.world import COLORS, SHAPES, SIZE, Box, Scene
from mlxvlm.config import VisionConfig
from mlxvlm.vision.clip import ClipVision

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CONFIG = VisionConfig(
    model_type="clip_vision_model",
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=36,
    patch_size=6,
    layer_norm_eps=1e-5,
    hidden_act="quick_gelu",
    vision_feature_layer=-1,
    vision_feature_norm=True,
    vision_feature_select_strategy="default",
    image_mean=CLIP_MEAN,
    image_std=CLIP_STD,
)
WINDOW = (34.0, 80.0)  # sides of what a view shows, in pixels of the picture
NEAR = 17  # half patches that an edge may be away, either way
BINS = 24  # of a view's side
GROUPS = (1 + len(SHAPES), 1 + len(COLORS), *[NEAR] * 4, *[BINS] * 4)


class Teacher(nn.Module):
    """pixels [N, S, S, 3] -> [N, patches, classes of all groups]"""

    def __init__(self) -> None:
        super().__init__()
        self.tower = ClipVision(CONFIG)
        self.head = nn.Linear(CONFIG.hidden_size, sum(GROUPS))

    def __call__(self, pixels: mx.array) -> mx.array:
        return self.head(self.tower(pixels))


def labels(scene: Scene, window: Box) -> np.ndarray:
    """int32 [patches, groups] of a window of a scene; a patch shows the thing whose box holds its
    middle, and 0 everywhere else."""
    grid = CONFIG.grid
    left, top, right, _ = window
    side = right - left
    out = np.zeros((grid * grid, len(GROUPS)), np.int32)
    for thing in scene.things:
        edges = [(v - at) / side for v, at in zip(box(thing), (left, top) * 2, strict=True)]
        for number in range(grid * grid):
            y, x = ((n + 0.5) / grid for n in divmod(number, grid))
            if not (edges[0] <= x <= edges[2] and edges[1] <= y <= edges[3]):
                continue
            away = [(e - m) * grid for e, m in zip(edges, (x, y) * 2, strict=True)]
            near = [min(max(round(2 * a) + NEAR // 2, 0), NEAR - 1) for a in away]
            place = [min(max(int(e * BINS), 0), BINS - 1) for e in edges]
            kind = [1 + SHAPES.index(thing.shape), 1 + list(COLORS).index(thing.color)]
            out[number] = [*kind, *near, *place]
    return out


def batches(count: int, start: int = 10_000_000) -> Iterator[tuple[mx.array, mx.array]]:
    """Normalised windows [count, S, S, 3] and labels, four windows a scene, without end; the seeds
    are far from those that the model is trained and asked on."""
    rng = random.Random("windows")
    while True:
        shown, wanted = [], []
        for at in range(start, start + count // 4):
            scene = make(at)
            image = picture(scene)
            for _ in range(4):
                side = rng.uniform(*WINDOW)
                left, top = (rng.uniform(0, SIZE - side) for _ in "xy")
                window = (left, top, left + side, top + side)
                view = image.resize((CONFIG.image_size,) * 2, box=window)
                shown.append(np.asarray(view, np.float32) / 255)
                wanted.append(labels(scene, window))
        start += count // 4
        pixels = (np.stack(shown) - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
        yield mx.array(pixels.astype(np.float32)), mx.array(np.stack(wanted))


def loss(model: Teacher, pixels: mx.array, wanted: mx.array) -> mx.array:
    """Cross-entropy of what is there, and of where it is for patches that show a thing."""
    logits = model(pixels)
    there = (wanted[..., 0] > 0).astype(mx.float32)
    weight = mx.where(wanted[..., 0] > 0, 1.0, 0.3)
    total, at = mx.array(0.0), 0
    for number, classes in enumerate(GROUPS):
        ce = nn.losses.cross_entropy(logits[..., at : at + classes], wanted[..., number])
        w = weight if number < 2 else there
        total = total + (1.0 if number < 2 else 0.25) * (ce * w).sum() / mx.maximum(w.sum(), 1)
        at += classes
    return total


def accuracy(model: Teacher, count: int = 128) -> float:
    """Share of held-out patches with a thing whose shape and colour are both named right."""
    pixels, wanted = next(batches(count, HELD_OUT))
    logits, labelled = np.array(model(pixels)), np.array(wanted)
    shape, colour = np.split(logits[..., : sum(GROUPS[:2])], [GROUPS[0]], axis=-1)
    right = (shape.argmax(-1) == labelled[..., 0]) & (colour.argmax(-1) == labelled[..., 1])
    return float(right[labelled[..., 0] > 0].mean())


def save(tower: ClipVision, out: Path) -> None:
    """As the hub keeps CLIP's vision tower."""
    out.mkdir(parents=True, exist_ok=True)
    flat: dict[str, mx.array] = dict(tree_flatten(tower.parameters()))
    tensors = {f"vision_model.{name}": value for name, value in flat.items()}
    mx.save_safetensors(str(out / "model.safetensors"), tensors, metadata={"format": "mlx"})
    names = (
        "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_channels image_size patch_size layer_norm_eps hidden_act"
    )
    raw = {name: getattr(CONFIG, name) for name in names.split()}
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=48)
    args = parser.parse_args()
    mx.random.seed(0)
    model = Teacher()
    report(args.steps, fit(model, loss, batches(args.batch_size), args.steps, 2e-3))
    save(model.tower, args.out)
    print(f"{args.out}: {accuracy(model):.1%} of patches name shape and colour")


if __name__ == "__main__":
    main()
