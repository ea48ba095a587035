"""A stage is which parts train, plus defaults. The loop is one.

pretrain   projector                    align features with a frozen language model
sft        projector, language model    teach it to talk about pictures
lora       projector, adapters          the same on a laptop, and on a quantised base

`--train` says anything else: projector, lm, vision, lora:lm, lora:vision.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import LoRAConfig, read_dataclass
from ..data.hub import is_hub_data
from ..data.mixture import AUGMENTATIONS, FILTERS, NONE, Mixture, Source, complete
from ..data.response_formats import FORMATS
from ..errors import ConfigError, UsageError

PARTS = ("projector", "lm", "vision", "lora:lm", "lora:vision")
OPTIMIZERS = (
    "adamw",
    "adam",
    "adafactor",
    "sgd",
    "lion",
    "muon",
    "adamax",
    "rmsprop",
    "adagrad",
)
BATCHING = ("auto", "buckets", "pack", "internvl")
SCHEDULES = ("cosine", "linear", "constant")
LOSSES = ("token", "sample", "square")
# What --lora-keys calls every linear layer.
ALL_LINEAR = "all-linear"

# The least that a field may be.
LEAST = {
    "batch_size": 1,
    "grad_accumulation_steps": 1,
    "length_multiple": 1,
    "max_seq_length": 1,
    "lora_rank": 1,
    "steps_per_report": 1,
    "iters": 0,
    "seed": 0,
    "keep": 0,
    "save_every": 0,
    "steps_per_eval": 0,
    "share_prefix": 0,
    "pack_length": 0,
    "pack_views": 0,
    "warmup": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "projector_learning_rate": 0,
    "vision_learning_rate": 0,
    "spike_factor": 0,
    "val_split": 0,
    "val_samples": 0,
    "patience": 0,
    "lora_alpha": 0,
    "teacher_weight": 0,
}

ADAPTER_FLAGS = (
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_layers",
    "lora_keys",
    "rslora",
    "dora",
)

VISION_FLAGS = ("vision_learning_rate", "vision_drop_path")

# What the teacher's part of the loss is called.
TEACHER = "teacher"

# Published values: LLaVA-1.5's two stages and LoRA (Liu et al. 2023).
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"train": "projector", "learning_rate": 1e-3},
    "sft": {"train": "projector,lm", "learning_rate": 2e-5},
    "lora": {
        "train": "projector,lora:lm",
        "learning_rate": 2e-4,
        "projector_learning_rate": 2e-5,
    },
}


@dataclass
class AuxiliaryTarget:
    """Hidden states after block `layer` (0: the embeddings, visual ones included), read through the
    language model's own head, name words; `weight` is its share of the loss. Training only."""

    layer: int = 0
    weight: float = 0.5


def flag(default: Any, text: str) -> Any:
    """A field with its help text; the command line is made from both."""
    return field(default=default, metadata={"help": text})


def several(default: Any, text: str) -> Any:
    """A flag that may be given several times."""
    return field(default=default, metadata={"help": text, "several": True})


