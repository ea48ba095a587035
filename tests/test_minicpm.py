"""MiniCPM-Llama3-V 2.5 from its authors' layout: ids, features and logits of a float64 reference,
training, conversion, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import read
from minicpm_folders import as_llama3v, write_minicpm
from mlx.utils import tree_flatten
from PIL import Image
from reference import minicpm_logits, minicpm_view, normalised
from tiny_vlm import sliced_vlm
from typer.testing import CliRunner

import mlxvlm
from mlxvlm.cli.main import app
from mlxvlm.errors import ConfigError, VLMError
from mlxvlm.model import VLM
from mlxvlm.weights.convert import convert
from mlxvlm.weights.export_minicpm import export_minicpm
from mlxvlm.weights.families import minicpm
from mlxvlm.weights.folder import Checkpoint
from mlxvlm.weights.load import load_encoder, load_projected
from mlxvlm.weights.save import save

SIZES = ((32, 32), (40, 30), (100, 30), (60, 64), (20, 97))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_minicpm(tmp_path_factory.mktemp("minicpm") / "model")


@pytest.fixture(scope="module")
def tensors(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    config, tensors = read(folder)
    return config, {name: np.array(x).astype(np.float64) for name, x in tensors.items()}


def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for size in SIZES
    ]


def test_the_five_choices(folder: Path) -> None:
    config = mlxvlm.load(folder).config
    assert (config.tiling.type, config.tiling.image_size, config.tiling.max_tiles) == (
        "slices",
        32,
        6,
    )
    assert (config.vision.positions, config.vision.table_grid) == ("buckets", 10)
    assert config.vision.vision_feature_norm and config.vision.num_layers_used == 3
    assert (config.projector.type, config.tokens_per_view) == ("resampler", 5)
    assert (config.prompt.layout, config.prompt.merge) == ("llama-3", "minicpm")
    assert config.language["model_type"] == "llama"


def test_the_release_has_as_many_bytes(folder: Path) -> None:
    """Llama3-V's index says what its float32 tensors come to, and so what MiniCPM's do."""
    raw = json.loads((folder / "config.json").read_text()) | {
        "query_num": 96,
        "slice_config": {"max_slice_nums": 9, "patch_size": 14},
        "vision_config": {"model_type": "idefics2"},
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    config = minicpm.model(Checkpoint(folder, raw))
    assert (config.tiling.image_size, config.vision.table_grid) == (448, 70)
    flat: Any = tree_flatten(VLM(config).parameters())  # none is ever evaluated
    assert 4 * sum(math.prod(x.shape) for _, x in flat) == 34_148_369_344


@pytest.mark.parametrize("dropped", [False, True])
def test_features_and_projected_views(folder: Path, tmp_path: Path, dropped: bool) -> None:
    if dropped:
        folder = write_minicpm(tmp_path / "dropped", drop_vision_last_layer=True)
    config, stored = read(folder)
    weights = {name: np.array(x).astype(np.float64) for name, x in stored.items()}
    vlm = mlxvlm.load(folder)
    for picture in vlm.look(images()):
        done = vlm.projected_encoder.encode([picture])[0]
        for view, found in zip(picture.views, done.views, strict=True):
            pixels = normalised(Image.fromarray(view), (0.5,) * 3, (0.5,) * 3)
            wanted = minicpm_view(pixels, weights, config)
            assert np.abs(wanted).max() > 1 and np.abs(np.array(found) - wanted).max() < 1e-4


def ids_of(vlm: Any, *parts: str | int) -> list[int]:
    """Ids of control tokens by name, text, and so many visual tokens."""
    found = []
    for part in parts:
        if isinstance(part, int):
            found += [vlm.config.prompt.image_token_id] * part
        elif part in vlm.tokenizer.control:
            found.append(vlm.tokenizer.control[part])
        else:
            found += vlm.tokenizer.backend.encode(part, add_special_tokens=False).ids
    return found


VIEW = ("<image>", 5, "</image>")
HEADER = ("<|start_header_id|>", "user", "<|end_header_id|>", "\n\n")
ANSWER = ("<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n")


def test_ids_and_logits(folder: Path, tensors: Any) -> None:
    config, weights = tensors
    vlm = mlxvlm.load(folder)
    image_id = vlm.config.prompt.image_token_id
    assert image_id == vlm.tokenizer.control["<unk>"]
    question = [{"role": "user", "content": "  What is this?\n"}]
    for image in images():
        prompt = vlm.tokenize(question, [image])
        rows, columns = prompt.pictures[0].grid
        grid: list[str | int] = []
        if rows * columns > 1:
            line = VIEW * columns
            grid = ["<slice>", *(line + (("\n", *line) * (rows - 1))), "</slice>"]
        wanted = ids_of(
            *(vlm, "<|begin_of_text|>", *HEADER, *VIEW, *grid),
            *("\nWhat is this?", "<|eot_id|>", *ANSWER),
        )
        assert prompt.tokens.tolist() == wanted, image.size
        expected = minicpm_logits(wanted, image_id, [image], weights, config)
        found = np.array(vlm(prompt.tokens, prompt.pictures))[0]
        assert np.abs(expected).max() > 1
        assert np.abs(found - expected).max() < 1e-4, (image.size, np.abs(found - expected).max())


def test_several_pictures_in_a_conversation_and_text_only_rows(folder: Path, tensors: Any) -> None:
    config, weights = tensors
    vlm = mlxvlm.load(folder)
    image_id = vlm.config.prompt.image_token_id
    first, second, third = images()[1:4]
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And"}]},
        {"role": "assistant", "content": "A circle."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Compare"},
                {"type": "image"},
                {"type": "image"},
                {"type": "text", "text": "them"},
            ],
        },
    ]
    shown = [first, second, third]
    prompts = [
        vlm.tokenize(chat, shown),
        vlm.tokenize([{"role": "user", "content": "Only text"}]),
        vlm.tokenize([{"role": "user", "content": "What?"}], [third]),
    ]
    lists = [shown, [], [third]]
    rows = np.zeros((3, max(map(len, prompts))), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt.tokens
    found = np.array(vlm(rows, [p for prompt in prompts for p in prompt.pictures]))
    for row, prompt, given in zip(found, prompts, lists, strict=True):
        ids = prompt.tokens.tolist()
        expected = minicpm_logits(ids, image_id, given, weights, config)
        assert np.abs(row[: len(prompt)] - expected).max() < 1e-4
    said = vlm.generate(chat, shown, max_tokens=8)
    after = minicpm_logits(
        [*prompts[0].tokens.tolist(), *said.tokens[:-1]], image_id, shown, weights, config
    )
    after[:, image_id] = -np.inf
    reserved = sorted(set(range(config["vocab_size"])) - set(range(vlm.tokenizer.vocab_size)))
    after[:, reserved] = -np.inf
    greedy = after[len(prompts[0]) - 1 :].argmax(-1).tolist()
    assert said.tokens == greedy[: len(said.tokens)]


def test_llama3v_is_the_same_under_other_names(folder: Path, tmp_path: Path) -> None:
    other = mlxvlm.load(as_llama3v(folder, tmp_path / "llama3v"))
    vlm = mlxvlm.load(folder)
    assert other.config.to_dict() == vlm.config.to_dict()
    ours: Any = tree_flatten(vlm.parameters())
    theirs: Any = dict(tree_flatten(other.parameters()))
    assert all(mx.array_equal(x, theirs.pop(name)) for name, x in ours) and not theirs


def test_conversion_loses_nothing(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "ours")
    vlm, other = mlxvlm.load(folder), mlxvlm.load(tmp_path / "ours")
    assert other.config.to_dict() == vlm.config.to_dict()
    ours: Any = tree_flatten(vlm.parameters())
    theirs: Any = dict(tree_flatten(other.parameters()))
    assert all(mx.array_equal(x, theirs.pop(name)) for name, x in ours) and not theirs
    # Every tensor of the folder is there, and nothing else.
    _, stored = read(folder)
    assert len(stored) == len(ours)
    (image,) = images()[2:3]
    prompt = vlm.tokenize([{"role": "user", "content": "What?"}], [image])
    again = other.tokenize([{"role": "user", "content": "What?"}], [image])
    assert prompt.tokens.tolist() == again.tokens.tolist()
    assert mx.array_equal(vlm(prompt.tokens, prompt.pictures), other(again.tokens, again.pictures))


def test_there_and_back_again(folder: Path, tmp_path: Path) -> None:
    """The authors' layout, ours, and theirs: the same tensors, and a config that means the same."""
    convert(folder, tmp_path / "ours")
    done = CliRunner().invoke(
        app,
        [
            "export",
            "-m",
            str(tmp_path / "ours"),
            "--out",
            str(tmp_path / "back"),
            "--to",
            "minicpm",
        ],
    )
    assert done.exit_code == 0, done.output
    old, new = read(folder), read(tmp_path / "back")
    assert old[1].keys() == new[1].keys()
    assert all(mx.array_equal(value, new[1][name]) for name, value in old[1].items())
    fields = ("query_num", "slice_config", "hidden_size", "vocab_size", "drop_vision_last_layer")
    for name in fields:
        given = old[0][name]
        if isinstance(given, dict):
            given = {key: value for key, value in given.items() if key != "model_type"}
        assert new[0][name] == given
    vlm, again = mlxvlm.load(folder), mlxvlm.load(tmp_path / "back")
    assert again.config.to_dict() == vlm.config.to_dict()
    assert again.tokenizer.control == vlm.tokenizer.control


