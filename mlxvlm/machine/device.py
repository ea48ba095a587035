"""What MLX computes on, and what it may hold."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..amount import amount
from . import limits
from .finding import NOTE, OK, WRONG, Finding
from .macos import ask

AREA = "Machine"
NVIDIA = Path("/proc/driver/nvidia/version")
# Of the RAM: beyond it nothing is left for macOS, which then stops answering.
MOST_WIRED = 0.9
SMALL = 8 * 2**30
MUCH_SWAPPED = 2 * 2**30


def devices() -> list[Finding]:
    """The device, memory, and open files."""
    found = [_device(), _memory()]
    wired = limits.wired_limit()
    if wired is not None:
        found.append(_wired(wired))
    swapped = _swapped()
    if swapped is not None:
        found.append(_swap(swapped))
    return [*found, _files()]


def _device() -> Finding:
    info: dict[str, Any] = mx.device_info()
    name = info.get("device_name", "unknown")
    if mx.default_device() == mx.gpu:
        return Finding(AREA, "device", OK, f"{name}, its GPU ({info.get('architecture', '?')})")
    says = f"{name}, its CPU"
    if sys.platform == "darwin":
        remedy = (
            "MLX sees no GPU: it needs Apple silicon, and a session that may use the GPU (no "
            "sandbox, no virtual machine without one)."
        )
        return Finding(AREA, "device", WRONG, says, remedy)
    if NVIDIA.exists():
        remedy = "There is an NVIDIA driver. To use it (or cuda12):\npip install 'mlxvlm[cuda13]'"
        return Finding(AREA, "device", NOTE, says, remedy)
    return Finding(AREA, "device", OK, says)


def _memory() -> Finding:
    size, gpu = limits.memory_size(), limits.gpu_memory()
    says = f"{size / 2**30:.0f} GB"
    if gpu is not None:
        says += f"; Metal advises at most {amount(gpu)} for the GPU at once"
    if size < SMALL:
        remedy = "Models of up to 2 GB fit: 4-bit ones of 1 to 3 B. `mlxvlm plan` says more."
        return Finding(AREA, "memory", NOTE, says, remedy)
    return Finding(AREA, "memory", OK, says, "What could be trained here: mlxvlm plan")


def _wired(size: int) -> Finding:
    if not size:
        says = "iogpu.wired_limit_mb is 0: macOS decides what the GPU may keep"
        return Finding(AREA, "wired limit", OK, says)
    says = f"iogpu.wired_limit_mb is {size // 2**20:,}: the GPU may keep {amount(size)}"
    if size > MOST_WIRED * limits.memory_size():
        remedy = (
            "That leaves macOS too little, and it may freeze:\nsudo sysctl iogpu.wired_limit_mb="
            f"{int(0.8 * limits.memory_size()) // 2**20}"
        )
        return Finding(AREA, "wired limit", WRONG, says, remedy)
    return Finding(AREA, "wired limit", OK, says)


def _swapped() -> int | None:
    """Bytes that a Mac has swapped out; None elsewhere."""
    done = ask("/usr/sbin/sysctl", "-n", "vm.swapusage")
    used = re.search(r"used = ([\d.]+)M", done.stdout) if done else None
    return int(float(used[1]) * 2**20) if used else None


def _swap(size: int) -> Finding:
    if size < MUCH_SWAPPED:
        return Finding(AREA, "swap", OK, f"{amount(size)} in use")
    remedy = "Memory is short, and a run would be slow: close programs that hold much of it."
    return Finding(AREA, "swap", NOTE, f"{amount(size)} in use", remedy)


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= limits.OPEN_FILES:
        return Finding(AREA, "open files", OK, f"{_count(soft)}, lifted where more are needed")
    remedy = f"Caches of many shards may need more: ulimit -Hn {limits.OPEN_FILES}, as root."
    return Finding(AREA, "open files", NOTE, f"at most {_count(hard)}", remedy)


def _count(limit: int) -> str:
    return "any number" if limit == resource.RLIM_INFINITY else f"{limit:,}"
