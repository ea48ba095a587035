"""The README's tour, command by command as it is printed, on toy models in the hub's layout."""

import json
import re
import shlex
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from test_weights import tower_folder
from tiny_tokenizers import byte_level, write_folder
from tiny_vlm import picture, tiny_config
from typer.testing import CliRunner

from mlxvlm.cli.main import app
from mlxvlm.language.load import build_language

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def tour() -> list[list[str]]:
    """The commands of the tour, split as a shell would."""
    block = re.search(r"## The tour\n.*?```sh\n(.*?)```", README, re.DOTALL)
    assert block
    return [shlex.split(line) for line in block[1].replace("\\\n", " ").splitlines() if line]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder with the tour's pictures and rows, and its two repositories."""
    monkeypatch.chdir(tmp_path)
    tower_folder(tmp_path / "siglip", "siglip")
    config = tiny_config().language | {"vocab_size": 1000}
    weights = dict(tree_flatten(build_language(config).parameters()))
    write_folder(tmp_path / "llama", byte_level(), config=config)
    mx.save_safetensors(str(tmp_path / "llama" / "model.safetensors"), weights)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(4):
        Image.fromarray(picture(number)).save(pictures / f"{number}.jpg")
    Image.fromarray(picture(9)).save(tmp_path / "photo.jpg")
    captions = [{"image": f"{n}.jpg", "text": "a red bicycle"} for n in range(4)]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    said = [
        ("human", "<image>\nWhat is it?"),
        ("gpt", "A bicycle."),
        ("human", "And?"),
        ("gpt", "No."),
    ]
    turns = [{"from": who, "value": text} for who, text in said]
    chats = [{"id": n, "image": f"{n}.jpg", "conversations": turns} for n in range(4)]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    return tmp_path


def test_the_tour_runs_as_printed(place):
    stand_ins = {
        "google/siglip-so400m-patch14-384": "siglip",
        "meta-llama/Llama-3.2-1B-Instruct": "llama",
    }
    seen = []
    for command in tour():
        name, *arguments = (stand_ins.get(word, word) for word in command[1:])
        if name == "chat":
            arguments += ["-p", "What is it?", "--max-tokens", "4", "--json"]
        result = CliRunner().invoke(app, [name, *arguments])
        assert result.exit_code == 0, (command, result.output, result.exception)
        seen.append(name)
        if name == "chat":
            assert json.loads(result.stdout)["prompt_tokens"] > 4
    assert set(seen) == {"cache-embeddings", "build", "pretrain", "sft", "lora", "chat"}
    lines = (place / "aligned" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["rows"] == 4
    result = CliRunner().invoke(
        app, ["fuse", "-m", "aligned", "--adapter-path", "adapters", "--out", "fused"]
    )
    assert result.exit_code == 0 and (place / "fused" / "model.safetensors").is_file()