def test_what_that_layout_cannot_say_is_named(tmp_path: Path) -> None:
    save(sliced_vlm(), tmp_path / "model")
    with pytest.raises(ConfigError) as raised:
        export_minicpm(tmp_path / "model", tmp_path / "out")
    for part in ("prompt.merge is 'flat', not 'minicpm'", "not 64 wide with 1 heads"):
        assert part in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_parts_alone(folder: Path) -> None:
    vlm = mlxvlm.load(folder)
    pictures = vlm.look(images())
    encoder, projected = load_encoder(folder), load_projected(folder)
    for one, other in zip(encoder.encode(pictures), vlm.features(pictures), strict=True):
        assert all(mx.array_equal(a, b) for a, b in zip(one.views, other.views, strict=True))
    assert encoder.identity()["positions"] == "buckets"
    assert projected.encode(pictures)[2].views[0].shape == (5, 256)
    with pytest.raises(ConfigError, match="one square grid"):
        load_encoder(folder, pool="mean2")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"version": "2.6"}, "version 2.6, which is not supported"),
        ({"version": None}, "version None"),
        ({"slice_mode": False}, "slice_mode must be true"),
        ({"vision_config": {"model_type": "timm"}}, "'timm' is not supported"),
        ({"vision_config": {"hidden_size": "wide"}}, "hidden_size"),
        ({"strange_scale": 12}, "strange_scale"),
    ],
)
def test_configs_that_are_not_known_are_refused(
    folder: Path, tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    config = json.loads((place / "config.json").read_text()) | fields
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=reason):
        mlxvlm.load(place)


