"""examples/lora_json: forms say what ordinary answers say, and every step of its README runs."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from examples.lora_json import compare, forms, rows
from examples.lora_json.rows import json_rows, ordinary_rows
from examples.shapes.world import make_scene, seeds

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "lora_json"
DEMO = ROOT / "weights" / "demo"
SCENES = [make_scene(seed) for seed, _ in zip(seeds("progress"), range(150), strict=False)]


def run(*command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_reply_is_right_by_what_it_says():
    wanted = '{"top left":"a big red star","centre":"the word CAT"}'
    assert forms.right('{ "centre": "the word CAT", "top left": "a big red star" }', wanted)
    assert not forms.right('{"top left":"a big red star"}', wanted)
    for said in ("Top left: a big red star.", wanted[:-1], "[]", '"red"', "3", ""):
        assert forms.parse(said) is None and not forms.right(said, wanted)
    held = [
        {"form": form, "messages": [{"content": "?"}, {"content": wanted}]}
        for form in ("json question", "json question", "ordinary question")
    ]
    found = compare.score(held, [wanted, "{}", wanted])
    assert found["json question"] == {"asked": 2, "parsed": 2, "right": 1}
    assert found["ordinary question"] == {"asked": 1, "parsed": 0, "right": 1}


def test_only_questions_that_ask_for_json_get_it():
    for scene in SCENES:
        for one in json_rows(scene, "a.png"):
            user, said = (message["content"] for message in one["messages"])
            assert user.endswith("as JSON.") and list(forms.parse(said) or ()) == ["answer"]
            assert one["form"].startswith("json")
        for one in ordinary_rows(scene, "a.png"):
            user, said = (message["content"] for message in one["messages"])
            assert "JSON" not in user and forms.parse(said) is None


def test_held_out_pictures_are_never_taught(tmp_path, monkeypatch):
    flags = ["--out", str(tmp_path), "--scenes", "3", "--held-out", "2"]
    monkeypatch.setattr(sys, "argv", ["rows", *flags])
    rows.main()
    named = {}
    for name in ("json", "ordinary", "held-out"):
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        named[name] = {json.loads(line)["image"] for line in lines}
        assert all((tmp_path / image).is_file() for image in named[name])
    assert len(named["json"]) == 3 and len(named["held-out"]) == 2
    assert not (named["json"] | named["ordinary"]) & named["held-out"]


def commands(folder: Path) -> list[list[str]]:
    """The README's indented commands up to the comparison, in `folder` instead of runs/."""
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    ((?:python|mlxvlm|cp) .*)$", text, re.MULTILINE)
    return [shlex.split(line.replace("runs/lora-json", str(folder))) for line in lines]


def follow(folder: Path, less: dict[str, list[str]]) -> str:
    """Runs the README's commands, with more arguments for those that `less` names."""
    told = ""
    for program, *rest in commands(folder):
        if program == "cp":
            shutil.copy(ROOT / rest[0], rest[1])
            continue
        name = rest[1] if program == "python" else rest[0]
        if name == "chat":
            continue
        before = [] if program == "python" else ["-m", "mlxvlm"]
        told = run(*before, *rest, *less.get(name.rpartition(".")[2], []))
    return told


def test_the_steps_run(tmp_path):
    recipe = tomllib.loads((EXAMPLE / "recipe.toml").read_text(encoding="utf-8"))
    assert [one["data"] for one in recipe["sources"]] == ["json.jsonl", "ordinary.jsonl"]
    few = {"rows": ["--scenes", "6", "--held-out", "1"], "lora": ["--iters", "2", "--strict"]}
    told = follow(tmp_path, few | {"cache-embeddings": ["--strict"]})
    lines = (tmp_path / "lora" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["loss"] > 0
    table = told.splitlines()
    assert "json description" in told and table[-1].split()[:2] == ["ordinary", "question"]
