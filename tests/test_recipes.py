"""examples/recipes: every file is what the trainer knows, and trains two steps on a tiny model."""

import re
from pathlib import Path

import mlx.nn as nn
import pytest
from eve_folders import write_eve, write_teacher
from internvl_folders import write_internvl
from test_train import losses, place  # noqa: F401
from tiny_tokenizers import vicuna
from tiny_vlm import tiny_config

from mlxvlm.config import ProjectorConfig, PromptConfig
from mlxvlm.model import VLM
from mlxvlm.train.loop import Trainer
from mlxvlm.train.stages import read_recipe, stage_config
from mlxvlm.weights.load import load
from mlxvlm.weights.save import quantization_of, save

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "recipes"
RECIPES = sorted(FOLDER.glob("*/*.toml"))
STAGES = {
    "continual": "sft",
    "qlora": "lora",
    "sft-projector": "sft",
    "stage-1": "pretrain",
    "stage-1.5": "pretrain",
    "stage-2": "sft",
    "stage-3": "sft",
}


def test_there_are_all_that_the_readme_names():
    named = re.findall(r"^\| `([\w.-]+)` \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted({path.parent.name for path in RECIPES}) and len(RECIPES) == 21


def llava() -> VLM:
    """A tiny model of LLaVA's kind: Llama-2's tokens, an MLP, pictures cropped."""
    tokenizer = vicuna()
    config = tiny_config(projector=ProjectorConfig(type="mlp"))
    config.language["vocab_size"] = tokenizer.vocab_size + 8
    config.prompt = PromptConfig(layout="vicuna_v1", image_token_id=tokenizer.vocab_size)
    config.override(resize="crop")
    return VLM(config, tokenizer)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_trains(path, place, tmp_path):  # noqa: F811
    stage = STAGES.get(path.stem, path.stem)
    model, smaller = place / "model", {}
    if path.parent.name == "llava-1.5":
        model = tmp_path / "vicuna"
        save(llava(), model)
    if path.parent.name == "internvl-2.5":
        model = write_internvl(tmp_path / "internvl")
        smaller = {"pack_length": 256}
    if path.parent.name == "eve":
        teacher = write_teacher(tmp_path / "teacher")
        model = write_eve(tmp_path / "eve", mm_vision_tower_clip=str(teacher))
        smaller = {"batch_size": 1}
    if "4-bit" in path.read_text() or "4bit" in path.read_text():
        model = tmp_path / "quantised"
        vlm = load(place / "model")
        nn.quantize(vlm.language, 32, 4)
        vlm.config.quantization = quantization_of(vlm)
        save(vlm, model)
    flags = {
        "model": str(model),
        "data": str(place / "data" / "train.jsonl"),
        "images": str(place / "data" / "images"),
        "out": str(tmp_path / "out"),
        "iters": 2,
        "batch_size": 2,
        "grad_accumulation_steps": 2,
        "max_seq_length": 2048,
    } | smaller
    if "val_split" in read_recipe(path):
        flags["val_split"] = 0.3
    trainer = Trainer(stage_config(stage, flags, path))
    before = {name: value for name, value in trainer.trainable().items()}
    trainer.run()
    assert len(losses(tmp_path / "out")) == 2 and all(losses(tmp_path / "out"))
    wanted = {part.split(":")[-1].replace("lm", "language") for part in trainer.config.parts}
    wanted |= {"aligner"} if trainer.teacher else set()
    assert {name.split(".")[0] for name in before} == wanted
    adapters = "lora:lm" in trainer.config.parts
    vlm = load(model, adapter=tmp_path / "out") if adapters else load(tmp_path / "out")
    for name, value in (("layout", vlm.config.prompt.layout), ("resize", vlm.config.tiling.resize)):
        asked = getattr(trainer.config, name)
        assert not asked or value == asked
