"""Auxiliary targets as rows have them: a bad one costs its row, and nothing else."""

import math

import numpy as np
import pytest
from tiny_vlm import tiny_config, tiny_tokenizer

from mlxvlm.data.records import parse_record
from mlxvlm.data.samples import prepare
from mlxvlm.images.picture import Cut

PLACE = {"image": 0, "token": 3}


def read(targets):
    rows = [
        (where, parse_record({"image": "a", "text": "red", "targets": each}, where))
        for where, each in (("bad", targets), ("good", {"ground": [PLACE | {"words": ["r"]}]}))
    ]
    return prepare(rows, tiny_tokenizer(), tiny_config(), lambda *_: Cut(1), 200, ["ground"])


@pytest.mark.parametrize(
    "ground",
    [
        5,
        "bad",
        [5],
        [PLACE],
        [{"image": 1, "token": 0, "words": ["r"]}],
        [{"image": 0, "token": 16, "words": ["r"]}],
        [{"image": 0, "token": "z", "words": ["r"]}],
        [{"turn": 0, "end": 99, "words": ["r"]}],
        [PLACE | {"words": []}],
        [PLACE | {"words": 5}],
        [PLACE | {"words": ["two words"]}],
        [PLACE | {"words": {"r": "x"}}],
        [PLACE | {"words": {"r": 0}}],
        [PLACE | {"words": {"r": -1, "e": 2}}],
        [PLACE | {"words": {"r": math.nan}}],
    ],
)
def test_a_bad_target_costs_its_row(ground):
    samples, skipped = read({"ground": ground})
    assert [one.where for one in samples] == ["good"]
    assert [(one.where, one.kind) for one in skipped] == [("bad", "target")]


def test_masses_add_up_to_one():
    samples, _ = read({"ground": [PLACE | {"words": {"r": 1, "e": 3}}], "other": 5})
    (target,) = samples[0].targets["ground"]
    start, _ = samples[0].slots[0]
    assert target.position == start + 3 and np.array_equal(target.masses, [0.25, 0.75])
