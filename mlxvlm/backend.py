"""What to install when MLX, or the backend that it computes with, is missing.

On macOS arm64 `pip install mlxvlm` brings MLX with Metal. On Linux the backend is a choice, so it
is an extra, under mlx-lm's own names: cpu, cuda12, cuda13.
"""

from __future__ import annotations

import platform
import sys


def missing_backend(error: BaseException) -> str | None:
    """The way out if this ImportError means that MLX cannot compute here, else None.

    Two forms: no `mlx` at all, or `mlx` without its library (its `core` cannot be loaded).
    """
    if not isinstance(error, ImportError):
        return None
    if isinstance(error, ModuleNotFoundError):
        if (error.name or "").partition(".")[0] != "mlx":
            return None
        what = "MLX is not installed"
    elif "libmlx" in str(error) or "/mlx/core" in (error.path or ""):
        what = f"MLX is installed without a backend that loads here ({error})"
    else:
        return None
    return f"{what}. {_way_out()}"


def _way_out() -> str:
    if sys.platform == "darwin":
        if platform.machine() != "arm64":
            return (
                f"This Python is built for {platform.machine()}, and MLX needs an arm64 Python on "
                "Apple silicon: install one and try again."
            )
        return "Install it anew: pip install --force-reinstall mlx mlx-metal"
    return (
        "Install one backend: pip install 'mlxvlm[cpu]', or 'mlxvlm[cuda12]' or 'mlxvlm[cuda13]' "
        "for an NVIDIA GPU."
    )
