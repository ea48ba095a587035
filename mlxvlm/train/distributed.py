"""Data parallel: each rank takes its rows of every micro-batch, and all take the same step.

    rows of a micro-batch   0 1 2 3 4 5      rank 0: 0 2 4      rank 1: 1 3 5
    gradients               divided by the whole step's weight, then summed over the ranks

So two ranks equal one with twice the batch, whatever rows and answers each of them has. What
decides a step (its totals, its gradients, an interrupt) is summed, so all ranks decide alike; the
first one alone reports and writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from ..machine.ranks import launched_group

# Arrays travel together in messages of about so many bytes.
MESSAGE = 32 * 1024**2


class Ranks:
    """The processes of this run; alone, every sum is what it was given."""

    def __init__(self) -> None:
        self.group = launched_group()
        self.rank = self.group.rank() if self.group else 0
        self.size = self.group.size() if self.group else 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, values: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
        """Sums over the ranks of the named numbers, 0 where a rank has none; in float32."""
        if self.group is None:
            return {name: float(values.get(name, 0.0)) for name in names}
        local = mx.array([float(values.get(name, 0.0)) for name in names], dtype=mx.float32)
        total = mx.distributed.all_sum(local, group=self.group).tolist()
        return dict(zip(names, total, strict=True))  # type: ignore[arg-type]

    def gather(self, text: str) -> list[str]:
        """The texts of all ranks, in their order."""
        if self.group is None:
            return [text]
        data = text.encode()
        size = mx.distributed.all_gather(mx.array([len(data)]), group=self.group)
        longest = max(size.tolist())  # type: ignore[type-var]
        padded = mx.array(list(data.ljust(longest, b" ")), dtype=mx.uint8)
        whole = bytes(mx.distributed.all_gather(padded, group=self.group).tolist())  # type: ignore[arg-type]
        return [whole[at : at + longest].decode().rstrip() for at in range(0, len(whole), longest)]

    def sum_arrays(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """Sums over the ranks of arrays that every rank has under the same names."""
        if self.group is None:
            return arrays
        found: dict[str, mx.array] = {}
        waiting: list[str] = []
        size = 0
        names = sorted(arrays, key=lambda name: str(arrays[name].dtype))
        for i, name in enumerate(names):
            waiting.append(name)
            size += arrays[name].nbytes
            last = i + 1 == len(names) or arrays[names[i + 1]].dtype != arrays[name].dtype
            if size >= MESSAGE or last:
                found.update(self._sum_together({n: arrays[n] for n in waiting}))
                waiting, size = [], 0
        return {name: found[name] for name in arrays}

    def _sum_together(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        flat = mx.concatenate([value.reshape(-1) for value in arrays.values()])
        total = mx.distributed.all_sum(flat, group=self.group)
        mx.eval(total)  # in this order on every rank
        found, start = {}, 0
        for name, value in arrays.items():
            found[name] = total[start : start + value.size].reshape(value.shape)
            start += value.size
        return found
