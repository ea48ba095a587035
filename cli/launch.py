"""A command on several processes, with an exit code that tells the truth.

On this machine they are started here: mlx.launch polls without a pause, which takes a core from the
ranks. On several machines mlx.launch starts them, and ends with 0 whatever becomes of them. So the
first rank leaves a mark when all have finished (they wait for each other at the end), and without
that mark the command failed.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mlxvlm.errors import UsageError, VLMError

# Where the first rank leaves its mark.
MARK = "MLXVLM_DONE"
# Seconds between two looks at the ranks, and what the others get to end by themselves.
LOOK, GRACE = 0.2, 10.0
UNFINISHED = "not every rank finished (see above). A run with checkpoints goes on with --resume."


def launch(arguments: list[str], ranks: int, hostfile: str = "") -> None:
    """Runs `mlxvlm ARGUMENTS` on `ranks` processes here, or on the machines of a host file."""
    with tempfile.TemporaryDirectory(prefix="mlxvlm-ranks-") as folder:
        mark = Path(folder) / "done"
        if hostfile:
            _elsewhere(arguments, hostfile, mark)
        else:
            _here(arguments, ranks, mark)
        if not mark.exists():
            raise VLMError(UNFINISHED)


def _here(arguments: list[str], ranks: int, mark: Path) -> None:
    """The ranks in a ring on this machine, as MLX's "ring" backend reads it from its variables."""
    start = _free_ports(ranks)
    hosts = mark.with_name("hosts.json")
    hosts.write_text(json.dumps([[f"127.0.0.1:{start + rank}"] for rank in range(ranks)]))
    found = {**os.environ, MARK: str(mark), "MLX_HOSTFILE": str(hosts)}
    command = [sys.executable, "-m", "mlxvlm", *arguments]
    processes: list[subprocess.Popen] = []
    try:
        for rank in range(ranks):
            environment = {**found, "MLX_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL))
        _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _elsewhere(arguments: list[str], hostfile: str, mark: Path) -> None:
    launcher = Path(sys.executable).with_name("mlx.launch")
    if not launcher.is_file():
        raise UsageError(f"--hostfile needs mlx.launch, which is not beside {sys.executable}.")
    command = [
        str(launcher),
        *("--hostfile", hostfile),
        *("--starting-port", str(_free_ports(1))),
        *("--env", f"{MARK}={mark}"),
        *(f"--env=PYTHONPATH={path}" for path in [os.environ.get("PYTHONPATH")] if path),
        *("--python", sys.executable),
        "--",
        *("-m", "mlxvlm", *arguments),
    ]
    # It passes what it reads to every rank; of a closed input it would read without a pause.
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        _wait([process])


def _wait(processes: list[subprocess.Popen]) -> None:
    """Until all have ended. Where one fails, the others would wait for it for ever: they get a
    while to say what they have to say.

    Ctrl-C reaches the ranks as well, which finish their step and save it: they are waited for. A
    second one ends the waiting.
    """
    try:
        _watch(processes)
    except KeyboardInterrupt:
        _watch(processes)
        raise


def _watch(processes: list[subprocess.Popen]) -> None:
    deadline = None
    while any(process.poll() is None for process in processes):
        if deadline is None and any(process.poll() for process in processes):
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            return
        time.sleep(LOOK)


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