@dataclass
class TrainConfig:
    """Everything that a run depends on. Recipes (TOML) use these names, flags their kebab-case."""

    model: str = flag("", "Model folder or hub id to start from.")
    data: str = several(
        "", "Rows: .json, .jsonl, .tar, .parquet, a folder, or a hub's data set; may be repeated."
    )
    out: str = flag("", "Folder for the result, metrics.jsonl and checkpoints.")
    images: str = flag("", "Folder that picture names are relative to. Default: the data's folder.")
    cache: str = flag("", "Embedding cache to read features from, instead of running the encoder.")
    allow_urls: bool = flag(False, "Fetch pictures that rows name by a web address.")
    augment: str = flag("", f"Changes pictures in training: {', '.join(AUGMENTATIONS)}.")
    response_format: str = flag("", f"LLaVA-1.5's line after each question: {', '.join(FORMATS)}.")
    filter: str = flag("", f"Rows to leave out, comma-separated: {', '.join(FILTERS)}.")
    resize: str = flag("", "squash, crop or pad pictures from this stage on. Default: as before.")
    layout: str = flag("", "The prompt's layout from this stage on. Default: as before.")
    val_data: str = flag("", "Rows to validate on.")
    val_split: float = flag(0.0, "Or: this share of the rows, chosen by --seed, by picture.")
    train: str = flag("", f"Parts that train, comma-separated: {', '.join(PARTS)}.")
    iters: int = flag(0, "Optimizer steps; 0 means --epochs.")
    epochs: float = flag(1.0, "Passes over the data.")
    batch_size: int = flag(
        4, "Rows a micro-batch; with --share-prefix pictures, with --batching pack packed lines."
    )
    batching: str = flag(
        "auto",
        "How rows meet: buckets (rows of like length, padded), pack (several in a line, as full as "
        "can be), internvl (packed as InternVL 2.5 does), or auto: buckets, or packs of about as "
        "many rows, where over 10% of a bucket would be padding and packs cost less.",
    )
    pack_length: int = flag(
        0,
        "Tokens of a packed line, up to 2048; longer rows go in buckets. 0: chosen from the rows.",
    )
    pack_views: int = flag(48, "Views of a packed line at most; 0: any number.")
    group_by_modality_length: bool = flag(
        False, "Rows with pictures and rows of text alone never meet in a batch, as in LLaVA."
    )
    grad_accumulation_steps: int = flag(1, "Micro-batches a step.")
    learning_rate: float = flag(1e-3, "Peak learning rate; adapters have that of their part.")
    projector_learning_rate: float = flag(0.0, "The projector's own; 0 means --learning-rate.")
    vision_learning_rate: float = flag(0.0, "The vision tower's own; 0 means --learning-rate.")
    vision_drop_path: float = flag(
        0.0,
        "Stochastic depth of a vision tower that trains: the share of views that lose a branch of "
        "its last block; fewer in those before.",
    )
    schedule: str = flag("cosine", f"After warm-up: {', '.join(SCHEDULES)}.")
    warmup: float = flag(
        0.03, "Warm-up: a share of all steps below 1, a number of steps from 1 up."
    )
    hold: float = flag(0.0, "Share of all steps at the peak before the schedule falls.")
    min_learning_rate: float = flag(0.0, "Where the schedule ends, as a share of the peak.")
    loss: str = flag(
        "token", "What weighs alike: token, sample (a row), or square (between), as InternVL 2.5."
    )
    optimizer: str = flag("adamw", f"One of {', '.join(OPTIMIZERS)}.")
    weight_decay: float = flag(0.0, "Decay, as AdamW has it; norms and biases have none.")
    adam_beta2: float = flag(0.999, "Second beta of adamw and adam.")
    max_grad_norm: float = flag(1.0, "Clip the global gradient norm to this; 0 means never.")
    spike_factor: float = flag(
        10.0, "Skip a step whose gradient norm is so many times the recent median; 0 means never."
    )
    max_seq_length: int = flag(2048, "Rows with more tokens are left out, with the reason.")
    length_multiple: int = flag(32, "Rows are padded to a multiple of this.")
    share_prefix: int = flag(0, "Up to so many rows of one picture share its computation; 0: none.")
    grad_checkpoint: bool = flag(
        False, "Recompute blocks in the backward pass: slower, less memory."
    )
    seed: int = flag(0, "Seed of the data order and of new weights.")
    save_every: int = flag(500, "Steps between checkpoints; 0 means none.")
    keep: int = flag(2, "Checkpoints kept.")
    steps_per_report: int = flag(10, "Steps between progress lines.")
    steps_per_eval: int = flag(200, "Steps between validations; the last step has one too.")
    val_samples: int = flag(3, "Rows whose answers are shown at each validation.")
    patience: int = flag(0, "Stop after so many validations without a new best; 0 means never.")
    resume: bool = flag(False, "Go on from the last checkpoint in --out.")
    strict: bool = flag(False, "Stop at the first row that cannot be used.")
    lora_rank: int = flag(LoRAConfig.rank, "Rank of the adapters.")
    lora_alpha: float = flag(
        0.0, f"Adapters are scaled by alpha / rank; 0 means {LoRAConfig.scale:g} x rank."
    )
    lora_dropout: float = flag(LoRAConfig.dropout, "Dropout before the adapters.")
    lora_layers: int = flag(
        LoRAConfig.num_layers, "The language model's blocks with adapters, from the last; -1: all."
    )
    lora_keys: str = flag(
        ALL_LINEAR, "Layers with adapters, comma-separated, such as q_proj,v_proj."
    )
    rslora: bool = flag(False, "Scale adapters by alpha / sqrt(rank) instead.")
    dora: bool = flag(False, "DoRA: adapters with a magnitude for each output.")
    teacher: str = flag(
        "",
        "Of EVE: whose features its tokens come close to while it trains, or none. Default: the "
        "model's own teacher, a CLIP.",
    )
    teacher_cache: str = flag(
        "", "Of EVE: cache of the teacher's features; cache-embeddings -m MODEL makes it."
    )
    teacher_weight: float = flag(1.0, "Of EVE: the teacher's share beside the loss of words.")
    targets: dict[str, AuxiliaryTarget] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    mixture: Mixture = field(default_factory=Mixture)

    def __post_init__(self) -> None:
        for name in self.parts:
            if name not in PARTS:
                raise UsageError(f"--train names {name!r}; parts are {', '.join(PARTS)}.")
        for part in ("lm", "vision"):
            if {part, f"lora:{part}"} <= set(self.parts):
                raise UsageError(f"--train names both {part} and lora:{part}; choose one.")
        if self.trains_vision and (self.cache or any(one.cache for one in self.sources)):
            raise UsageError(
                f"--train {self.train} does not go with --cache: features are frozen, and whatever "
                "trains the encoder refuses a cache. Leave one of them out."
            )
        if self.schedule not in SCHEDULES:
            raise UsageError(f"--schedule (={self.schedule!r}) must be in {', '.join(SCHEDULES)}.")
        if self.loss not in LOSSES:
            raise UsageError(f"--loss (={self.loss!r}) must be in {', '.join(LOSSES)}.")
        if self.optimizer not in OPTIMIZERS:
            raise UsageError(
                f"--optimizer (={self.optimizer!r}) must be in {', '.join(OPTIMIZERS)}."
            )
        if self.optimizer == "adam" and self.weight_decay:
            raise UsageError("--optimizer adam has no --weight-decay; adamw is Adam with it.")
        if self.batching not in BATCHING:
            raise UsageError(f"--batching (={self.batching!r}) must be in {', '.join(BATCHING)}.")
        for name, value in vars(self).items():
            if isinstance(value, float) and math.isinf(value):
                raise UsageError(f"{flag_name(name)} (={value}) must be finite.")
        for name, least in LEAST.items():
            if not getattr(self, name) >= least:
                rule = f"must be at least {least}"
                raise UsageError(f"{flag_name(name)} (={getattr(self, name)}) {rule}.")
        if not self.iters and not self.epochs > 0:
            raise UsageError(f"--epochs (={self.epochs}) must be above 0 where --iters is 0.")
        if not self.learning_rate > 0:
            raise UsageError(f"--learning-rate (={self.learning_rate}) must be above 0.")
        if not 0 <= self.vision_drop_path < 1:
            raise UsageError(
                f"--vision-drop-path (={self.vision_drop_path}) must be from 0 to less than 1."
            )
        if self.val_data and self.val_split:
            raise UsageError("--val-data and --val-split do not go together; drop one.")
        if self.patience and not (self.val_data or self.val_split):
            raise UsageError("--patience needs validations: give --val-data or --val-split.")
        for name in ("hold", "min_learning_rate", "lora_dropout", "adam_beta2", "val_split"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{flag_name(name)} (={getattr(self, name)}) must be 0 to 1.")
        if self.grad_checkpoint and self.share_prefix:
            raise UsageError("--grad-checkpoint and --share-prefix do not go together; drop one.")
        if self.share_prefix and self.batching in ("pack", "internvl"):
            # A row's positions would not follow its prefix's where another row stands between.
            raise UsageError(
                f"--batching {self.batching} and --share-prefix do not go together; drop one."
            )
        if TEACHER in self.targets:
            raise UsageError(f"targets.{TEACHER} is what the teacher's part is called: rename it.")
        if self.sources and self.data:
            raise UsageError("--data and [[sources]] both name rows; choose one.")
        if self.data or self.sources:
            self.mixture.check(self.all_sources)

    @property
    def parts(self) -> list[str]:
        return [part.strip() for part in self.train.split(",") if part.strip()]

    @property
    def trains_vision(self) -> bool:
        return bool({"vision", "lora:vision"} & set(self.parts))

    @property
    def needs_pictures(self) -> bool:
        """Whether rows without a picture would train nothing."""
        return not {"lm", "lora:lm"} & set(self.parts)

    @property
    def gives_adapters(self) -> bool:
        """Whether the result is a folder of adapters, and no model; a language model that was
        itself trained is saved whole, with the vision tower's adapters merged."""
        return "lora:lm" in self.parts or ("lora:vision" in self.parts and "lm" not in self.parts)

    @property
    def all_sources(self) -> list[Source]:
        """What there is to train on; --data is one source, of which the run's options say all."""
        return complete(self.sources or [Source(self.data)], self._shared())

    def source(self, data: str) -> Source:
        """Rows to validate on: whole, and as they are."""
        shared = self._shared() | {"augment": "none", "filter": "none"}
        return complete([Source(data)], shared)[0]

    def _shared(self) -> dict[str, str]:
        names = ("images", "cache", "augment", "response_format", "filter")
        return {name: getattr(self, name) for name in names}

    def lora(self) -> LoRAConfig:
        """Of the adapters that --train names, Hugging Face's alpha and rank as a scale."""
        alpha = self.lora_alpha or LoRAConfig.scale * self.lora_rank
        scale = alpha / (math.sqrt(self.lora_rank) if self.rslora else self.lora_rank)
        keys = [key.strip() for key in self.lora_keys.split(",") if key.strip()]
        named = None if keys in ([], [ALL_LINEAR]) else keys
        layers = self.lora_layers
        return LoRAConfig(self.lora_rank, scale, self.lora_dropout, layers, named, self.dora)


def stage_config(
    stage: str, flags: dict[str, Any], recipe: str | Path | None = None
) -> TrainConfig:
    """The stage's defaults, then the recipe's values, then the flags that were given."""
    values = dict(STAGES[stage])
    if recipe is not None:
        values.update(read_recipe(recipe))
    values.update({k: v for k, v in flags.items() if v is not None})
    if flags.get("data") and values.pop("sources", None):
        values.pop("mixture", None)  # which was about those
    if isinstance(data := values.get("data"), list | tuple):
        if data and values.get("sources"):
            raise UsageError("a recipe's data and [[sources]] both name rows; choose one.")
        values["data"] = data[0] if len(data) == 1 else ""
        values["sources"] = [Source(one) for one in data] if len(data) > 1 else []
    for name in ("model", "data", "out"):
        if not values.get(name) and not (name == "data" and values.get("sources")):
            raise UsageError(f"{flag_name(name)} is missing; give it as a flag or in the recipe.")
    try:
        return read_dataclass(TrainConfig, values, stage)
    except ConfigError as error:
        raise UsageError(str(error)) from None


def refuse_idle(stage: str, flags: dict[str, Any], config: TrainConfig) -> None:
    """UsageError, where a flag was given that this run would not heed.

    A recipe may say more than one stage heeds: it can serve several.
    """
    parts = set(config.parts)
    adapts = bool({"lora:lm", "lora:vision"} & parts)
    if stage == "lora" and not adapts:
        raise UsageError(
            f"lora trains adapters, and --train {config.train} names none: add lora:lm or "
            "lora:vision, or train these parts with sft."
        )
    given = [name for name, value in flags.items() if value not in (None, False)]
    for name in given:
        if name in ADAPTER_FLAGS and not adapts:
            heeded = "is of adapters: name lora:lm or lora:vision in --train"
        elif name in VISION_FLAGS and not config.trains_vision:
            heeded = "is of the vision tower: name vision or lora:vision in --train"
        elif name == "projector_learning_rate" and "projector" not in parts:
            heeded = "is of the projector: name projector in --train"
        elif name in ("pack_length", "pack_views") and config.batching == "buckets":
            heeded = "is of packed lines: give --batching pack, internvl or auto"
        else:
            continue
        raise UsageError(f"{flag_name(name)} {heeded}, or leave it out.")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe.toml as keyword arguments of TrainConfig; relative paths start at its folder."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"recipe {path} does not exist.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}.") from None
    if twice := [name for name in raw if "-" in name and name.replace("-", "_") in raw]:
        raise UsageError(f"recipe {path} has {twice[0]} twice, with a dash and an underscore.")
    raw = {name.replace("-", "_"): value for name, value in raw.items()}
    if "targets" in raw:
        tables = raw["targets"]
        if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
            raise UsageError(f"targets in recipe {path} must be tables: [targets.NAME].")
        raw["targets"] = {
            name: read_dataclass(AuxiliaryTarget, value, f"targets.{name}")
            for name, value in raw["targets"].items()
        }
    data = raw.get("data", "")
    if not all(isinstance(one, str) for one in (data if isinstance(data, list) else [data])):
        raise UsageError(
            f"data in recipe {path} must be a text or a list of texts; sources with options of "
            "their own are tables: [[sources]]."
        )
    tables = raw.get("sources", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"sources in recipe {path} must be tables: [[sources]].")
    if "sources" in raw:
        raw["sources"] = [
            read_dataclass(Source, _paths(table, path.parent), f"sources[{at}]")
            for at, table in enumerate(tables)
        ]
    if "mixture" in raw:
        if not isinstance(raw["mixture"], dict):
            raise UsageError(f"mixture in recipe {path} must be a table: [mixture].")
        raw["mixture"] = read_dataclass(Mixture, raw["mixture"], "mixture")
    return _paths(raw, path.parent)


