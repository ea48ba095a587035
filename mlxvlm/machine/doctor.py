"""What is right and wrong with this installation and this machine, and what to do about it.

Nothing is changed, and nothing but the hub's front door is asked over the network. MLX is imported
late: that it cannot be is one of the things to find.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..backend import missing_backend
from . import power
from .access import Hub, disks
from .finding import NOTE, OK, UNCHECKED, WRONG, Finding
from .software import AREA as SOFTWARE
from .software import software

if TYPE_CHECKING:
    from .numerics import Difference

NUMERICS = "GPU against CPU"
UPDATE = (
    "What this GPU computes cannot be trusted there. Update macOS and MLX (pip install -U mlx), "
    "and run it again; meanwhile, a --dtype that is not listed here, or the CPU."
)


@dataclass
class Checkup:
    """differences: of the GPU from the CPU, layer by layer; empty where they were not compared."""

    findings: list[Finding] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def wrong(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == WRONG]


def examine(model: Path, out: Path, progress: Callable[[str], None] = lambda what: None) -> Checkup:
    """Looks at everything. model: a small one, to compute with. out: where caches and results would
    go."""
    progress("versions")
    found = Checkup(software())
    try:
        hub = Hub()
    except ImportError:
        remedy = "pip install huggingface_hub"
        found.findings.append(Finding(SOFTWARE, "hub", WRONG, "not installed", remedy))
        hub = None
    numbers: list[Finding] = []
    try:
        import mlx.core as mx
    except ImportError as error:
        says = missing_backend(error) or str(error)
        found.findings.append(Finding("Machine", "device", WRONG, says.partition(". ")[0], says))
        mx = None
    if mx is not None:
        from .device import devices

        progress("the device")
        found.findings += devices()
        if sys.platform == "linux" and mx.default_device() == mx.cpu:
            from .blas import blas

            progress("matrix products")
            found.findings.append(blas())
    found.findings += _power()
    folders = {"models": Path(hub.home) / "hub"} if hub else {}
    found.findings += disks({**folders, "here": out})
    if mx is not None:
        found.differences, numbers = _compare(model, progress)
    if hub is not None:
        # It has had its time to answer meanwhile.
        progress("the hub")
        found.findings += hub.findings()
    found.findings += numbers
    return found


def judge(differences: Sequence[Difference]) -> list[Finding]:
    """What the differences mean: a finding for each layer that is wrong, or one for all."""
    from .numerics import by_layer

    layers = by_layer(differences)
    out = []
    for (part, layer), row in layers.items():
        bad = [one for one in row.values() if one.wrong]
        if not bad:
            continue
        each = "; ".join(
            f"{one.dtype}: "
            + (one.failure or f"{one.relative:.2g} (at most {one.tolerance:g}) in {one.layer}")
            for one in bad
        )
        out.append(Finding(NUMERICS, f"{part} {layer}", WRONG, each, UPDATE))
    if out:
        return out
    worst: dict[str, float] = {}
    for one in differences:
        worst[one.dtype] = max(worst.get(one.dtype, 0.0), one.relative)
    told = ", ".join(f"{value:.1g} in {dtype}" for dtype, value in worst.items())
    says = f"{len(layers)} layers and operations agree: they differ by at most {told}"
    return [Finding(NUMERICS, "demo model", OK, says)]


def _compare(
    model: Path, progress: Callable[[str], None]
) -> tuple[list[Difference], list[Finding]]:
    import mlx.core as mx

    if mx.default_device() != mx.gpu:
        says = "there is no GPU here whose numbers could be held against the CPU's"
        return [], [Finding(NUMERICS, "demo model", UNCHECKED, says)]
    from ..weights.load import load
    from .numerics import compare

    progress("the GPU's numbers, layer by layer")
    differences = compare(lambda: load(model))
    return differences, judge(differences)


def _power() -> list[Finding]:
    if sys.platform != "darwin":
        return []
    notes = [text for text in (power.warning(), power.low_power()) if text]
    if not notes:
        return [Finding("Machine", "power", OK, "mains")]
    out = []
    for text in notes:
        says, _, remedy = text.rpartition(": ")
        out.append(Finding("Machine", "power", NOTE, says, remedy[0].upper() + remedy[1:]))
    return out
