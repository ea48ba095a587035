"""`mlxvlm cache-embeddings` and `mlxvlm cache`: streams, exit codes, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
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
        assert cache.meta["codec"] == "bfloat16"
        for name, path in pictures:
            want = np.array(vlm.features([path])[0].array)
            np.testing.assert_allclose(cache[name].array, want, rtol=2**-7, atol=1e-4)


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

    done = command("cache", "verify", tmp_path / "cache")
    assert done.exit_code == 0 and "3 pictures, every checksum is right" in done.stdout
    shard = tmp_path / "cache" / "shards" / "shard-000001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = command("cache", "verify", tmp_path / "cache")
    assert done.exit_code == 1 and "003.png in shard" in done.stdout
    found = json.loads(command("cache", "verify", tmp_path / "cache", "--json").stdout)
    assert len(found["damaged"]) == 1 and "shard-000001" in found["damaged"][0]
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
        Slicer(), pictures, tmp_path / "cache", batch_size=2, shard_pictures=3, progress=line.show
    )
    line.end()
    shown = capsys.readouterr().err
    assert shown.startswith("\r") and shown.count("\n") == 1
    last = shown.split("\r")[-1]
    assert re.search(r"6/6 pictures  [\d.]+ images/s  0.00 GB  0 s left  1 failed", last)
