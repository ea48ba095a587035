"""EVE's patch aligning layer: while it trains, what the language model makes of a picture's patches
comes close to what a frozen teacher says of them (Diao et al. 2024).

    hidden states of layers 32, 28, ..., 0     each LayerNorm, Linear -> the teacher's width
    query = layer 32's, keys and values = the other layers', token by token, 8 heads
    prediction = Linear(last state) + Linear(what the query found)
    loss of a picture = 1 - mean over its patches of cosine(prediction, teacher)

Class and row-end tokens stay out. Where the model has several tokens for a patch of the teacher's
(1344 pixels), their hidden states are averaged first. Attention is scaled by the whole width's
square root (`VisionCompressor` in EVE). Nothing of this is in the model that a run gives: what a
later stage goes on with lies beside it, in aligner.safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..attention import attention
from ..config import ModelConfig
from ..data.buckets import PREDICT_MULTIPLE, Batch
from ..errors import WeightsError
from ..images.whole import STRIDE, offset
from ..weights.check import check
from ..weights.folder import ALIGNER

HEADS = 8
# Layers that are looked at, beside the last; of 32, every fourth.
OTHERS = 8
EPS = 1e-5


class PatchAligner(nn.Module):
    """Hidden states of `layers`, [S, D] each, -> predictions [S, C] of the teacher's features."""

    def __init__(self, width: int, teacher_width: int, num_layers: int):
        super().__init__()
        self.num_layers = num_layers
        self.norm_layer = [
            [nn.LayerNorm(width, eps=EPS), nn.Linear(width, teacher_width, bias=False)]
            for _ in self.layers
        ]
        self.input_layer = nn.Linear(width, teacher_width)
        self.output_layer = nn.Linear(teacher_width, teacher_width)

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of hidden states: num_layers, the normed last, to 0, the embeddings."""
        return tuple(range(self.num_layers, -1, -max(1, self.num_layers // OTHERS)))

    def __call__(self, states: Mapping[int, mx.array]) -> mx.array:
        each = []
        for number, (norm, linear) in zip(self.layers, self.norm_layer, strict=True):
            each.append(linear(norm(states[number])))
        x = mx.stack(each, axis=1)
        S, L, C = x.shape
        x = x.reshape(S, L, HEADS, C // HEADS).transpose(0, 2, 1, 3)
        found = attention(x[:, :, :1], x[:, :, 1:], x[:, :, 1:], C**-0.5)
        return self.input_layer(states[self.num_layers]) + self.output_layer(found.reshape(S, C))


@dataclass
class Lesson:
    """What the teacher says of a batch's pictures: [pictures, cells * cells, C]; and the share of
    the loss that it is."""

    features: mx.array
    weight: float


@dataclass
class Places:
    """Patches of the teacher's that pictures cover, S of them in all.

    tokens: int32 [S, n], where in the flattened hidden states a patch's n tokens are. teacher:
    int32 [S], which of the teacher's [pictures * cells * cells]. weights: float32 [S], 1 / patches
    of the picture, so that all of a picture weigh 1; 0 for padding.
    """

    tokens: np.ndarray
    teacher: np.ndarray
    weights: np.ndarray


def places(batch: Batch, config: ModelConfig) -> Places:
    """Where the patches of a batch's pictures are."""
    rows = [batch.tokens] if batch.prefix is None else [batch.prefix, batch.tokens]
    flat = np.concatenate([row.reshape(-1) for row in rows])
    where = np.flatnonzero(flat == config.prompt.image_token_id)
    tiling, cells = config.tiling, config.tiling.cells
    each = tiling.image_size // (STRIDE * tiling.patch_size * cells)
    tokens, teacher, weights, at = [], [], [], 0
    for number, cut in enumerate(batch.cuts):
        h, w = cut.grid
        own = where[at : at + 1 + h * (w + 1)]
        at += len(own)
        grid = own[1:].reshape(h, w + 1)[:, :w]
        rows_, columns = h // each, w // each
        grid = grid.reshape(rows_, each, columns, each).swapaxes(1, 2)
        tokens.append(grid.reshape(rows_ * columns, each * each))
        down = offset(rows_, cells) + np.arange(rows_)[:, None]
        across = offset(columns, cells) + np.arange(columns)
        teacher.append((number * cells**2 + down * cells + across).reshape(-1))
        weights.append(np.full(rows_ * columns, 1 / (rows_ * columns)))
    count = sum(map(len, weights))
    more = -count % PREDICT_MULTIPLE
    return Places(
        np.pad(np.concatenate(tokens), ((0, more), (0, 0))).astype(np.int32),
        np.pad(np.concatenate(teacher), (0, more)).astype(np.int32),
        np.pad(np.concatenate(weights), (0, more)).astype(np.float32),
    )


def aligning_loss(
    aligner: PatchAligner, states: Mapping[int, mx.array], found: Places, features: mx.array
) -> mx.array:
    """Sum over pictures of 1 - mean cosine. states: [N, D] of each of the aligner's layers."""
    at = mx.array(found.tokens)
    mine = {number: states[number][at].astype(mx.float32).mean(axis=1) for number in aligner.layers}
    ours = aligner(mine)
    theirs = features.reshape(-1, features.shape[-1])[mx.array(found.teacher)].astype(mx.float32)
    norms = mx.sqrt((ours * ours).sum(axis=-1) * (theirs * theirs).sum(axis=-1) + EPS**3)
    cosines = (ours * theirs).sum(axis=-1) / norms
    return (mx.array(found.weights) * (1 - cosines)).sum()


def save_aligner(aligner: PatchAligner, folder: Path) -> None:
    """Writes what a later stage goes on with."""
    flat: Any = tree_flatten(aligner.parameters())
    mx.save_safetensors(str(folder / ALIGNER), dict(flat))


def load_aligner(aligner: PatchAligner, folder: Path) -> bool:
    """Takes what an earlier stage left in a model's folder, if there is anything."""
    path = folder / ALIGNER
    if not path.is_file():
        return False
    try:
        weights = mx.load(str(path))
    except RuntimeError as error:
        raise WeightsError(f"{path} cannot be read: {error}.") from None
    assert isinstance(weights, dict)
    flat: Any = tree_flatten(aligner.parameters())
    check({name: tuple(value.shape) for name, value in flat}, weights, str(path))
    aligner.load_weights(list(weights.items()))
    return True
