"""The studies' variants: each is a set of overrides of the recipe's commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from examples.shapes.study_data import Rows

Flags = dict[str, Any]

# Both stages: the recipe of `recipe/`, for a smaller language model and a shorter run.
COMMON: Flags = {
    "train": "projector,lm",
    "batch_size": 8,
    "share_prefix": 8,
    "length_multiple": 8,
    "max_seq_length": 512,
    "learning_rate": 3e-3,
    "adam_beta2": 0.98,
    "weight_decay": 0.05,
    "warmup": 20,
    "hold": 0.4,
    "schedule": "linear",
    "min_learning_rate": 0.02,
    "save_every": 0,
}
PRETRAIN: Flags = {"iters": 240}
SFT: Flags = {"iters": 50, "learning_rate": 1.5e-3}
LAYERS = {"ground": 2, "align": 0}  # where the hidden state must name the target's words
TARGET_WEIGHT = 0.5
# About what a step costs when 8 pictures' questions share their pictures' computation.
ROWS_UNSHARED = 24

ATTENTION: Flags = {"projector-heads": 4, "num-positions": 64}
GROUND = ("ground",)


@dataclass(frozen=True)
class Variant:
    """What differs from the default.

    label: its row's name in a table. build: flags of `mlxvlm build`. recipe: fields of both
    stages' recipes; pretrain, sft: of one. targets: the auxiliary targets that the recipes name.
    codec: how the cache keeps the features. rows: how the rows of both stages are written;
    sft_percent: another share of the pictures for the second stage. steps: times the recipe's.
    start: "" is a fresh language model; "trained" the default's, after sft, behind a fresh
    projector; "pretrained" the default's whole model after pretrain.
    stages: which of the two run.
    """

    name: str
    label: str
    build: Flags = field(default_factory=lambda: ATTENTION)
    recipe: Flags = field(default_factory=dict)
    pretrain: Flags = field(default_factory=dict)
    sft: Flags = field(default_factory=dict)
    targets: tuple[str, ...] = GROUND
    codec: str = "float32"
    rows: Rows = Rows()
    sft_percent: int = 0
    steps: float = 1
    start: str = ""
    stages: tuple[str, ...] = ("pretrain", "sft")


def recipe(variant: Variant, stage: str, seed: int) -> Flags:
    """The recipe file of one stage: fields of TrainConfig, and the targets' tables."""
    own = {"pretrain": PRETRAIN | variant.pretrain, "sft": SFT | variant.sft}[stage]
    found = COMMON | own | variant.recipe
    found["iters"] = max(1, round(found["iters"] * variant.steps))
    tables = {name: {"layer": LAYERS[name], "weight": TARGET_WEIGHT} for name in variant.targets}
    return found | {"seed": seed} | ({"targets": tables} if tables else {})


DEFAULT = Variant("default", "the recipe", targets=("ground", "align"))
BASE = "attention"  # the default without align: what the trial of projectors compares with
MLP: Flags = {"projector": "mlp"}
QUERIES = 16
ALL = (
    DEFAULT,
    Variant(BASE, "two-block attention"),
    Variant("mlp", "MLP", build=MLP),
    Variant("concat2-mlp", "unshuffle 2 x 2 + MLP", build=MLP | {"pool": "concat2"}),
    Variant(
        "c-abstractor",
        "C-Abstractor",
        build={
            "projector": "c_abstractor",
            "num-query-tokens": QUERIES,
            "projector-width": 128,
            "projector-layers": 2,
        },
    ),
    Variant(
        "resampler",
        "resampler",
        build={"projector": "resampler", "num-query-tokens": QUERIES, "projector-heads": 4},
    ),
    Variant(
        "attention-mean2",
        "mean 2 x 2 + attention",
        build=ATTENTION | {"pool": "mean2", "num-positions": 16},
    ),
    Variant("mlp-mean2", "mean 2 x 2 + MLP", build=MLP | {"pool": "mean2"}),
    Variant("no-ground", "without the grounding targets", targets=("align",)),
    Variant("direct", 'answers not restated ("Red.")', targets=DEFAULT.targets, rows=Rows(False)),
    Variant(
        "unshared",
        "rows do not share their picture",
        targets=DEFAULT.targets,
        recipe={"share_prefix": 0, "batch_size": ROWS_UNSHARED},
    ),
    Variant(
        "bpe",
        "a BPE learnt from the texts",
        targets=DEFAULT.targets,
        rows=Rows(words=False),
    ),
    Variant(
        "plain",
        "plain SFT: none of these five",
        targets=(),
        recipe={"share_prefix": 0, "batch_size": ROWS_UNSHARED},
        rows=Rows(False, False),
    ),
    Variant("int8", "two-block attention, int8 features", codec="int8"),
    Variant("int4", "two-block attention, int4 features", codec="int4"),
    Variant("data-25", "25% of the pictures", targets=DEFAULT.targets, rows=Rows(percent=25)),
    Variant("data-50", "50% of the pictures", targets=DEFAULT.targets, rows=Rows(percent=50)),
    Variant(
        "sft-25",
        "sft on 25%, one epoch",
        targets=DEFAULT.targets,
        sft_percent=25,
        sft={"iters": SFT["iters"] // 4},
        start="pretrained",
        stages=("sft",),
    ),
    Variant(
        "sft-50",
        "sft on 50%, one epoch",
        targets=DEFAULT.targets,
        sft_percent=50,
        sft={"iters": SFT["iters"] // 2},
        start="pretrained",
        stages=("sft",),
    ),
    Variant(
        "new-projector",
        "a fresh projector alone",
        targets=(),
        recipe={"train": "projector"},
        steps=0.5,
        start="trained",
    ),
    Variant(
        "new-lora",
        "a fresh projector, LoRA on the language model",
        targets=(),
        recipe={"train": "projector,lora:lm"},
        steps=0.5,
        start="trained",
    ),
    Variant(
        "new-full",
        "a fresh projector, all of the language model",
        targets=(),
        steps=0.5,
        start="trained",
    ),
    Variant(
        "plain-300",
        "plain SFT with 3 x the pictures and steps",
        targets=(),
        recipe={"share_prefix": 0, "batch_size": ROWS_UNSHARED},
        rows=Rows(False, False, 300),
        steps=3,
    ),
)
# Which rows stand in which table.
STUDIES = {
    "projectors": (
        BASE,
        "mlp",
        "concat2-mlp",
        "c-abstractor",
        "resampler",
        "attention-mean2",
        "mlp-mean2",
        "int8",
        "int4",
    ),
    "parts": ("new-projector", "new-lora", "new-full"),
    "recipe": ("default", "no-ground", BASE, "direct", "unshared", "bpe", "plain", "plain-300"),
    "amount": ("data-25", "data-50", "default", "sft-25", "sft-50"),
}
# The trial's first row is one of the recipe study, by another name.
LABELS = {("recipe", BASE): "without the alignment targets"}
NAMES = {variant.name: variant for variant in ALL}
