"""Bytes as people read them."""

from __future__ import annotations


def amount(count: float) -> str:
    """Three digits in decimal units, as disks and the hub count: 7 bytes, 1.5 kB, 16.1 GB."""
    value, unit = float(round(count)), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if float(f"{value:.3g}") < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if value >= 100 or unit == "bytes" else f"{value:.3g} {unit}"
