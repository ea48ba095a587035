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
    "learning_rate": 3e-3,
    "adam_beta2": 0.98,
    "weight_decay": 0.05,
    "warmup": 20,
    "hold": 0.4,
    "schedule": "linear",
    "min_learning_rate": 0.02,
    "save_every": 0,
}
STAGES: dict[str, Flags] = {
    "pretrain": {"iters": 300},
    "sft": {"iters": 120, "learning_rate": 1.5e-3},  # one epoch
}
# Where the language model knows the questions already, fewer steps will do.
TAUGHT = 100
LAYERS = {"ground": 2, "follow": 3, "align": 0}  # whose hidden state names the target's words
TARGET_WEIGHT = 0.5
# Rows that cost a step about as much as 4 pictures' questions, where these share their picture.
ROWS_UNSHARED = 12

ATTENTION: Flags = {"projector-heads": 4, "num-positions": 64}
GROUND = ("ground", "follow")
ALL_TARGETS = (*GROUND, "align")


@dataclass(frozen=True)
class Variant:
    """What a run does, as far as it is not what all do.

    label: its row's name in a table. start: what the language model is: "fresh"; "taught", that of
    `FIRST` after its stages, behind a fresh projector; or "pretrained", all of `FIRST` after the
    first of them; each of the same seed. stages: which of the two run.
    build: flags of `mlxvlm build`. recipe: fields of the stages' recipes. targets: the auxiliary
    targets that they name. codec: how the cache keeps the features. rows: how the stages' rows are
    written, and about how many pictures. steps: times the recipe's.
    """

    name: str
    label: str
    start: str = "fresh"
    stages: tuple[str, ...] = ("pretrain",)
    build: Flags = field(default_factory=lambda: ATTENTION)
    recipe: Flags = field(default_factory=dict)
    targets: tuple[str, ...] = ALL_TARGETS
    codec: str = "float32"
    rows: Rows = Rows()
    steps: float = 1


def recipe(variant: Variant, stage: str, seed: int) -> Flags:
    """The recipe file of one stage: fields of TrainConfig, and the targets' tables."""
    found = COMMON | STAGES[stage] | variant.recipe
    found["iters"] = max(1, round(found["iters"] * variant.steps))
    tables = {name: {"layer": LAYERS[name], "weight": TARGET_WEIGHT} for name in variant.targets}
    return found | {"seed": seed} | ({"targets": tables} if tables else {})


def taught(name: str, label: str, codec: str = "float32", **changes: Any) -> Variant:
    """A fresh projector before a language model that knows the questions."""
    changed = {"iters": TAUGHT} | changes
    return Variant(name, label, "taught", recipe=changed, codec=codec)


def only_sft(percent: int) -> Variant:
    """The second stage alone, one epoch of that share of its pictures."""
    label = f"sft on {percent}% of them"
    rows = Rows(percent=percent)
    return Variant(f"sft-{percent}", label, "pretrained", ("sft",), rows=rows, steps=percent / 100)


FIRST = "attention"  # the recipe itself, which runs before what starts from it
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
PLAIN: Flags = {"targets": (), "recipe": UNSHARED}
ALL = (
    Variant(FIRST, "two-block attention", stages=("pretrain", "sft")),
    Variant("mlp", "MLP", build=MLP),
    Variant("concat2-mlp", "unshuffle 2 x 2 + MLP", build=MLP | {"pool": "concat2"}, rows=COARSE),
    Variant("c-abstractor", "C-Abstractor", build=ABSTRACTOR, rows=COARSE),
    Variant("resampler", "resampler", build=RESAMPLER, targets=GROUND),
    Variant("attention-mean2", "mean 2 x 2 + attention", build=POOLED, rows=COARSE),
    Variant("no-ground", "without the grounding targets", targets=("align",)),
    Variant("no-align", "without the alignment targets", targets=GROUND),
    Variant("direct", 'answers not restated ("Red.")', rows=Rows(restated=False)),
    Variant("unshared", "rows do not share their picture", recipe=UNSHARED),
    Variant("bpe", "a BPE learnt from the texts", rows=Rows(words=False)),
    Variant("plain", "plain SFT: none of these five", **PLAIN, rows=Rows(False, False)),
    Variant(
        "plain-300",
        "plain SFT, 3 x the pictures and steps",
        **PLAIN,
        rows=Rows(False, False, 300),
        steps=3,
    ),
    taught("projector-only", "the projector alone", train="projector"),
    taught("lora", "the projector, LoRA", train="projector,lora:lm"),
    taught("full", "the projector, all of the language model"),
    taught("int8", "the same, from features kept as int8", "int8"),
    taught("int4", "the same, from features kept as int4", "int4"),
    Variant("data-50", "50% of the pictures, as many steps", rows=Rows(percent=50)),
    Variant("data-25", "25% of the pictures, as many steps", rows=Rows(percent=25)),
    only_sft(50),
    only_sft(25),
)
# Which rows stand in which table.
STUDIES = {
    "projectors": (
        FIRST,
        "mlp",
        "concat2-mlp",
        "c-abstractor",
        "resampler",
        "no-align",
        "attention-mean2",
    ),
    "parts": ("projector-only", "lora", "full", "int8", "int4"),
    "recipe": (FIRST, "no-ground", "no-align", "direct", "unshared", "bpe", "plain", "plain-300"),
    "amount": (FIRST, "data-50", "data-25"),
    "second": (FIRST, "sft-50", "sft-25"),
}
# Rows that stand in several tables, by another name in these.
LABELS = {
    ("projectors", "no-align"): "attention, as a resampler is taught",
    ("recipe", FIRST): "the recipe",
    ("amount", FIRST): "all pictures",
    ("second", FIRST): "sft on all of its pictures",
}
NAMES = {variant.name: variant for variant in ALL}