def test_a_tokenizer_without_its_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    path = place / "tokenizer.json"
    path.write_text(path.read_text().replace("<unk>", "<unknown>"))
    with pytest.raises(ConfigError, match="no <unk>"):
        mlxvlm.load(place)
    shutil.copyfile(folder / "tokenizer.json", path)
    path.write_text(path.read_text().replace("<slice>", "<slices>"))
    vlm = mlxvlm.load(place)
    with pytest.raises(VLMError, match="<slice>, a control token"):
        vlm.tokenize([{"role": "user", "content": "What?"}], [images()[2]])


@pytest.mark.parametrize("harm", ["missing", "extra", "misshapen", "nan"])
def test_a_bad_checkpoint_gives_one_clear_error(folder: Path, tmp_path: Path, harm: str) -> None:
    place = tmp_path / "model"
    shutil.copytree(folder, place)
    _, stored = read(folder)
    name = "resampler.query"
    if harm == "missing":
        del stored[name]
    elif harm == "extra":
        name = "resampler.gate"
        stored[name] = mx.zeros((2,))
    elif harm == "misshapen":
        stored[name] = stored[name][:-1]
    else:
        stored[name] = stored[name] * float("nan")
    mx.save_safetensors(str(place / "model.safetensors"), stored, {"format": "pt"})
    with pytest.raises(VLMError) as raised:
        mlxvlm.load(place)
    assert name.replace("resampler.", "projector.") in str(raised.value)
