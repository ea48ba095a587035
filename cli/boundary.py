"""Where errors become exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

A user's error is one line on stderr and never a traceback; a bug keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from mlxvlm.backend import missing_backend
from mlxvlm.errors import UsageError, VLMError

FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130

# What MLX says when the GPU or the memory fails, and what helps. The first match counts.
MACHINE_ADVICE = (
    (
        "Impacting Interactivity",
        "macOS stopped this program because the GPU was also needed to draw the screen. Let the "
        "display sleep (pmset displaysleepnow) or work over SSH, then run the command again; a "
        "training run goes on from its last checkpoint with --resume.",
    ),
    (
        "Resource limit",
        "Too many GPU buffers are alive. Run the command again (training: with --resume), with "
        "fewer different lengths (a smaller --max-seq-length) if it comes back.",
    ),
    (
        "Timeout",
        "One piece of GPU work took too long. Close other programs that use the GPU, or use a "
        "smaller --batch-size; a training run goes on from its last checkpoint with --resume.",
    ),
    (
        "Insufficient Memory",
        "The GPU ran out of memory. Use a smaller --batch-size or --max-seq-length, "
        "--grad-checkpoint in training, or a smaller or quantised model.",
    ),
    (
        "[metal::malloc]",
        "The GPU ran out of memory. Use a smaller --batch-size or --max-seq-length, "
        "--grad-checkpoint in training, or a smaller or quantised model.",
    ),
    (
        "[malloc",
        "The memory ran out. Use a smaller --batch-size or --max-seq-length, --grad-checkpoint in "
        "training, or a smaller or quantised model.",
    ),
    (
        "No Metal device",
        "MLX found no GPU. It needs Apple silicon and a session that may use the GPU.",
    ),
    (
        "[METAL]",
        "The GPU gave up, and nothing computed after that can be trusted. Run the command again; "
        "a training run goes on from its last checkpoint with --resume.",
    ),
)


class Boundary(TyperGroup):
    """The root group of the commands: every error of every command passes here, and only here."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a reader who has left shows here, not at exit
            return result
        except BrokenPipeError:
            # What is still buffered goes nowhere, so that Python's own flush at exit is quiet too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(FAILED) from None
        except KeyboardInterrupt:
            typer.echo("mlxvlm: interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            message = describe(error)
            if message is None:
                raise
            typer.echo(f"mlxvlm: error: {message}", err=True)
            wrong = isinstance(error, UsageError)
            raise typer.Exit(WRONG_USAGE if wrong else FAILED) from None


def describe(error: Exception) -> str | None:
    """The line for an error that a user can mend; None for a bug."""
    if isinstance(error, VLMError):
        return str(error)
    if isinstance(error, ImportError):
        return missing_backend(error)
    if isinstance(error, OSError):
        name = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{name}"
    if isinstance(error, MemoryError):
        return "The memory ran out. Use a smaller --batch-size, or a smaller or quantised model."
    if isinstance(error, RuntimeError):
        for sign, advice in MACHINE_ADVICE:
            if sign in str(error):
                return f"{advice}\nMLX says: {error}"
    return None
