"""What this computer does at its best: the ceilings that a model's rates are held against.

All are measured, through MLX and by the same files that a cache is written with, so that a share of
them says how much of the way is left for this program to go and not how good the hardware is.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..durable import sync, write_all
from .limits import memory_size

# A product is made larger until it takes so long (seconds): a GPU's start-up is no part of it.
LONG_ENOUGH = 0.008
SMALLEST, LARGEST = 256, 8192
# Arrays to stream: larger than caches, and a small part of the memory.
STREAM = (256 * 2**20, 2**30)


def best_seconds(work: Callable[[], Any], seconds: float) -> float:
    """The quickest of several runs of `work`, for about so long; one before them is not counted."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def matmul_rate(dtype: mx.Dtype = mx.float32, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product, 2 n^3 of them, on the default device."""
    side = SMALLEST
    while True:
        a = mx.random.uniform(shape=(side, side), key=mx.random.key(0)).astype(dtype)
        mx.eval(a)
        took = best_seconds(lambda a=a: mx.eval(a @ a), 0)
        if took > LONG_ENOUGH or side >= LARGEST:
            break
        side *= 2
    took = min(took, best_seconds(lambda: mx.eval(a @ a), seconds))
    return 2 * side**3 / took


def memory_rate(seconds: float = 0.3) -> float:
    """Bytes a second that arrays are streamed with on the default device: the better of reading
    alone (a maximum) and reading and writing (a sum of two arrays)."""
    least, most = STREAM
    size = least if mx.default_device() == mx.cpu else min(most, max(least, memory_size() // 32))
    a = mx.ones((size // 4,), mx.float32)
    b = mx.zeros((size // 4,), mx.float32)
    mx.eval(a, b)
    reading = best_seconds(lambda: mx.eval(a.max()), seconds / 2)
    adding = best_seconds(lambda: mx.eval(a + b), seconds / 2)
    return max(size / reading, 3 * size / adding)


def disk_rates(folder: Path, size: int) -> tuple[float, float]:
    """Bytes a second of one plain file of `size` bytes: written and synced, and read again.

    What has just been written is read from memory, mostly.
    """
    block = os.urandom(min(size, 2**20))
    data = block * max(1, size // len(block))

    def write() -> None:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="ceiling-") as file:
            write_all(file.fileno(), data)
            sync(file.fileno())

    writing = best_seconds(write, 0)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="ceiling-") as file:
        write_all(file.fileno(), data)

        def read() -> None:
            file.seek(0)
            file.read()

        reading = best_seconds(read, 0)
    return len(data) / writing, len(data) / reading
