"""Memory stays flat over a run, however long."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent / "benchmarks" / "cache_memory.py"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells RSS at a time")
def test_memory_does_not_grow_with_rows():
    """4,000 rows after the thousandth; their pixels would be 12 MB, their features 8."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--rows", "5000", "--goal", "6"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rows 5,000" in done.stdout
