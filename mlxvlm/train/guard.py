"""Which steps count: no gradients that are not finite, and no spikes.

A step that does not count leaves weights and optimizer as they were. A spike is a gradient norm
far above the median of the good steps before it, as one bad batch or the first sign of divergence
gives; clipping bounds how far such a step goes, but not that it goes in a wrong direction.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

# The median is over the norms of so many good steps, once there are MIN_NORMS of them.
NORMS = 100
MIN_NORMS = 20
# This many steps in a row that do not count end a run.
MOST_SKIPPED = 3

NOT_FINITE = "not finite"
SPIKE = "spike"


class Guard:
    """Judges steps by their gradient norms; its whole state goes into a checkpoint.

    factor: how many times the median a norm must be above to be a spike; 0 lets all finite ones by.
    """

    def __init__(self, factor: float):
        self.factor = factor
        self.norms: list[float] = []
        self.streak: list[str] = []
        self.skipped = {NOT_FINITE: 0, SPIKE: 0}

    def judge(self, norm: float) -> str:
        """Why a step of this gradient norm does not count; "" if it does."""
        reason = NOT_FINITE if not math.isfinite(norm) else SPIKE if self._spikes(norm) else ""
        if reason:
            self.streak.append(reason)
            self.skipped[reason] += 1
        else:
            self.streak = []
            self.norms = [*self.norms, norm][-NORMS:]
        return reason

    @property
    def stuck(self) -> bool:
        return len(self.streak) >= MOST_SKIPPED

    def rewind(self) -> int:
        """Forgets the steps in a row that did not count, as if they were still to come; how many
        there were."""
        for reason in self.streak:
            self.skipped[reason] -= 1
        count, self.streak = len(self.streak), []
        return count

    def state(self) -> dict[str, Any]:
        """As JSON values; floats come back exactly."""
        return {"norms": self.norms, "streak": self.streak, "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        self.norms, self.streak = list(state["norms"]), list(state["streak"])
        self.skipped = dict(state["skipped"])

    def _spikes(self, norm: float) -> bool:
        if not self.factor or len(self.norms) < MIN_NORMS:
            return False
        median = statistics.median(self.norms)
        return median > 0 and norm > self.factor * median
