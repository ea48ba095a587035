"""What a command may take of this computer, and keeping it awake meanwhile.

MLX keeps freed buffers for reuse, without a bound that matters: 51 GB held where 7 were in use has
been seen. A bound costs little, because buffers of the usual sizes stay.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from .macos import ask

# Freed memory that MLX may keep. A training step reuses the same large buffers again and again; an
# encoder or a chat meets ever new sizes.
TRAINING_SHARE = 0.25
SERVING_SHARE = 0.1
SERVING_MOST = 2 * 10**9
OPEN_FILES = 8192


def limit_training() -> int:
    """Bounds MLX's cache of freed buffers for a training run; the bytes."""
    return _limit_cache(int(TRAINING_SHARE * memory_size()))


def limit_serving() -> int:
    """Bounds MLX's cache of freed buffers for encoding and chat; the bytes."""
    return _limit_cache(min(SERVING_MOST, int(SERVING_SHARE * memory_size())))


def memory_size() -> int:
    """Bytes of RAM; MLX tells them on Metal only."""
    told = mx.device_info().get("memory_size")
    return int(told or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def gpu_memory() -> int | None:
    """Bytes that Metal advises the GPU to hold at once; None where MLX does not tell them."""
    told = mx.device_info().get("max_recommended_working_set_size")
    return int(told) if told else None


def wired_limit() -> int | None:
    """Bytes of `iogpu.wired_limit_mb`: what the GPU may keep from being swapped, 0 for what macOS
    decides itself; None where there is no such setting."""
    done = ask("/usr/sbin/sysctl", "-n", "iogpu.wired_limit_mb")
    if done is None or done.returncode or not done.stdout.strip().isdecimal():
        return None
    return int(done.stdout) * 2**20


def allow_open_files() -> None:
    """Lifts the soft limit of open files, 256 on macOS, as far as the system lets a process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def awake() -> Iterator[None]:
    """Keeps a Mac from falling asleep while the block runs; does nothing elsewhere.

    The display may sleep, and should: macOS stops GPU work that competes with drawing the screen.
    """
    if sys.platform != "darwin":
        yield
        return
    command = ["/usr/bin/caffeinate", "-i", "-m", "-w", str(os.getpid())]
    try:
        guard = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError:
        yield  # a run that may be cut short by sleep is better than none
        return
    try:
        yield
    finally:
        guard.terminate()
        guard.wait()


def _limit_cache(size: int) -> int:
    mx.set_cache_limit(size)
    return size
