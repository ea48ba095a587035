"""Memory of a caching run: RSS at its 1,000th and its last row, of synthetic rows.

    python tests/benchmarks/cache_memory.py [--rows 100000] [--goal 150]

The pictures are tiny PNGs, each of its own, packed in tars (as files they would take a minute to
make); the encoder is a SigLIP of width 32, and shards hold 256 pictures. Exit 1 if memory grew by
as much as the goal, in MB, after the 1,000th row.
"""

from __future__ import annotations

import argparse
import io
import resource
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]


def png(number: int, side: int = 8) -> bytes:
    """An 8 x 8 picture whose pixels spell its number."""
    pixels = number.to_bytes(4, "big") * (side * side * 3 // 4)
    lines = b"".join(b"\0" + pixels[i * side * 3 : (i + 1) * side * 3] for i in range(side))
    parts = [
        (b"IHDR", side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])),
        (b"IDAT", zlib.compress(lines, 1)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        for kind, data in parts
    )


def pack(folder: Path, rows: int, each: int = 10_000) -> Path:
    """Tars of `each` pictures with a caption, in `folder`."""
    folder.mkdir()
    for start in range(0, rows, each):
        with tarfile.open(folder / f"part-{start // each:03}.tar", "w") as tar:
            for number in range(start, min(start + each, rows)):
                for suffix, data in (("png", png(number)), ("txt", b"A picture.")):
                    info = tarfile.TarInfo(f"{number:08}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def rss() -> int:
    """Bytes of memory held now, or the most ever held where the system tells no more."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most
    return pages * resource.getpagesize()


def measure(rows: int, first: int, folder: Path, encoder: Any) -> dict[str, float]:
    """Caches `rows` pictures; bytes held at the `first` row and the most that was held after it."""
    from mlxvlm.cache.inputs import picture_sources
    from mlxvlm.cache.writer import write_cache

    started = time.monotonic()
    sources, bad = picture_sources(pack(folder / "tars", rows))
    assert len(sources) == rows and not bad
    seen: list[tuple[int, int]] = []
    listed = rss()
    began = time.monotonic()
    write_cache(
        encoder,
        sources,
        folder / "cache",
        "bf16",
        batch_size=32,
        progress=lambda summary: seen.append((summary.done, rss())),
    )
    at_first = next(held for done, held in seen if done >= first)
    return {
        "rows": rows,
        "prepared_s": began - started,
        "seconds": time.monotonic() - began,
        "listed": listed,
        "at_first": at_first,
        "most": max(held for done, held in seen if done >= first),
        "at_last": seen[-1][1],
    }


def lines(found: dict[str, float], goal: float) -> Iterator[str]:
    yield f"rows {found['rows']:,} in {found['seconds']:.0f} s"
    for name in ("listed", "at_first", "at_last", "most"):
        yield f"RSS {name:<9} {found[name] / 2**20:8.1f} MB"
    yield f"grown from the first thousand: {grown(found):.1f} MB (goal: under {goal:g})"


def grown(found: dict[str, float]) -> float:
    return (found["most"] - found["at_first"]) / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--goal", type=float, default=150)
    options = parser.parse_args()
    from tiny_cache import siglip

    from mlxvlm.machine import limits

    limits.limit_serving()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.rows, 1000, Path(folder), siglip())
    print("\n".join(lines(found, options.goal)))
    return int(grown(found) >= options.goal)


if __name__ == "__main__":
    sys.exit(main())
