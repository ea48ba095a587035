"""Checks what a wheel and an sdist hold: python tests/check_dist.py dist/

Guards the two links: a build that lost cli/ or weights/, or took a stray checkpoint along, fails
here.
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
DEMO_BYTES = 10_000_000


def package_files() -> set[str]:
    """Every Python file of the package, links followed, as the wheel names it."""
    folders = [ROOT / "mlxvlm", ROOT / "mlxvlm/cli", ROOT / "mlxvlm/weights"]
    files = (path for folder in folders for path in folder.rglob("*.py"))
    return {path.relative_to(ROOT).as_posix() for path in files}


def check_names(names: set[str]) -> list[str]:
    """What is wrong with a list of files that should be the package, demo and nothing else."""
    problems = [f"missing: {name}" for name in sorted(package_files() - names)]
    for name in sorted(f"mlxvlm/weights/demo/{name}" for name in DEMO):
        if name not in names:
            problems.append(f"missing: {name}")
    kept = ("mlxvlm/weights/demo/", "tests/golden/")
    for name in sorted(names):
        if name.endswith(".safetensors") and not name.startswith(kept):
            problems.append(f"a checkpoint that should not be there: {name}")
        if "__pycache__" in name:
            problems.append(f"a compiled file: {name}")
    return problems


def check_wheel(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as wheel:
        sizes = {info.filename: info.file_size for info in wheel.infolist()}
        metadata = next(name for name in sizes if name.endswith(".dist-info/METADATA"))
        scripts = metadata.replace("METADATA", "entry_points.txt")
        texts = {name: wheel.read(name).decode() for name in (metadata, scripts)}
    problems = check_names(set(sizes))
    tops = {name.split("/")[0] for name in sizes}
    if {top for top in tops if not top.endswith(".dist-info")} != {"mlxvlm"}:
        problems.append(f"top-level names should be mlxvlm alone: {', '.join(sorted(tops))}")
    demo = sum(size for name, size in sizes.items() if name.startswith("mlxvlm/weights/demo/"))
    if demo > DEMO_BYTES:
        problems.append(f"weights/demo is {demo} bytes; at most {DEMO_BYTES} are shipped")
    if not any(name.endswith("/LICENSE") for name in sizes):
        problems.append("missing: LICENSE")
    face = (ROOT / "mlxvlm/__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', face, re.MULTILINE)
    if version is None or f"\nVersion: {version[1]}\n" not in texts[metadata]:
        problems.append("the wheel's version is not mlxvlm.__version__")
    if "mlxvlm = mlxvlm.cli.main:main" not in texts[scripts]:
        problems.append("the console script mlxvlm is not mlxvlm.cli.main:main")
    return problems


def check_sdist(path: Path) -> list[str]:
    with tarfile.open(path) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "tests/conftest.py"}
    return check_names(names) + [f"missing: {name}" for name in sorted(wanted - names)]


def main(folder: str) -> int:
    wheels, sdists = (sorted(Path(folder).glob(kind)) for kind in ("*.whl", "*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        print(f"{folder}: expected one wheel and one sdist, found {len(wheels)} and {len(sdists)}")
        return 1
    failed = False
    for path, problems in (
        (wheels[0], check_wheel(wheels[0])),
        (sdists[0], check_sdist(sdists[0])),
    ):
        print(f"{path.name}: {'; '.join(problems) or 'as it should be'}")
        failed = failed or bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
