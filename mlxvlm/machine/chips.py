"""What a computer can hold and compute: Apple's chips by name, and this one."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from ..errors import UsageError
from .ceilings import matmul_rate
from .limits import gpu_memory, memory_size
from .macos import ask

GB = 10**9


@dataclass(frozen=True)
class Chip:
    """tflops: the GPU's peak in float32 and float16; estimated: of M5's matrix units, which Apple
    gives no rate of. bandwidth: of its memory, in GB/s."""

    tflops: float
    bandwidth: float
    estimated: bool = False


# The largest GPU of each. M1 to M4: float32 peak of the shader cores; M5: 3.5 times its M4.
CHIPS = {
    "M1": Chip(2.6, 68),
    "M1 Pro": Chip(5.2, 200),
    "M1 Max": Chip(10.4, 400),
    "M1 Ultra": Chip(20.8, 800),
    "M2": Chip(3.6, 100),
    "M2 Pro": Chip(6.8, 200),
    "M2 Max": Chip(13.5, 400),
    "M2 Ultra": Chip(27.0, 800),
    "M3": Chip(4.1, 100),
    "M3 Pro": Chip(7.4, 150),
    "M3 Max": Chip(16.3, 400),
    "M3 Ultra": Chip(32.0, 819),
    "M4": Chip(4.6, 120),
    "M4 Pro": Chip(9.2, 273),
    "M4 Max": Chip(18.4, 546),
    "M5": Chip(16, 153, True),
    "M5 Pro": Chip(32, 307, True),
    "M5 Max": Chip(64, 614, True),
}

# Shares of the peak that training reached on Apple's chips where it was published: 35 to 46% (LoRA
# of a 7B, M2 Ultra), and 60 to 78% for a forward pass alone.
TRAINING_SHARE = 0.5
TRAINING_RANGE = (0.35, 0.65)
ENCODING_SHARE = 0.6

# What macOS lets the GPU have of the RAM, about.
GPU_SHARES = ((36 * 2**30, 2 / 3), (float("inf"), 3 / 4))
CPU_SHARE = 0.9


@dataclass
class Machine:
    """A computer to plan for.

    memory: bytes of RAM; usable: bytes of it that a run may take. tflops: its peak; low, high: the
    rates, in TFLOP/s, that training may be expected to reach. here: it is this one.
    """

    name: str
    memory: int
    usable: int
    tflops: float
    low: float
    high: float
    here: bool
    note: str = ""

    @property
    def rate(self) -> float:
        """FLOP/s that a training run is reckoned with."""
        if self.low == self.high:
            return 1e12 * self.low
        return 1e12 * TRAINING_SHARE * self.tflops


def machine(memory: str | None = None, chip: str | None = None) -> Machine:
    """The computer that is meant: this one, or as much memory and the chip that are named."""
    wanted = None if chip is None else find_chip(chip)
    size = None if memory is None else parse_memory(memory)
    found = None if wanted else this_chip()
    total = size or memory_size()
    apple = wanted or found
    if apple is None and (size is None or sys.platform != "darwin"):
        rate = matmul_rate() / 1e12
        note = f"{rate:.2g} TFLOP/s in a matrix product just now"
        usable = int(CPU_SHARE * total) if size is None else _gpu_share(total)
        return Machine("this computer", total, usable, rate, rate, rate, True, note)
    name, known = apple or ("M1", CHIPS["M1"])
    told = "about " if known.estimated else ""
    note = f"{told}{known.tflops:g} TFLOP/s at its peak, {known.bandwidth:g} GB/s"
    low, high = (known.tflops * share for share in TRAINING_RANGE)
    here = wanted is None and size is None
    usable = gpu_memory() if here else None
    return Machine(name, total, usable or _gpu_share(total), known.tflops, low, high, here, note)


def find_chip(name: str) -> tuple[str, Chip]:
    """A chip by its name, as Apple or a user writes it."""
    words = re.sub(r"\s+", " ", name.strip()).casefold().removeprefix("apple ")
    for known, chip in CHIPS.items():
        if words == known.casefold() or words == known.casefold().replace(" ", ""):
            return known, chip
    raise UsageError(f"--chip (={name!r}) must be one of {', '.join(CHIPS)}.")


def this_chip() -> tuple[str, Chip] | None:
    """This Mac's chip; None elsewhere, or for one that the table does not have."""
    done = ask("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
    if done is None or done.returncode:
        return None
    try:
        return find_chip(done.stdout)
    except UsageError:
        return None


def parse_memory(text: str) -> int:
    """Bytes of "16GB", "16 GB", "16" or "0.5TB"; RAM is sold in powers of two."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(MB|MIB|GB|GIB|TB|TIB|G|T|M)?\s*", text.upper())
    size = float(found[1]) if found else 0.0
    if not found or not size:
        raise UsageError(f"--memory (={text!r}) must be a size such as 16GB.")
    return int(size * {"M": 2**20, "G": 2**30, "T": 2**40}[(found[2] or "G")[0]])


def _gpu_share(total: int) -> int:
    share = next(share for most, share in GPU_SHARES if total <= most)
    return int(share * total)
