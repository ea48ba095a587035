"""A command on several processes, through mlx.launch, with an exit code that tells the truth.

mlx.launch ends with 0 whatever becomes of its processes. So the first of them leaves a mark when
all have finished (they wait for each other at the end), and without that mark the command failed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from mlxvlm.errors import UsageError, VLMError

# Where the first rank leaves its mark.
MARK = "MLXVLM_DONE"


def launch(arguments: list[str], ranks: int, hostfile: str = "") -> None:
    """Runs `mlxvlm ARGUMENTS` on `ranks` processes here, or on the machines of a host file."""
    launcher = Path(sys.executable).with_name("mlx.launch")
    if not launcher.is_file():
        raise UsageError(f"--ranks needs mlx.launch, which is not beside {sys.executable}.")
    with tempfile.TemporaryDirectory(prefix="mlxvlm-ranks-") as folder:
        mark = Path(folder) / "done"
        where = ["--hostfile", hostfile] if hostfile else ["-n", str(ranks), "--backend", "ring"]
        command = [
            str(launcher),
            *where,
            *("--starting-port", str(_free_ports(max(1, ranks)))),
            *("--env", f"{MARK}={mark}"),
            *(f"--env=PYTHONPATH={path}" for path in [os.environ.get("PYTHONPATH")] if path),
            *("--python", sys.executable),
            "--",
            *("-m", "mlxvlm", *arguments),
        ]
        # It passes what it reads to every rank; of a closed input it would read without a pause.
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            _wait(process)
        if not mark.exists():
            raise VLMError(
                "not every rank finished (see above). A run with checkpoints goes on with --resume."
            )


def _wait(process: subprocess.Popen) -> None:
    """Ctrl-C reaches the ranks as well, which finish their step and save it: they are waited for.
    A second one ends the waiting."""
    try:
        process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def leave_mark() -> None:
    """Of the first rank, once all have finished; nothing without `launch`."""
    if path := os.environ.get(MARK):
        Path(path).touch()


def is_launched() -> bool:
    return MARK in os.environ


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nothing listens on."""
    for _ in range(100):
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            start = first.getsockname()[1]
        try:
            for port in range(start, start + count):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
        except OSError:
            continue
        return start
    raise VLMError(f"found no {count} neighbouring ports free on this machine.")
