"""The mean and scale of each channel, which int8 and int4 take out before they round.

Channels of a vision tower differ a hundredfold in size, and a few are far from zero. Rounded
together as they are, the small ones drown: int8 would lose a channel whole. Whitened, each channel
loses about one percent of its own deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

# A channel that hardly moved during calibration may move later: it must not dwarf the others then.
_LEAST = 2.0**-10  # of the median scale
_TINY = 1e-30  # keeps 1 / scale finite
LIMIT = 2.0**100  # of values: their squares and differences stay finite


class Unfit(ValueError):
    """Features that cannot be stored, with the reason. Costs one picture, never a run."""


@dataclass(frozen=True, eq=False)
class Whitening:
    """mean, scale: float32 [width]; x becomes (x - mean) / scale."""

    mean: np.ndarray
    scale: np.ndarray

    def to_json(self) -> dict[str, Any]:
        # The shortest decimals that give the same float32 back.
        return {
            name: [float(str(value)) for value in getattr(self, name)] for name in ("mean", "scale")
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Whitening:
        mean, scale = (np.array(found[name], dtype=np.float32) for name in ("mean", "scale"))
        if mean.ndim != 1 or mean.shape != scale.shape:
            raise ValueError("its mean and scale differ in length")
        if not (np.isfinite(mean).all() and np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError("its mean and scale are no numbers to decode with")
        return cls(mean, scale)


class Calibration:
    """Collects the mean and deviation of every channel over views, one after the other.

    Float64 sums in the order of the input: the same views give the same bits.
    """

    def __init__(self) -> None:
        self.views = 0
        self._tokens = 0
        self._shift: np.ndarray | None = None
        self._sum: Any = 0.0
        self._squares: Any = 0.0

    def check(self, views: list[np.ndarray]) -> None:
        """Unfit where views cannot be added."""
        width = views[0].shape[1] if self._shift is None else len(self._shift)
        for view in views:
            check_range(view)
            check_width(view.shape, width)

    def add(self, view: np.ndarray) -> None:
        """view: finite float32 [tokens, width], below LIMIT."""
        if self._shift is None:
            # Any point near the values will do: it makes the deviation of a constant exactly 0.
            self._shift = view[0].astype(np.float64)
        distance = view - self._shift
        self._sum = self._sum + distance.sum(axis=0)
        self._squares = self._squares + np.einsum("tc,tc->c", distance, distance)
        self._tokens += len(view)
        self.views += 1

    def whitening(self) -> Whitening:
        assert self._shift is not None
        offset = self._sum / self._tokens
        deviation = np.sqrt(np.maximum(self._squares / self._tokens - offset * offset, 0.0))
        moving = deviation[deviation > 0]
        typical = max(float(np.median(moving)), _TINY) if len(moving) else 1.0
        # Nothing is known of a channel that stood still but that it might move as others do.
        scale = np.where(deviation > 0, np.maximum(deviation, _LEAST * typical), typical)
        mean = (self._shift + offset).astype(np.float32)
        return Whitening(mean, np.maximum(scale, _TINY).astype(np.float32))


def check_range(view: np.ndarray) -> None:
    """Unfit where a view is not finite, or so large that its square is not."""
    largest = max(float(view.max(initial=0.0)), -float(view.min(initial=0.0)))
    if not largest <= LIMIT:  # NaN is not
        raise Unfit(
            f"its features reach {largest:.6g}, and int8 and int4 end at {LIMIT:.6g}: "
            "use the codec bf16 or float32"
        )


def check_width(shape: tuple[int, ...], width: int) -> None:
    """Unfit where features are not as wide as those that the codec was calibrated on."""
    if shape[1] != width:
        raise Unfit(f"its features are {shape[1]} wide, and those of the calibration {width}")
