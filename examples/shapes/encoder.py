"""Pre-trains the small SigLIP tower on the drawn world.

This is not SigLIP's own training. The sigmoid loss needs pictures with captions, by the million;
here the generator knows what it drew, and those labels teach the tower: a linear head names what
each patch shows, and a few learned queries name what stands in each cell and bar of the scene. Both
heads are thrown away afterwards. What stays has SigLIP's architecture, names and file layout.

    python -m examples.shapes.encoder --out runs/shapes/encoder
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from examples.shapes.camera import Map, Shot, as_drawn, shoot
from examples.shapes.drawing import box, patch_items, patch_letters, spread
from examples.shapes.phrases import COORDINATES, coordinate
from examples.shapes.world import (
    COLORS,
    LINE,
    MAX_HEIGHT,
    MAX_PRINTS,
    NUMBERS,
    PATCH,
    SHAPES,
    SIZE,
    SIZES,
    WORDS,
    Bar,
    Print,
    Scene,
    Thing,
    make_prints,
    make_scene,
    on_line,
    seeds,
)
from mlxvlm.attention import SelfAttention
from mlxvlm.config import VisionConfig
from mlxvlm.vision.siglip import SiglipVision

CONFIG = VisionConfig(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=5,
    num_attention_heads=4,
    image_size=SIZE,
    patch_size=PATCH,
)
# Each group is one choice; class 0 is "none of them". A box is four choices among coordinates.
DIGITS = tuple("0123456789")
EDGES = ("",) + tuple(str(v) for v in COORDINATES)
GROUPS = (
    ("",) + SHAPES + ("bar", "number", "word", "texture"),
    ("",) + SIZES,
    ("",) + tuple(COLORS),
    ("",) + NUMBERS[1 : MAX_HEIGHT + 1],
    ("",) + DIGITS,  # a printed number's tens
    ("",) + DIGITS,  # and its units
    ("",) + WORDS,
    *[EDGES] * 4,
    ("",) + tuple(sorted({*DIGITS, *"".join(WORDS)})),  # the character that a patch shows
)
WEIGHTS = (1.0,) * 7 + (0.25,) * 4 + (1.5,)
SEEN = 7  # groups that must be right for an item to count as seen; edges are reported apart
CLASSES = sum(len(group) for group in GROUPS)
QUERIES = 9 + 5  # the picture's ninths, and the places of bars from left to right
NONE_WEIGHT = 0.2
PAGES = 0.3  # of the pictures: reading takes longest to learn
IGNORE = -1  # the class of what is not asked


class Heads(nn.Module):
    """The two throw-away heads: features [N, patches, D] -> [N, patches + QUERIES, CLASSES]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        self.patch_head = nn.Linear(D, CLASSES)
        self.queries = mx.random.normal((QUERIES, D), scale=0.5)
        self.norm = nn.LayerNorm(D)
        self.attention = SelfAttention(D, config.num_attention_heads)
        self.query_norm = nn.LayerNorm(D)
        self.query_head = nn.Linear(D, CLASSES)

    def __call__(self, x: mx.array) -> mx.array:
        N, _, D = x.shape
        slots = mx.concatenate([mx.broadcast_to(self.queries, (N, QUERIES, D)), x], axis=1)
        slots = slots + self.attention(self.norm(slots))
        slots = self.query_head(self.query_norm(slots[:, :QUERIES]))
        return mx.concatenate([self.patch_head(x), slots], axis=1)


