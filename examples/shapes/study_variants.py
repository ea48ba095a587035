"""The studies' variants: each is a set of overrides of the recipe's commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from examples.shapes.study_data import Rows

Flags = dict[str, Any]

# Both stages, like those of `recipe/`, for a smaller language model and a shorter run.
COMMON: Flags = {
    "train": "projector,lm",
    "batch_size": 4,
    "share_prefix": 8,
    "length_multiple": 8,
    "max_seq_length": 512,
    "learning_rate": 2e-3,
    "adam_beta2": 0.98,
    "weight_decay": 0.05,
    "warmup": 20,
    "hold": 0.4,
    "schedule": "linear",
    "min_learning_rate": 0.02,
    "save_every": 0,
}
STAGES: dict[str, Flags] = {
    "pretrain": {"iters": 500},
    "sft": {"iters": 60, "learning_rate": 1e-3},
}
# Where the language model knows the questions already, fewer steps will do.
TAUGHT: dict[str, Flags] = {"pretrain": {"iters": 140}, "sft": {"iters": 40}}
LAYERS = {"ground": 2, "align": 0}  # where the hidden state must name the target's words
TARGET_WEIGHT = 0.5
# Rows that cost a step about as much as 4 pictures' questions, where these share their picture.
ROWS_UNSHARED = 12

ATTENTION: Flags = {"projector-heads": 4, "num-positions": 64}
BOTH = ("ground", "align")


@dataclass(frozen=True)
class Variant:
    """What a run does, as far as it is not what all do.

    label: its row's name in a table. start: what the language model is: "fresh"; "shipped", a whole
    model's of another world and encoder; "taught", the `TEACHER`'s, which learnt these questions
    behind a projector of its own; or "pretrained", the whole model that `FULL_DATA` is after its
    first stage. stages: which of the two run.
    build: flags of `mlxvlm build`. recipe: fields of the stages' recipes. targets: the auxiliary
    targets that they name. codec: how the cache keeps the features. rows: how the stages' rows are
    written; sft_percent: another share of the pictures for the second. steps: times the recipe's.
    """

    name: str
    label: str
    start: str = "taught"
    stages: tuple[str, ...] = ("pretrain",)
    build: Flags = field(default_factory=lambda: ATTENTION)
    recipe: Flags = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    codec: str = "float32"
    rows: Rows = Rows()
    sft_percent: int = 0
    steps: float = 1


def recipe(variant: Variant, stage: str, seed: int) -> Flags:
    """The recipe file of one stage: fields of TrainConfig, and the targets' tables."""
    found = COMMON | STAGES[stage]
    if variant.start != "fresh":
        found |= TAUGHT[stage]
    found |= variant.recipe
    found["iters"] = max(1, round(found["iters"] * variant.steps))
    tables = {name: {"layer": LAYERS[name], "weight": TARGET_WEIGHT} for name in variant.targets}
    return found | {"seed": seed} | ({"targets": tables} if tables else {})


def trial(name: str, label: str, **changes: Any) -> Variant:
    """A fresh projector before the taught language model."""
    fields: Flags = {"targets": BOTH}
    return Variant(name, label, **(fields | changes))


def lesson(name: str, label: str, **changes: Any) -> Variant:
    """A variant of the whole recipe, from a fresh language model."""
    return amount(name, label, **({"start": "fresh"} | changes))


def amount(name: str, label: str, **changes: Any) -> Variant:
    fields: Flags = {"stages": ("pretrain", "sft")}
    return trial(name, label, **(fields | changes))


def only_sft(percent: int) -> Variant:
    """The second stage alone, for one epoch of that share of its pictures."""
    label = f"sft on {percent}% of them, for one epoch"
    changes: Flags = {"stages": ("sft",), "sft_percent": percent, "steps": percent / 100}
    return amount(f"sft-{percent}", label, start="pretrained", **changes)


TEACHER = "teacher"
FULL_DATA = "data-100"
COARSE = Rows(grid=4)
QUERIES = 16
MLP: Flags = {"projector": "mlp"}
ABSTRACTOR: Flags = {
    "projector": "c_abstractor",
    "num-query-tokens": QUERIES,
    "projector-width": 128,
    "projector-layers": 2,
}
RESAMPLER: Flags = {"projector": "resampler", "num-query-tokens": QUERIES, "projector-heads": 4}
POOLED: Flags = ATTENTION | {"pool": "mean2", "num-positions": 16}
UNSHARED: Flags = {"share_prefix": 0, "batch_size": ROWS_UNSHARED}
ALL = (
    Variant(TEACHER, "the teacher", "shipped", targets=BOTH, recipe={"iters": 450}),
    trial("attention", "two-block attention"),
    trial("mlp", "MLP", build=MLP),
    trial("concat2-mlp", "unshuffle 2 x 2 + MLP", build=MLP | {"pool": "concat2"}, rows=COARSE),
    trial("c-abstractor", "C-Abstractor", build=ABSTRACTOR, rows=COARSE),
    trial("resampler", "resampler", build=RESAMPLER, targets=("ground",)),
    trial("attention-mean2", "mean 2 x 2 + attention", build=POOLED, rows=COARSE),
    trial("mlp-mean2", "mean 2 x 2 + MLP", build=MLP | {"pool": "mean2"}, rows=COARSE),
    trial("attention-ground", "attention, as a resampler is taught", targets=("ground",)),
    trial("projector-only", "the projector alone", recipe={"train": "projector"}),
    trial("lora", "the projector, LoRA", recipe={"train": "projector,lora:lm"}),
    trial("int8", "two-block attention, features as int8", codec="int8"),
    trial("int4", "two-block attention, features as int4", codec="int4"),
    amount(FULL_DATA, "all pictures"),
    amount("data-25", "25% of the pictures, as many steps", rows=Rows(percent=25)),
    amount("data-50", "50% of the pictures, as many steps", rows=Rows(percent=50)),
    only_sft(25),
    only_sft(50),
    lesson("default", "the recipe"),
    lesson("no-ground", "without the grounding targets", targets=("align",)),
    lesson("no-align", "without the alignment targets", targets=("ground",)),
    lesson("direct", 'answers not restated ("Red.")', rows=Rows(restated=False)),
    lesson("unshared", "rows do not share their picture", recipe=UNSHARED),
    lesson("bpe", "a BPE learnt from the texts", rows=Rows(words=False)),
    lesson(
        "plain",
        "plain SFT: none of these five",
        targets=(),
        recipe=UNSHARED,
        rows=Rows(False, False),
    ),
    lesson(
        "plain-300",
        "plain SFT, 3 x the pictures and steps",
        targets=(),
        recipe=UNSHARED,
        rows=Rows(False, False, 300),
        steps=3,
    ),
)
# Which rows stand in which table.
STUDIES = {
    "projectors": (
        "attention",
        "mlp",
        "concat2-mlp",
        "c-abstractor",
        "resampler",
        "attention-ground",
        "attention-mean2",
        "mlp-mean2",
        "int8",
        "int4",
    ),
    "parts": ("projector-only", "lora", "attention"),
    "recipe": tuple(variant.name for variant in ALL if variant.start == "fresh"),
    "amount": (FULL_DATA, "data-50", "data-25", "sft-50", "sft-25"),
}
# Rows that stand in two tables, by another name in the second.
LABELS = {("parts", "attention"): "the projector, all of the language model"}
NAMES = {variant.name: variant for variant in ALL}
