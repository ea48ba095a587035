"""Whether tensors fit a model: every one that does not is named, in one error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx

from mlxvlm.errors import WeightsError

LAYER = re.compile(r"\.(\d+)(?=\.)")


def check(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, mx.array], where: str
) -> None:
    """Raises one WeightsError naming every missing, unexpected, misshapen and non-finite tensor.

    expected: name -> shape. where: the file or folder, for the message.
    """
    shapes = {name: tuple(array.shape) for name, array in found.items()}
    report(
        where,
        missing=expected.keys() - found.keys(),
        unexpected=found.keys() - expected.keys(),
        misshapen={n: (expected[n], s) for n, s in shapes.items() if expected.get(n, s) != s},
        not_finite=[name for name, array in found.items() if not finite(array)],
    )


def finite(array: mx.array) -> bool:
    """Whether no value is NaN or infinite; integers are finite. Evaluates the array."""
    if not mx.issubdtype(array.dtype, mx.floating):
        return True
    return bool(mx.all(mx.isfinite(array)).item())


def report(
    where: str,
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    misshapen: Mapping[str, tuple[Any, Any]] | None = None,
    not_finite: Iterable[str] = (),
) -> None:
    """Raises one WeightsError from lists of names, unless all are empty."""
    lines = []
    if names := grouped(missing):
        lines.append("missing: " + ", ".join(names))
    if names := grouped(unexpected):
        lines.append("unexpected: " + ", ".join(names))
    if misshapen:
        by_shapes: dict[tuple[Any, Any], list[str]] = {}
        for name, shapes in misshapen.items():
            by_shapes.setdefault(shapes, []).append(name)
        lines.append(
            "misshapen: "
            + ", ".join(
                f"{name} is {list(got)} and should be {list(want)}"
                for (want, got), names in sorted(by_shapes.items(), key=str)
                for name in grouped(names)
            )
        )
    if names := grouped(not_finite):
        lines.append("with NaN or infinite values: " + ", ".join(names))
    if lines:
        raise WeightsError(
            f"{where}: the tensors do not fit the config.json. " + "; ".join(lines) + "."
        )


def grouped(names: Iterable[str]) -> list[str]:
    """Sorted names; those that differ in a layer's number alone are one: `layers.{0-26}.w`."""
    stems: dict[str, list[int]] = {}
    for name in names:
        match = LAYER.search(name)
        stem = name if match is None else f"{name[: match.start(1)]}\0{name[match.end(1) :]}"
        stems.setdefault(stem, []).extend([] if match is None else [int(match[1])])
    return [
        stem.replace("\0", _ranges(sorted(set(numbers)))) for stem, numbers in sorted(stems.items())
    ]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(numbers) == 1 else "{" + text + "}"
