"""Which library multiplies MLX's matrices on a Linux CPU.

MLX's wheels for Linux bring the reference BLAS, which is some twenty times slower in float32 than
the processor is. Another one that is loaded first takes its place.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from .ceilings import matmul_rate
from .finding import NOTE, OK, Finding

FAST = re.compile(r"/lib(openblas|mkl_rt|blis|flexiblas|armpl|nvpl_blas)[^/]*$")
FOLDERS = ("/usr/lib/*", "/usr/lib64", "/usr/lib", "/usr/local/lib", "/opt/*/lib")
NAMES = ("openblas-pthread/libopenblas.so.0", "libopenblas.so.0", "libopenblasp.so.0")
# Rates are told apart from here on.
WORTH = 2.0
SECONDS = 0.5
MEASURE = f"from mlxvlm.machine.ceilings import matmul_rate; print(matmul_rate(seconds={SECONDS}))"
INSTALL = (
    "Install OpenBLAS (apt install libopenblas0-pthread, or dnf install openblas) and let it be "
    "loaded first, with LD_PRELOAD; `mlxvlm doctor` then says where it is."
)


def blas() -> Finding:
    """The float32 rate as it is, and with a faster library that is installed here."""
    rate, fast = matmul_rate(seconds=SECONDS), loaded()
    says = f"{_told(rate)} in float32 products"
    if fast is not None:
        return Finding("Machine", "BLAS", OK, f"{says}, by {fast}")
    says += ", by the reference BLAS that came with MLX"
    path = available()
    if path is None:
        return Finding("Machine", "BLAS", NOTE, says, INSTALL)
    better = rate_with(path)
    if better is None:
        remedy = f"{path} is here, and does not load: install it anew. {INSTALL}"
        return Finding("Machine", "BLAS", NOTE, says, remedy)
    if better < WORTH * rate:
        says += f"; {_told(better)} by {path}, which is no great difference"
        return Finding("Machine", "BLAS", OK, says)
    remedy = f"{_told(better)} with it loaded first:\nexport LD_PRELOAD={shlex.quote(str(path))}"
    return Finding("Machine", "BLAS", NOTE, says, remedy)


def loaded(maps: Path = Path("/proc/self/maps")) -> str | None:
    """The name of a fast BLAS in this process; None without one."""
    try:
        lines = maps.read_text(errors="replace").splitlines()
    except OSError:
        return None
    found = (FAST.search(line) for line in lines)
    return next((match[0][1:] for match in found if match), None)


def available() -> Path | None:
    """An OpenBLAS of this system."""
    root = Path("/")
    for name in NAMES:
        for folder in FOLDERS:
            for path in sorted(root.glob(f"{folder[1:]}/{name}")):
                return path
    return None


def rate_with(path: Path) -> float | None:
    """FLOP/s in a process that loads this library first; None if it cannot."""
    before = os.environ.get("LD_PRELOAD")
    preload = f"{path}:{before}" if before else str(path)
    try:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE],
            env={**os.environ, "LD_PRELOAD": preload},
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        return float(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _told(rate: float) -> str:
    return f"{rate / 1e9:.3g} GFLOP/s"