class Teacher(nn.Module):
    """The tower and its heads: pixels [N, S, S, 3] -> [N, patches + QUERIES, CLASSES]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.tower = SiglipVision(config)
        self.heads = Heads(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        return self.heads(self.tower(pixels))


def classes(item: Thing | Print | Bar | None, found: Map | None = None) -> list[int]:
    """One class for each group; None is none of everything. found: where its box came to lie."""
    if item is None:
        return [0] * len(GROUPS)
    names = [""] * SEEN
    names[2] = item.color
    if isinstance(item, Thing):
        names[0], names[1] = item.shape, item.size
    elif isinstance(item, Bar):
        names[0], names[3] = "bar", NUMBERS[item.height]
    elif item.kind == "number":
        names[0], names[4], names[5] = "number", item.text[:-1], item.text[-1]
    else:
        names[0], names[6] = "word", item.text
    names += [*(str(coordinate(v / SIZE)) for v in spread(box(item), found)), ""]
    return [group.index(name) for group, name in zip(GROUPS, names, strict=True)]


def labels(scene: Scene, moved: Map | None = None) -> np.ndarray:
    """[patches + QUERIES, groups] classes; of a page the slots are not asked.

    moved: the map by which the picture shows the scene.
    """
    slots: list[Thing | Print | Bar | None] = [None] * QUERIES
    for item in scene.items:
        slots[3 * item.row + item.column] = item
    for i, bar in enumerate(scene.bars):
        slots[9 + i] = bar
    shown = [*patch_items(scene, moved), *slots]
    found = np.array([classes(item, moved) for item in shown], np.int32)
    found[:-QUERIES, -1] = [GROUPS[-1].index(letter) for letter in patch_letters(scene, moved)]
    if len(scene.prints) > MAX_PRINTS:
        found[-QUERIES:] = IGNORE
    if scene.kind == "texture":
        found[:-QUERIES, 0] = GROUPS[0].index("texture")
    return found


def pixels(images: Iterable[Image.Image]) -> mx.array:
    """Pictures normalised, [N, S, S, 3]."""
    return mx.array(
        np.stack([np.asarray(image) for image in images]).astype(np.float32) / 127.5 - 1
    )


def batch(shots: Sequence[Shot]) -> tuple[mx.array, mx.array]:
    """Normalised pixels [N, S, S, 3] and classes [N, patches + QUERIES, groups] of some shots."""
    found = np.stack([labels(shot.drawn, shot.map) for shot in shots])
    return pixels(shot.image for shot in shots), mx.array(found)


def loss(model: Teacher | Heads, shown: mx.array, target: mx.array) -> mx.array:
    """Cross-entropy of all groups; `shown` is what the model takes, pixels or features."""
    logits = model(shown)
    total, at = mx.array(0.0), 0
    for i, group in enumerate(GROUPS):
        wanted = target[..., i]
        ce = nn.losses.cross_entropy(logits[..., at : at + len(group)], mx.maximum(wanted, 0))
        weight = mx.where(wanted > 0, 1.0, mx.where(wanted == 0, NONE_WEIGHT, 0.0))
        total = total + WEIGHTS[i] * (ce * weight).sum() / weight.sum()
        at += len(group)
    return total


def accuracy(
    model: Callable[[mx.array], mx.array], split: str = "heldout", count: int = 256
) -> dict[str, float]:
    """Shares of patches and slots that hold an item and are named right in every group, of edges
    within one step, and of scenes with all slots right."""
    guesses, targets = [], []
    source = seeds(split)
    ends = np.cumsum([len(group) for group in GROUPS])[:-1]
    for _ in range(0, count, 32):
        scenes = [make_scene(next(source)) for _ in range(32)]
        shown, target = batch([as_drawn(scene) for scene in scenes])
        parts = np.split(np.array(model(shown)), ends, axis=-1)
        guesses.append(np.stack([part.argmax(-1) for part in parts], axis=-1))
        targets.append(np.array(target))
    guess, wanted = np.concatenate(guesses), np.concatenate(targets)
    ok = np.all((guess == wanted)[..., :SEEN], axis=-1)
    held = np.any(wanted[..., :SEEN] > 0, axis=-1)
    near = abs(guess - wanted)[..., SEEN:-1] <= 1
    patches, slots = np.s_[:, :-QUERIES], np.s_[:, -QUERIES:]
    found = {
        "patches": ok[patches][held[patches]],
        "empty_patches": ok[patches][~held[patches]],
        "slots": ok[slots][held[slots]],
        "edges": near[slots][held[slots]],
        "scenes": ok[slots].all(-1),
        "letters": (guess == wanted)[..., -1][wanted[..., -1] > 0],
    }
    for kind, label in (("things", 1), ("bars", 3), ("numbers", 5), ("words", 6)):
        found[kind] = ok[slots][wanted[slots][..., label] > 0]
    return {name: float(values.mean()) for name, values in found.items()}


def page(seed: int) -> Scene:
    """Lines of print from edge to edge: what teaches to read, many letters at a time."""
    rng = random.Random(f"page {seed}")
    like = make_scene(seed)
    prints = []
    for line in range(SIZE // LINE):
        x = rng.uniform(0, 8)
        while rng.random() < 0.9:
            (made,) = make_prints(rng, 1)
            wide, _ = made.reach
            if x + 2 * wide > SIZE:
                break
            prints.append(replace(made, x=x + wide, y=on_line(line * LINE, rng)))
            x += 2 * wide + rng.uniform(2, 8)
    return replace(like, things=(), bars=(), prints=tuple(prints))


def fit(
    model: nn.Module,
    loss: Callable[..., mx.array],
    batches: Iterator[tuple[mx.array, ...]],
    steps: int,
    peak: float,
) -> Iterator[tuple[int, float]]:
    """AdamW with a short warm-up and a cosine. Yields (step, loss)."""
    warm = min(60, max(1, steps // 10))
    schedule = optim.join_schedules(
        [optim.linear_schedule(0.0, peak, warm), optim.cosine_decay(peak, max(1, steps - warm))],
        [warm],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.05)
    value_and_grad = nn.value_and_grad(model, loss)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def update(*shown: mx.array) -> mx.array:
        value, grads = value_and_grad(model, *shown)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        return value

    for step in range(1, steps + 1):
        value = update(*next(batches))
        mx.eval(state, value)
        yield step, float(value.item())  # type: ignore[arg-type]


def fresh_scenes(count: int, start: int = 500_000_000, pages: float = 0.0) -> Iterator[list[Scene]]:
    """Batches of new scenes: the chat's training scenes start at 0, the tower's far from them.
    pages: the share that are pages of print."""

    def made(seed: int) -> Scene:
        return page(seed) if random.Random(f"page? {seed}").random() < pages else make_scene(seed)

    source = seeds("train", start)
    while True:
        yield [made(next(source)) for _ in range(count)]


def report(steps: int, losses: Iterable[tuple[int, float]]) -> None:
    """Prints each hundredth step, with a running mean of the loss."""
    start, recent = time.perf_counter(), math.nan
    for step, value in losses:
        recent = value if math.isnan(recent) else 0.95 * recent + 0.05 * value
        if step % 100 == 0 or step == steps:
            seconds, cpu = time.perf_counter() - start, time.process_time()
            spent = f"{seconds:.0f} s ({cpu:.0f} s of CPU)"
            print(f"step {step}/{steps}  loss {recent:.3f}  {spent}", flush=True)


def tower_tensors(tower: SiglipVision) -> dict[str, mx.array]:
    """The tower's tensors as the hub keeps them: channels before rows and columns."""
    tensors: dict[str, mx.array] = {}
    parameters: dict[str, mx.array] = dict(tree_flatten(tower.parameters()))
    for name, value in parameters.items():
        if name == "embeddings.patch_embedding.weight":
            value = value.transpose(0, 3, 1, 2)
        tensors[f"vision_model.{name}"] = mx.contiguous(value)
    return tensors


