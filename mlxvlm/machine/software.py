"""Versions: Python, MLX, mlx-lm, the system, and whether they go together. Imports none of them."""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata

from .. import __version__
from .finding import NOTE, OK, WRONG, Finding
from .macos import ask

AREA = "Software"
# Releases that mlxvlm works with: from the first, below the second. As pyproject.toml has them.
KNOWN = {"mlx": ("0.32.2", ""), "mlx-lm": ("0.32", "0.33")}
LEAST_PYTHON = (3, 11)
# MLX's wheels start here; memory can be wired from the second; M5's matrix units from the third.
LEAST_MACOS, WIRING_MACOS, MATRIX_MACOS = (14,), (15,), (26, 2)
ANEW = "pip install --force-reinstall mlx mlx-metal"


def software() -> list[Finding]:
    """Everything that a bug report begins with."""
    found = [_python(), _system(), Finding(AREA, "mlxvlm", OK, __version__)]
    found += [_package(name) for name in KNOWN]
    if sys.platform == "darwin":
        found.append(_metal())
    return found


def installed(name: str) -> str | None:
    """The version of an installed package; None if it is not."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """(0, 32, 4) of "0.32.4", "0.32.4.dev1" or "0.32.4rc1"."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _python() -> Finding:
    says = f"{platform.python_version()}, built for {platform.machine()}"
    if sys.platform == "darwin" and platform.machine() != "arm64":
        done = ask("/usr/sbin/sysctl", "-n", "sysctl.proc_translated")
        rosetta = done is not None and done.stdout.strip() == "1"
        under = ", which runs under Rosetta" if rosetta else ""
        remedy = "MLX needs an arm64 Python on Apple silicon: install one, and mlxvlm with it."
        return Finding(AREA, "Python", WRONG, says + under, remedy)
    if sys.version_info[:2] < LEAST_PYTHON:
        return Finding(AREA, "Python", WRONG, says, "Install Python 3.11 or newer.")
    return Finding(AREA, "Python", OK, says)


def _system() -> Finding:
    if sys.platform != "darwin":
        name = platform.system()
        try:
            name = platform.freedesktop_os_release().get("PRETTY_NAME", name)
        except OSError:
            pass  # not every Linux says what it is
        return Finding(AREA, "system", OK, f"{name}, kernel {platform.release()}")
    version = platform.mac_ver()[0]
    says, have = f"macOS {version}", numbers(version)
    if have < LEAST_MACOS:
        return Finding(AREA, "system", WRONG, says, "MLX needs macOS 14 or newer: update it.")
    if have < WIRING_MACOS:
        remedy = "From macOS 15 on, large models stay in memory better: update when you can."
        return Finding(AREA, "system", NOTE, says, remedy)
    if _has_matrix_units() and have < MATRIX_MACOS:
        remedy = "M5's matrix units, 3 to 4 times as quick, need macOS 26.2 or newer: update it."
        return Finding(AREA, "system", NOTE, says, f"{remedy} Then:\n{ANEW}")
    return Finding(AREA, "system", OK, says)


def _package(name: str) -> Finding:
    least, below = KNOWN[name]
    wanted = f"{least} or newer" + (f", below {below}" if below else "")
    asked = f"{name}>={least}" + (f",<{below}" if below else "")
    version = installed(name)
    remedy = f"Install a release that mlxvlm knows:\npip install '{asked}'"
    if version is None:
        return Finding(AREA, name, WRONG, f"not installed (needed: {wanted})", remedy)
    fits = numbers(version) >= numbers(least) and not (below and numbers(version) >= numbers(below))
    if not fits:
        return Finding(AREA, name, WRONG, f"{version} (needed: {wanted})", remedy)
    return Finding(AREA, name, OK, version)


def _metal() -> Finding:
    """mlx-metal: MLX's own half, of its version, built for this macOS."""
    version, other = installed("mlx-metal"), installed("mlx")
    if version is None or version != other:
        says = f"{version or 'not installed'}, beside mlx {other or '(none)'}"
        return Finding(AREA, "mlx-metal", WRONG, says, f"They must be of one version:\n{ANEW}")
    text = metadata.distribution("mlx-metal").read_text("WHEEL") or ""
    built = re.search(r"macosx_(\d+)_", text)
    have = numbers(platform.mac_ver()[0])
    if built is None or not have:
        return Finding(AREA, "mlx-metal", OK, version)
    says = f"{version}, built for macOS {built[1]}"
    if int(built[1]) > have[0]:
        return Finding(AREA, "mlx-metal", WRONG, says, f"This macOS is older:\n{ANEW}")
    if _has_matrix_units() and have >= MATRIX_MACOS and int(built[1]) < MATRIX_MACOS[0]:
        remedy = f"It leaves M5's matrix units unused, pip chose it before the update:\n{ANEW}"
        return Finding(AREA, "mlx-metal", NOTE, says, remedy)
    return Finding(AREA, "mlx-metal", OK, says)


def _has_matrix_units() -> bool:
    done = ask("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
    generation = re.search(r"\bM(\d+)\b", done.stdout) if done else None
    return bool(generation) and int(generation[1]) >= 5
