"""examples/my-photos: every step of its README, with a few pictures and steps."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "my-photos"


def run(*command: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_steps_run(tmp_path):
    place = tmp_path / "photos-and-more"
    run(EXAMPLE / "draw.py", "--out", place, "--count", 10)
    table = (place / "captions.csv").read_text().splitlines()
    assert table[0] == "file_name,text" and len(table) == 11
    run(EXAMPLE / "rows.py", place, "--held-out", 3)
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 7 and rows[0]["messages"][1]["content"].startswith("My desk today: ")
    model, out = ROOT / "weights" / "demo", place / "lora"
    checked = run("-m", "mlxvlm", "data", "check", place / "train.jsonl", "-m", model, "--json")
    assert json.loads(checked)["sources"][0]["usable"] == 7
    shutil.copy(EXAMPLE / "recipe.toml", place)
    data = [place / "train.jsonl", place / "general.jsonl"]
    features = place / "features"
    run("-m", "mlxvlm", "cache-embeddings", *data, "-m", model, "--out", features, "--strict")
    recipe = ["--config", place / "recipe.toml", "-m", model, "--out", out]
    run("-m", "mlxvlm", "lora", *recipe, "--iters", 2, "--strict")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["loss"] > 0
    told = run(EXAMPLE / "compare.py", place, "--adapter-path", out, "--model", model)
    assert told.splitlines()[-1].startswith("after: ") and "of 3 captions" in told
