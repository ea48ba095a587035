"""A share of the rows set aside for validation: a function of the seed and the rows alone.

Rows that have a picture in common stay together, so that no picture of the validation rows is
trained on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from ..errors import DataError
from .samples import Sample


def split(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(rows to train on, rows to validate on), each in the order given."""
    families = _families(samples)
    wanted = max(1, round(share * len(samples)))
    held: set[int] = set()
    for index in np.random.default_rng([seed, len(samples)]).permutation(len(families)):
        family = families[index]
        if len(held) + len(family) <= max(wanted, 1):
            held.update(family)
        if len(held) == wanted:
            break
    if not held:
        smallest = min(len(family) for family in families)
        raise DataError(
            f"--val-split (={share}) is {wanted} of {len(samples)} rows, but rows of one picture "
            f"stay together, and no picture has fewer than {smallest}. Give a larger share, or "
            "--val-data."
        )
    if len(held) == len(samples):
        raise DataError(f"--val-split (={share}) leaves no row to train on; give --val-data.")
    train = [sample for i, sample in enumerate(samples) if i not in held]
    return train, [sample for i, sample in enumerate(samples) if i in held]


def _families(samples: Sequence[Sample]) -> list[list[int]]:
    """Indices of rows that pictures connect; of text alone, those that are the same, since an epoch
    may have a row more than once."""
    parent = list(range(len(samples)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, sample in enumerate(samples):
        for name in sample.images or [blake2b(sample.packed(), digest_size=16).hexdigest()]:
            parent[root(i)] = root(first.setdefault(name, i))
    found: dict[int, list[int]] = defaultdict(list)
    for i in range(len(samples)):
        found[root(i)].append(i)
    return list(found.values())
