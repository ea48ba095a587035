"""The two links, the console script, and what a build may hold (tests/check_dist.py)."""

import ast
import importlib
import io
import tarfile
import tomllib
import zipfile
from pathlib import Path

import check_dist
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("room", ["cli", "weights"])
def test_the_links_lead_to_files(room):
    """A checkout without links would have a small text file here, and no commands."""
    assert (ROOT / "mlxvlm" / room / "__init__.py").is_file()
    module = importlib.import_module(f"mlxvlm.{room}")
    assert module.__file__ is not None
    assert Path(module.__file__).resolve().parent in (ROOT / room, ROOT / "mlxvlm" / room)


def test_the_console_script_loads(project):
    module, _, name = project["project"]["scripts"]["mlxvlm"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def imports(path):
    """The modules that a file imports, anywhere in it, as absolute names."""
    package = path.relative_to(ROOT).parts[:-1]
    if package[0] != "mlxvlm":
        package = ("mlxvlm", *package)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


SOURCES = {
    path.relative_to(ROOT).as_posix(): set(imports(path))
    for folder in ("mlxvlm", "cli", "weights")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if (ROOT / folder).resolve() in path.resolve().parents
}


def importers(*modules):
    """The files that import one of `modules`, or something in it."""
    return {
        name
        for name, found in SOURCES.items()
        if any(f"{wanted}.".startswith(f"{m}.") for wanted in found for m in modules)
    }


def test_no_module_is_imported_by_its_outer_name():
    """`import cli` would make a second copy of every module of mlxvlm.cli."""
    assert importers("cli", "weights") == set()


def test_only_the_language_package_imports_mlx_lm():
    found = importers("mlx_lm", "transformers", "tokenizers")
    assert {name for name in found if not name.startswith("mlxvlm/language/")} == set()


def test_nothing_imports_the_commands():
    found = importers("mlxvlm.cli")
    assert {name for name in found if not name.startswith("cli/")} <= {"mlxvlm/__main__.py"}


def test_weights_know_nothing_of_training():
    found = importers("mlxvlm.train", "mlxvlm.data", "mlxvlm.chat")
    assert {name for name in found if name.startswith("weights/")} == set()


def test_the_library_prints_nothing_and_parses_nothing():
    for name in SOURCES:
        if name.startswith("cli/") or "/cli/" in name:
            continue
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        calls = {
            n.func.id
            for n in ast.walk(tree)
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert "print" not in calls, name
        assert not SOURCES[name] & {"argparse", "typer", "click"}, name


def test_backends_have_mlx_lms_names(project):
    extras = project["project"]["optional-dependencies"]
    for name in ("cpu", "cuda12", "cuda13"):
        assert extras[name] == [f"mlx-lm[{name}]"]


def wheel(tmp_path, leave_out=(), add=(), version=None):
    """A wheel as the build would make it, but for the names left out and added."""
    version = version or importlib.import_module("mlxvlm").__version__
    info = f"mlxvlm-{version}.dist-info"
    names = check_dist.package_files() | {f"mlxvlm/weights/demo/{n}" for n in check_dist.DEMO}
    path = tmp_path / f"mlxvlm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name in (names - set(leave_out)) | set(add):
            file.writestr(name, "")
        file.writestr(f"{info}/METADATA", f"Name: mlxvlm\nVersion: {version}\n")
        file.writestr(f"{info}/entry_points.txt", "mlxvlm = mlxvlm.cli.main:main\n")
        file.writestr(f"{info}/licenses/LICENSE", "")
    return path


def test_a_right_wheel_passes(tmp_path):
    assert check_dist.check_wheel(wheel(tmp_path)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"leave_out": ["mlxvlm/cli/main.py"]}, "missing: mlxvlm/cli/main.py"),
        ({"leave_out": ["mlxvlm/weights/demo/config.json"]}, "missing: mlxvlm/weights/demo"),
        ({"add": ["mlxvlm/weights/mine.safetensors"]}, "should not be there: mlxvlm/weights/mine"),
        ({"add": ["cli/main.py"]}, "top-level names"),
        ({"version": "9.9"}, "version"),
    ],
)
def test_a_wrong_wheel_is_told(tmp_path, change, said):
    assert any(said in problem for problem in check_dist.check_wheel(wheel(tmp_path, **change)))


def test_an_sdist_without_the_commands_is_told(tmp_path):
    path = tmp_path / "mlxvlm-0.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        for name in check_dist.package_files() - {"mlxvlm/cli/main.py"}:
            file.addfile(tarfile.TarInfo(f"mlxvlm-0/{name}"), io.BytesIO())
    assert "missing: mlxvlm/cli/main.py" in check_dist.check_sdist(path)
