"""A padded batch for both sides of a parity test: rows for our trainer, arrays for torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxvlm.data.samples import Sample
from mlxvlm.merge import visual_tokens

WORDS = (9, 14)  # of the two rows


def two_rows(vlm: Any, looked: Sequence[Any]) -> tuple[list[Sample], dict[str, np.ndarray]]:
    """Rows of a picture and text each, of which the last five tokens are learnt; the same as
    `input_ids`, `attention_mask` and `labels`, [2, L]."""
    rows, laid = [], []
    image, rng = vlm.config.prompt.image_token_id, np.random.default_rng(3)
    for number, (picture, words) in enumerate(zip(looked, WORDS, strict=True)):
        visual = visual_tokens(vlm.config, picture.cut)
        text = rng.integers(3, 90, words)
        tokens = np.concatenate([[1], [image] * visual, text]).astype(np.int32)
        learnt = np.zeros(len(tokens), bool)
        learnt[-5:] = True
        slots = [(1, visual)]
        rows.append(Sample(tokens, learnt, [str(number)], slots=slots, cuts=[picture.cut]))
        laid.append((tokens, learnt))
    width = max(len(tokens) for tokens, _ in laid)
    ids, labels, mask = (np.zeros((2, width), np.int64) for _ in range(3))
    for i, (tokens, learnt) in enumerate(laid):
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
        labels[i] = -100
        labels[i, : len(tokens)] = np.where(learnt, tokens, -100)
    return rows, {"input_ids": ids, "attention_mask": mask, "labels": labels}
