"""Whether this process is one of several that `mlx.launch` (or mpirun) has started together."""

from __future__ import annotations

import os

import mlx.core as mx

from ..errors import VLMError

# What they set in each process that they start.
_LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def launched_group() -> mx.distributed.Group | None:
    """The processes that were started together; None where this one is alone."""
    number = next((os.environ[name] for name in _LAUNCHED if name in os.environ), None)
    if number is None:
        return None
    group = mx.distributed.init()
    if group.size() > 1:
        return group
    if int(number):
        # Alone, it would do all of the work and write where the first one does.
        raise VLMError(
            f"process {number} of a launch cannot reach the others: check --backend and the "
            "addresses of mlx.launch."
        )
    return None
