"""What every test stands on: no network, no TF32, the same seed.

MLXVLM_TEST_DEVICE=cpu   runs on the CPU where the default device is a GPU
MLXVLM_TEST_COMPILE=1    lets mx.compile work on the CPU, where each kernel costs a run of g++
"""

import os
import random
import signal

# Before MLX and the Hugging Face libraries are imported, here and in every child process.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell that starts a program in the background has it ignore Ctrl-C, and its children too.
signal.signal(signal.SIGINT, signal.default_int_handler)

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

if os.environ.get("MLXVLM_TEST_DEVICE") == "cpu":
    mx.set_default_device(mx.cpu)
if mx.default_device() == mx.cpu:
    # On the CPU each compiled kernel costs a run of g++; a slow test in test_metal.py pays it.
    os.environ["MLX_DISABLE_COMPILE"] = "1"
    mx.disable_compile()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    mx.random.seed(0)
    return 0