def _paths(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Relative paths start at the recipe's folder."""

    def place(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [place(name, one) for one in value]
        if not isinstance(value, str) or not value or value == NONE:
            return value
        # What may be a hub's is a path if it lies beside the recipe.
        beside = (folder / value).exists()
        if (
            name in ("model", "teacher")
            and not beside
            or name in ("data", "val_data")
            and is_hub_data(value)
        ):
            if not beside:
                return value
        return str((folder / value).resolve())

    names = ("model", "data", "out", "images", "cache", "val_data", "teacher", "teacher_cache")
    return raw | {name: place(name, raw[name]) for name in names if name in raw}


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


# What may differ between a run and its continuation without changing its result.
FREE_ON_RESUME = {
    "resume",
    "keep",
    "save_every",
    "steps_per_report",
    "steps_per_eval",
    "out",
    "model",
    # The way on for a run that the guard has stopped, or that patience has.
    "spike_factor",
    "patience",
    "val_samples",
} | {"data", "images", "cache", "teacher_cache", "val_data", "strict"}


def fingerprint(config: TrainConfig) -> dict[str, Any]:
    """The fields that a continued run must share with its first part."""
    raw = dataclasses.asdict(config)
    raw["sources"] = [
        {name: value for name, value in source.items() if name not in FREE_ON_RESUME}
        for source in raw["sources"]
    ]
    return {name: value for name, value in raw.items() if name not in FREE_ON_RESUME}