def tower_config(config: VisionConfig) -> dict[str, Any]:
    """A SigLIP tower's `vision_config`, under the hub's names."""
    fields = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels "
        "image_size patch_size layer_norm_eps hidden_act"
    )
    named = {name: getattr(config, name) for name in fields.split()}
    return {"model_type": "siglip_vision_model", **named}


def write_folder(
    out: Path, tensors: dict[str, mx.array], raw: dict[str, Any], config: VisionConfig
) -> None:
    """Writes tensors, config.json and how pictures are prepared."""
    out.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(out / "model.safetensors"), tensors, metadata={"format": "mlx"})
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def save(tower: SiglipVision, config: VisionConfig, out: Path) -> None:
    """Writes the tower as the hub keeps a vision-only SigLIP."""
    raw = {
        "architectures": ["SiglipVisionModel"],
        **tower_config(config),
        "vision_use_head": False,
    }
    write_folder(out, tower_tensors(tower), raw, config)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-trains the small SigLIP tower.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8000, help="0 leaves the tower untrained")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--pages", type=float, default=PAGES, help="share that is full of print")
    parser.add_argument("--eval", type=int, default=256, help="held-out scenes at the end")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    mx.random.seed(args.seed)
    model = Teacher(CONFIG)
    fresh = fresh_scenes(args.batch_size, pages=args.pages)
    batches = (batch([shoot(scene) for scene in scenes]) for scenes in fresh)
    report(args.steps, fit(model, loss, batches, args.steps, args.learning_rate))
    save(model.tower, CONFIG, args.out)
    for name, share in accuracy(model, count=args.eval).items():
        print(f"held-out {name}: {100 * share:.1f} %")


if __name__ == "__main__":
    main()
