"""The plan turned round: what a computer could train in so many hours.

Language models of five sizes, whole and in 4 bits, behind SigLIP-So400m at 384 pixels with the
default projector, at 729 and 196 visual tokens a picture (`--pool mean2`). A row is one picture and
60 tokens of text, 30 of them learnt. Features come from a cache, one row at a time is trained
(batches are made by accumulation), and blocks are computed twice where else it would not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..cache.codecs import codec_named, record_size
from ..config import ModelConfig, ProjectorConfig, VisionConfig, pooled_tokens
from ..data.buckets import Group, collate
from ..data.samples import Sample
from ..language.quantise import quantise
from ..model import VLM
from ..train.parts import prepare_parts
from ..train.stages import STAGES, TrainConfig
from .chips import ENCODING_SHARE, Machine
from .memory import Peak
from .step import Step, step_of

TEXT, LEARNT = 60, 30
POOLS = ("none", "mean2")
CODEC = "int8"
# Python, its libraries, and the tokens of some ten thousand rows.
HOST = 500_000_000


def _llama(name: str, **values: Any) -> tuple[str, dict[str, Any]]:
    known = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}
    return name, {**known, **values}


LANGUAGES = dict(
    (
        _llama(
            "SmolLM2 135M",
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
            vocab_size=49152,
            tie_word_embeddings=True,
        ),
        _llama(
            "SmolLM2 360M",
            hidden_size=960,
            num_hidden_layers=32,
            num_attention_heads=15,
            num_key_value_heads=5,
            intermediate_size=2560,
            vocab_size=49152,
            tie_word_embeddings=True,
        ),
        _llama(
            "Llama 3.2 1B",
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=8192,
            vocab_size=128256,
            tie_word_embeddings=True,
        ),
        _llama(
            "Llama 3.2 3B",
            hidden_size=3072,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            intermediate_size=8192,
            vocab_size=128256,
            tie_word_embeddings=True,
        ),
        _llama(
            "Llama 3 8B",
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=14336,
            vocab_size=128256,
            tie_word_embeddings=False,
        ),
    )
)


@dataclass
class Stage:
    """What one stage takes and gives. memory: bytes, Python's among them; pictures: in the hours
    that there are, with features from a cache; 0 where it does not fit. checkpointed: blocks are
    computed twice. flops: a picture's."""

    stage: str
    memory: int
    pictures: int
    checkpointed: bool
    flops: float


@dataclass
class Row:
    """One model. cache_bytes: of a picture's features. cache_saves: how much quicker than with the
    encoder beside it a pretraining step is; encoder_flops: a picture's."""

    language: str
    bits: int
    tokens: int
    cache_bytes: int
    encoder_flops: float
    stages: list[Stage] = field(default_factory=list)

    @property
    def cache_saves(self) -> float:
        flops = min(stage.flops for stage in self.stages if stage.stage == "pretrain")
        return 1 + self.encoder_flops / flops


def tonight(
    machine: Machine, hours: float, progress: Callable[[str], None] = lambda name: None
) -> list[Row]:
    """What fits, and how many pictures it sees in so many hours."""
    rows = []
    room = machine.usable - HOST
    vision = VisionConfig()
    encoder = _encoder_flops(vision)
    for name, language in LANGUAGES.items():
        progress(name)
        for bits in (16, 4):
            for pool in POOLS:
                tokens = pooled_tokens(vision, pool)
                size = record_size(codec_named(CODEC), (tokens, vision.hidden_size))
                row = Row(name, bits, tokens, size, encoder)
                for stage in STAGES:
                    if stage == "sft" and bits < 16:
                        continue  # a quantised model trains by adapters alone
                    found, twice = None, False
                    for twice in (False, True):
                        found = scaled_step(language, bits, pool, stage, twice)
                        if found.peak.bytes <= room:
                            break
                    assert found is not None
                    fits = found.peak.bytes <= room
                    pictures = int(hours * 3600 * machine.rate / found.flops) if fits else 0
                    memory = found.peak.bytes + HOST
                    row.stages.append(Stage(stage, memory, pictures, twice, found.flops))
                rows.append(row)
    return rows


def encoding_seconds(machine: Machine, row: Row, pictures: int) -> float:
    """What encoding so many pictures takes, once."""
    rate = machine.rate if machine.low == machine.high else 1e12 * ENCODING_SHARE * machine.tflops
    return pictures * row.encoder_flops / rate


def scaled_step(language: dict[str, Any], bits: int, pool: str, stage: str, twice: bool) -> Step:
    """One step of a model, from two of fewer blocks: all blocks are alike."""
    few, more = 4, 8
    a = _step({**language, "num_hidden_layers": few}, bits, pool, stage, twice)
    b = _step({**language, "num_hidden_layers": more}, bits, pool, stage, twice)
    steps = (language["num_hidden_layers"] - few) / (more - few)

    def scaled(x: float, y: float) -> float:
        return x + steps * (y - x)

    phases = zip(a.peak.phases, b.peak.phases, strict=True)
    most = max(round(scaled(x, y)) for x, y in phases)
    return Step(Peak(most), scaled(a.flops, b.flops), 0.0, a.tokens)


def _step(language: dict[str, Any], bits: int, pool: str, stage: str, twice: bool) -> Step:
    config = ModelConfig(projector=ProjectorConfig(pool=pool), language=language)
    vlm = VLM(config)
    vlm.set_dtype(mx.bfloat16)
    if bits < 16:
        quantise(vlm.language, bits)
    train = TrainConfig(
        batch_size=1, grad_accumulation_steps=2, grad_checkpoint=twice, **STAGES[stage]
    )
    prepare_parts(vlm, train)
    del vlm.vision
    tokens = np.zeros(config.tokens_per_view + TEXT, np.int32)
    tokens[: config.tokens_per_view] = config.prompt.image_token_id
    learnt = np.zeros(len(tokens), np.bool_)
    learnt[-LEARNT:] = True
    batch = collate([Group([Sample(tokens, learnt, ["picture"])], 0)], train.length_multiple)
    step = step_of(vlm, train, batch, 1)
    micro = train.grad_accumulation_steps
    return Step(step.peak, step.flops / micro, 0.0, step.tokens // micro)


def _encoder_flops(vision: VisionConfig) -> float:
    """Of one picture: matrix products of the patches, and of the blocks up to the feature layer."""
    tokens, width = vision.grid**2, vision.hidden_size
    block = 2 * tokens * (4 * width**2 + 2 * width * vision.intermediate_size)
    attention = 4 * tokens**2 * width
    patches = 2 * tokens * width * vision.num_channels * vision.patch_size**2
    return patches + vision.num_layers_used * (block + attention)
