"""`mlxvlm cache-embeddings` and `mlxvlm cache`: streams, exit codes, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from tiny_cache import Slicer, draw, shards
from tiny_vlm import tiny_vlm
from typer.testing import CliRunner, Result

from mlxvlm.cache import EmbeddingCache
from mlxvlm.cache.writer import write_cache
from mlxvlm.cli import cache as cache_command
from mlxvlm.cli.boundary import Boundary
from mlxvlm.cli.cache_embeddings import ProgressLine, cache_embeddings
from mlxvlm.cli.cache_plan import _rate
from mlxvlm.weights.save import save

ROOT = Path(__file__).resolve().parent.parent

app = typer.Typer(cls=Boundary, pretty_exceptions_enable=False)
app.command()(cache_embeddings)
app.add_typer(cache_command.app, name="cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save(tiny_vlm(), folder)
    return folder


def command(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_pictures_to_a_cache_and_again(tmp_path, model):
    pictures = draw(tmp_path / "pictures", 5)
    words = ("cache-embeddings", tmp_path / "pictures", "--out", tmp_path / "cache", "-m", model)
    done = command(*words, "--limit", 3, "--json")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""  # no terminal: no progress
    summary = json.loads(done.stdout)
    assert (summary["pictures"], summary["encoded"], summary["failures"]) == (3, 3, [])
    done = command(*words)
    assert done.exit_code == 0 and "5 pictures (2 encoded, 3 there already)" in done.stdout
    vlm = tiny_vlm()
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        cache.require(vlm.encoder.identity())
        assert cache.meta["codec"] == "int8"
        for name, path in pictures:
            want = np.array(vlm.features([path])[0].array)
            off = np.linalg.norm(cache[name].array - want)
            assert 0 < off < 0.02 * np.linalg.norm(want)


def test_rows_and_their_images(tmp_path, model):
    draw(tmp_path / "pictures", 3)
    (tmp_path / "pictures" / "001.png").write_bytes(b"")
    rows: list[Any] = [{"image": f"{i:03}.png", "text": "a caption"} for i in (2, 0, 1, 2)]
    rows.append({"messages": [{"role": "user", "content": "Hi"}]})
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\nnot json")
    words = ["cache-embeddings", tmp_path / "rows.jsonl", "--images", tmp_path / "pictures"]
    words += ["--out", tmp_path / "cache", "--vision", model, "--codec", "float32"]
    done = command(*words)
    assert done.exit_code == 0, done.output
    assert "3 pictures (2 encoded, 1 failed)" in done.stdout
    assert "left out 2:" in done.stderr
    assert re.search(r"rows.jsonl:6: not JSON", done.stderr)
    assert re.search(r"001.png: .*empty|001.png: .*not a picture", done.stderr)
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        assert [name in cache for name in ("000.png", "001.png", "002.png")] == [True, False, True]
    strict = command(*words, "--strict")
    assert strict.exit_code == 1 and "rows.jsonl:6" in strict.stderr


def test_another_encoder_or_codec_is_refused(tmp_path, model):
    draw(tmp_path / "pictures", 2)
    words = ("cache-embeddings", tmp_path / "pictures", "--out", tmp_path / "cache", "-m", model)
    assert command(*words).exit_code == 0
    before = shards(tmp_path / "cache")
    assert command(*words, "--plan", "--pool", "mean2").exit_code == 1
    for flags, field in (
        (("--pool", "mean2"), "encoder.pool"),
        (("--dtype", "bfloat16"), "encoder.dtype"),
        (("--codec", "fp16"), "codec"),
        (("--batch-size", 2), "batch_size"),
    ):
        done = command(*words, *flags)
        assert done.exit_code == 1 and f"{field} (" in done.stderr, done.output
        assert "Traceback" not in done.output and done.stdout == ""
    assert shards(tmp_path / "cache") == before
    assert command(*words, "--codec", "int3").exit_code == 2


def test_rates_have_two_digits_and_no_exponent():
    assert [_rate(x) for x in (0.531, 6.66, 9.99, 384.2, 12_345)] == [
        "0.53",
        "6.7",
        "10",
        "380",
        "12,000",
    ]


def test_a_plan_says_what_it_takes_and_writes_nothing(tmp_path, model):
    draw(tmp_path / "pictures", 30)
    words = ["cache-embeddings", tmp_path / "pictures", "--out", tmp_path / "a" / "cache"]
    words += ["-m", model, "--batch-size", 4]
    done = command(*words, "--plan")
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "a").exists()
    assert re.search(r"pictures +30\n", done.stdout) and re.search(r"views +30\n", done.stdout)
    assert re.search(
        r"time +(under )?\d+ s \([\d.,]+ pictures/s encoded, [\d.,]+ read\)", done.stdout
    )
    assert re.search(r"--codec .*--pool none, \d+ tokens .*--pool mean2, \d+ tokens", done.stdout)
    assert re.search(r"int8 +[\d.]+ kB < ", done.stdout) and "float32" in done.stdout
    plan = json.loads(command(*words, "--plan", "--json").stdout)
    assert (plan["pictures"], plan["views"], plan["too_large"]) == (30, 30, False)
    assert plan["seconds"] > 0 and not (tmp_path / "a").exists()
    done = command(*words)
    assert "30 pictures, 30 views" in done.stderr and " free." in done.stderr
    written = sum(len(data) for data in shards(tmp_path / "a" / "cache").values())
    assert abs(plan["bytes"] / written - 1) < 0.01
    done = command(*words, "--plan")
    assert "0 (30 more are there already)" in done.stdout


def test_half_of_the_free_disk_is_the_limit(tmp_path, model, monkeypatch):
    draw(tmp_path / "pictures", 30)
    words = ["cache-embeddings", tmp_path / "pictures", "--out", tmp_path / "cache", "-m", model]
    plan = json.loads(command(*words, "--plan", "--json").stdout)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * plan["bytes"] - 2))
    done = command(*words)
    assert done.exit_code == 1 and not (tmp_path / "cache").exists()
    assert "more than half of the" in done.stderr and "--yes" in done.stderr
    assert "--pool mean2 (" in done.stderr  # which would fit
    assert "needs --yes" in command(*words, "--plan").stdout
    assert command(*words, "--yes").exit_code == 0
    assert command(*words).exit_code == 0  # there is nothing left to write


def test_names_are_trusted_when_the_pictures_are_gone(tmp_path, model):
    draw(tmp_path / "pictures", 3)
    rows = [{"image": f"{i:03}.png", "text": "a caption"} for i in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ["cache-embeddings", tmp_path / "rows.json", "--images", tmp_path / "pictures"]
    words += ["--out", tmp_path / "cache", "-m", model]
    assert command(*words).exit_code == 0
    (tmp_path / "pictures" / "000.png").write_bytes(b"another")
    done = command(*words, "--trust-names", "--json")
    assert json.loads(done.stdout)["known"] == 3
    shutil.rmtree(tmp_path / "pictures")
    done = command(*words)
    assert done.exit_code == 1 and "--trust-names" in done.stderr
    done = command(*words, "--trust-names", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["known"] == 3


def test_several_tars_are_one_input(tmp_path, model):
    for number in range(2):
        draw(tmp_path / "pictures", 2, seed=number)
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for path in sorted((tmp_path / "pictures").iterdir()):
                tar.add(path, path.name)
    words = ["cache-embeddings", tmp_path / "0.tar", tmp_path / "1.tar", "--out"]
    done = command(*words, tmp_path / "cache", "-m", model)
    assert done.exit_code == 0 and "4 pictures (4 encoded)" in done.stdout, done.output
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        assert list(cache.names()) == ["0.tar/000.png", "0.tar/001.png"] + [
            "1.tar/000.png",
            "1.tar/001.png",
        ]


def test_info_and_verify(tmp_path):
    pictures = draw(tmp_path / "pictures", 4)
    pictures[2][1].write_bytes(b"")
    write_cache(Slicer(), pictures, tmp_path / "cache", shard_pictures=2)
    done = command("cache", "info", tmp_path / "cache")
    assert done.exit_code == 0 and "3 pictures under 4 names" in done.stdout
    assert "failed: 002.png: " in done.stdout
    about = json.loads(command("cache", "info", tmp_path / "cache", "--json").stdout)
    assert (about["pictures"], about["shards"], about["codec"]) == (3, 2, "float32")
    assert about["encoder"]["model_type"] == "slicer"
    write_cache(Slicer(), pictures, tmp_path / "int8", "int8", shard_pictures=2)
    totals = json.loads(command("cache", "info", tmp_path / "int8", "--json").stdout)
    each = f"{totals['bytes'] / totals['views']:,.0f}"
    done = command("cache", "info", tmp_path / "int8")
    assert f" shards, int8, {each} bytes a view\n" in done.stdout

    done = command("cache", "verify", tmp_path / "cache")
    assert done.exit_code == 0 and "3 pictures, every checksum is right" in done.stdout
    shard = tmp_path / "cache" / "shards" / "shard-000001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = command("cache", "verify", tmp_path / "cache")
    assert done.exit_code == 1 and "003.png in shard" in done.stdout
    found = json.loads(command("cache", "verify", tmp_path / "cache", "--json").stdout)
    (one,) = found["damaged"]
    assert (one["shard"], one["names"]) == ("shard-000001.safetensors", ["003.png"])
    assert "do not match" in one["problem"] or "does not match" in one["problem"]
    assert command("cache", "info", tmp_path / "nowhere").exit_code == 1


def test_info_loads_nothing_heavy(tmp_path):
    write_cache(Slicer(), draw(tmp_path / "pictures", 2), tmp_path / "cache")
    code = (
        "import sys\n"
        "from mlxvlm.cli.cache import app\n"
        f"app(['info', {str(tmp_path / 'cache')!r}], standalone_mode=False)\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'tokenizers', 'PIL', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


def test_progress_is_one_line_on_a_terminal(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    pictures = draw(tmp_path / "pictures", 6)
    pictures[0][1].write_bytes(b"")
    line = ProgressLine()
    write_cache(
        Slicer(),
        pictures,
        tmp_path / "cache",
        batch_size=2,
        shard_pictures=3,
        progress=line.progress,
    )
    line.end()
    shown = capsys.readouterr().err
    assert shown.startswith("\r") and shown.count("\n") == 1
    last = shown.split("\r")[-1]
    assert re.search(r"6/6 pictures  9 views  [\d.]+ images/s  [\d.]+ kB  0 s left  1 failed", last)


def test_parts_of_one_input(tmp_path, model):
    draw(tmp_path / "pictures", 5)
    words = ("cache-embeddings", tmp_path / "pictures", "--out", tmp_path / "cache", "-m", model)
    done = command(*words, "--shard", "1/2")
    assert done.exit_code == 1 and "Use fewer parts" in done.stderr, done.output
    assert command(*words, "--shard", "3/2").exit_code == 2
    done = command(*words, "--shard", "1/1")
    assert done.exit_code == 0 and "5 pictures" in done.stdout


@pytest.mark.slow
def test_launched_ranks_take_a_part_each(tmp_path, model):
    draw(tmp_path / "pictures", 300)
    (tmp_path / "run.py").write_text("from mlxvlm.cli.main import main\nmain()\n")
    words = ["cache-embeddings", tmp_path / "pictures", "-m", model, "--out"]
    assert command(*words, tmp_path / "whole").exit_code == 0
    launch = Path(sys.executable).with_name("mlx.launch")
    start = [launch, "--backend", "ring", "-n", "2", "--python", sys.executable]
    subprocess.run(
        [str(word) for word in [*start, tmp_path / "run.py", *words, tmp_path / "cache"]],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    parts = [tmp_path / f"cache.{i}-of-2" for i in (1, 2)]
    assert [len(shards(part)) for part in parts] == [1, 1]
    joined = [data for part in parts for data in shards(part).values()]
    assert joined == list(shards(tmp_path / "whole").values())


def test_upkeep(tmp_path, model):
    draw(tmp_path / "pictures", 5)
    cache, shard = tmp_path / "cache", tmp_path / "cache" / "shards" / "shard-000000.safetensors"
    words = ("cache-embeddings", tmp_path / "pictures", "--out", cache, "-m", model)
    assert command(*words, "--pool", "mean2", "--codec", "int8").exit_code == 0
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert command("cache", "verify", cache).exit_code == 1
    repair = ("cache", "repair", cache, "-m", model, "--images")
    done = command(*repair, tmp_path)
    assert done.exit_code == 1 and "still damaged: 004.png: No such file" in done.stdout
    assert "--images" not in done.stdout
    done = command(*repair[:-1])
    assert done.exit_code == 1 and "say where the pictures are with --images" in done.stdout
    done = command(*repair, tmp_path / "pictures")
    assert done.exit_code == 0 and "1 pictures encoded again in 1 damaged shards" in done.stdout
    assert shard.read_bytes() == whole
    done = command(*repair, tmp_path / "pictures", "--json")
    assert json.loads(done.stdout)["shards"] == 0

    done = command("cache", "merge", tmp_path / "all", cache)
    assert done.exit_code == 0 and "1 shards" in done.stdout and "5 pictures" in done.stdout
    assert command("cache", "merge", tmp_path / "all", tmp_path / "all").exit_code == 1

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"image": "002.png", "text": "a caption"}) + "\nnot json\n")
    keep = ("cache", "prune", tmp_path / "all", "--keep", rows)
    done = command(*keep)
    assert done.exit_code == 1 and "rows.jsonl:2" in done.stderr
    rows.write_text(json.dumps({"image": "002.png", "text": "a caption"}))
    done = command(*keep)
    assert done.exit_code == 0 and "4 pictures dropped and 1 kept" in done.stdout, done.output
    with EmbeddingCache.open(tmp_path / "all") as opened:
        assert list(opened.names()) == ["002.png"] and opened.verify() == []


def test_at_projector_stores_what_the_language_model_sees(tmp_path):
    vlm = tiny_vlm()
    save(vlm, tmp_path / "vlm")
    draw(tmp_path / "pictures", 3)
    words = ("cache-embeddings", tmp_path / "pictures", "-m", tmp_path / "vlm", "--out")
    at = ("--at", "projector")
    assert command(*words, tmp_path / "a", *at, "--pool", "mean2").exit_code == 2
    done = command(*words, tmp_path / "a", *at, "--codec", "float32")
    assert done.exit_code == 0, done.output
    with EmbeddingCache.open(tmp_path / "a") as cache:
        name = next(cache.names())
        view = cache[name].views[0]
        want = np.array(vlm.project(vlm.look([tmp_path / "pictures" / name])))
        np.testing.assert_allclose(view, want, atol=1e-5)
    planned = command(*words, tmp_path / "b", *at, "--plan")
    assert planned.exit_code == 0 and not (tmp_path / "b").exists(), planned.output
    assert command(*words, tmp_path / "a", "--codec", "float32").exit_code == 1
