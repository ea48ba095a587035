"""The names that scripts rely on: add to them, never break them."""

import subprocess
import sys

import pytest

import mlxvlm
from mlxvlm.backend import missing_backend

FACE = ["VLM", "EmbeddingCache", "Features", "Picture", "Reuse", "VLMError", "__version__", "load"]


def test_exported_names():
    assert sorted(mlxvlm.__all__) == sorted(FACE)


@pytest.mark.parametrize("name", FACE)
def test_each_name_resolves(name):
    value = getattr(mlxvlm, name)
    assert value is not None
    if name not in ("__version__", "load"):
        assert value.__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        mlxvlm.lod  # noqa: B018


def test_import_is_light():
    """`import mlxvlm` alone loads neither MLX nor anything that takes a second."""
    code = "import sys, mlxvlm; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not loaded & {"mlx", "mlx_lm", "transformers", "numpy", "PIL", "typer"}


# Stands in for an environment where `import mlx.core` fails with `error`.
NO_MLX = """
import sys
from importlib.abc import MetaPathFinder

class NoMLX(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mlx":
            raise {error}

sys.meta_path.insert(0, NoMLX())
sys.platform = "linux"
import mlxvlm
try:
    mlxvlm.VLM
except mlxvlm.VLMError as error:
    print(error)
"""
ERRORS = {
    "no mlx": """ModuleNotFoundError("No module named 'mlx'", name="mlx")""",
    "no backend": """ImportError(
        "libmlx.so: cannot open shared object file: No such file or directory",
        name="core", path="/venv/mlx/core.cpython-311-x86_64-linux-gnu.so")""",
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_without_a_backend_an_import_says_which_extra_to_install(error):
    code = NO_MLX.format(error=error)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for extra in ("cpu", "cuda12", "cuda13"):
        assert f"'mlxvlm[{extra}]'" in done.stdout


@pytest.mark.parametrize("machine", ["arm64", "x86_64"])
def test_on_a_mac_the_way_out_is_another(machine, monkeypatch):
    monkeypatch.setattr("mlxvlm.backend.sys.platform", "darwin")
    monkeypatch.setattr("mlxvlm.backend.platform.machine", lambda: machine)
    message = missing_backend(ModuleNotFoundError("No module named 'mlx'", name="mlx"))
    assert message is not None
    assert ("--force-reinstall" in message) == (machine == "arm64")
    assert ("arm64 Python" in message) == (machine == "x86_64")


def test_other_missing_modules_are_not_the_backend():
    assert missing_backend(ModuleNotFoundError("No module named 'mlxtend'", name="mlxtend")) is None
    assert missing_backend(ImportError("cannot import name 'x' from 'y'", name="y")) is None
    assert missing_backend(ValueError("mlx")) is None
