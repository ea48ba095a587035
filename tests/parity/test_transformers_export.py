"""What `mlxvlm export` writes, transformers loads whole: logits, prompts, pixels, answers."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_tokenizers import byte_level, llama3, vicuna  # noqa: E402
from tiny_vlm import picture  # noqa: E402

import mlxvlm  # noqa: E402
from mlxvlm import VLM, Picture  # noqa: E402
from mlxvlm.config import (  # noqa: E402
    ModelConfig,
    ProjectorConfig,
    PromptConfig,
    TilingConfig,
    VisionConfig,
)
from mlxvlm.errors import WeightsError  # noqa: E402
from mlxvlm.language.tokenizer import Tokenizer  # noqa: E402
from mlxvlm.weights.export import export  # noqa: E402
from mlxvlm.weights.folder import Checkpoint  # noqa: E402
from mlxvlm.weights.save import save  # noqa: E402

pytestmark = pytest.mark.parity

SIGLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vision_feature_layer": -2,
    "vision_feature_norm": False,
}
CLIP = {
    **SIGLIP,
    "model_type": "clip_vision_model",
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"type": "linear", "factor": 4.0}

# tower, resize, projector, language, layout, prompt
Fields = dict[str, Any]
CASES: dict[str, tuple[Fields, str, Fields, Fields, str, Fields]] = {
    "siglip-llama3": (
        SIGLIP, "squash", {}, {"model_type": "llama", "rope_scaling": LLAMA3}, "llama-3", {},
    ),
    "siglip-last-tied": (
        {**SIGLIP, "vision_feature_layer": -1},
        "crop",
        {"bias": False, "hidden_act": "gelu_pytorch_tanh"},
        {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "head_dim": 8},
        "llama-3",
        {"system": "Be brief.", "image_placement": "sequence"},
    ),
    "clip-vicuna": (
        {**CLIP, "vision_feature_select_strategy": "default"},
        "pad",
        {},
        {"model_type": "llama", "rope_scaling": LINEAR, "mlp_bias": True},
        "vicuna_v1",
        {},
    ),
    "clip-full-mistral": (CLIP, "crop", {}, {"model_type": "mistral"}, "mistral", {}),
    "siglip-qwen2": (SIGLIP, "squash", {}, {"model_type": "qwen2"}, "chat_template", {}),
    "siglip-qwen3": (
        SIGLIP, "pad", {}, {"model_type": "qwen3", "head_dim": 24}, "chat_template", {},
    ),
}  # fmt: skip
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_of(layout: str) -> Tokenizer:
    """A tokenizer for a layout."""
    if layout == "llama-3":
        settings = {
            "tokenizer_config": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        }
        return llama3(**settings)
    if layout == "chat_template":
        names = ("<|im_start|>", "<|im_end|>")
        backend = byte_level(names)
        settings = {
            "chat_template": CHATML,
            "tokenizer_config": {"eos_token": "<|im_end|>", "bos_token": None},
        }
        return Tokenizer(backend, None, settings)
    found = vicuna("never")
    found.special_tokens |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    found.eos_token_ids = {2}
    return found


@pytest.fixture(scope="module", params=list(CASES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Our model, transformers', and the folder."""
    tower, resize, projector, language, layout, prompt = CASES[request.param]
    tokenizer = tokenizer_of(layout)
    named = "<|reserved_special_token_0|>" if layout == "llama-3" else "<image>"
    # Or an id far beyond the table: then the vocabulary's own "<image>" stands for pictures.
    image = 900 if layout == "chat_template" else tokenizer.control[named]
    vision = VisionConfig(**tower)
    config = ModelConfig(
        tiling=TilingConfig(image_size=32).resized(resize, vision.image_mean),
        vision=vision,
        projector=ProjectorConfig(type="mlp", **projector),
        prompt=PromptConfig(layout=layout, image_token_id=image, **prompt),
        language={**DECODER, "vocab_size": tokenizer.vocab_size + 3, **language},
    )
    mx.random.seed(0)
    vlm = VLM(config, tokenizer)
    vlm.load_weights(drawn(vlm))
    vlm.eval()
    place = tmp_path_factory.mktemp(request.param)
    save(vlm, place / "ours")
    (place / "ours/tokenizer_config.json").write_text(json.dumps(tokenizer.special_tokens))
    export(place / "ours", place / "theirs")
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        place / "theirs", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return vlm, model.eval(), place / "theirs"


def drawn(vlm: VLM) -> list[tuple[str, mx.array]]:
    """Every parameter random, so that none can be dropped or mistaken unnoticed."""
    flat: Any = tree_flatten(vlm.parameters())
    return [
        (n, mx.random.normal(x.shape) * 0.2 + (1 if "norm" in n and x.ndim == 1 else 0))
        for n, x in flat
    ]


def test_logits(exported: Any) -> None:
    vlm, model, folder = exported
    assert model.dtype == torch.float32
    again = mlxvlm.load(folder)
    image = model.config.image_token_id
    assert again.config.prompt.image_token_id == image
    one = [image] * vlm.config.tokens_per_view
    rng = np.random.default_rng(1)
    pixels = rng.standard_normal((3, 32, 32, 3)).astype(np.float32)
    words = rng.integers(3, 250, 12).tolist()
    rows = np.array(
        [[*words[:4], *one, *words[4:7], *one, *words[7:]], words + one + [5] * len(one)]
    )
    pictures = [Picture([p]) for p in pixels]
    with torch.no_grad():
        wanted = model(
            input_ids=torch.tensor(rows), pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2))
        ).logits.numpy()
    assert np.abs(wanted).max() > 1
    found = np.array(again(rows, pictures))
    assert np.abs(found - wanted).max() < 1e-4, np.abs(found - wanted).max()
    ours = np.where(rows == image, vlm.config.prompt.image_token_id, rows)
    first = np.array(vlm(ours, pictures))
    assert np.array_equal(first, found[..., : first.shape[-1]])


def test_the_processor(exported: Any) -> None:
    """AutoProcessor's ids and pixels are ours, and so is the greedy answer."""
    vlm, model, folder = exported
    processor = transformers.AutoProcessor.from_pretrained(folder, use_fast=False)
    assert type(processor).__name__ == "LlavaProcessor"
    image = Image.fromarray(picture(2, 50)[:30])
    question = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    chats: tuple[list[dict[str, Any]], ...] = (
        [{"role": "user", "content": question}],
        [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": "A red circle."}]},
            {"role": "user", "content": [{"type": "text", "text": " How many shapes? "}]},
        ],
    )
    for chat in chats:
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)
        prompt = vlm.tokenize(chat, [image])
        ours = prompt.tokens.copy()
        ours[ours == vlm.config.prompt.image_token_id] = model.config.image_token_id
        assert inputs["input_ids"][0].tolist() == ours.tolist()
        pixels = np.array(vlm.encoder.normalise(prompt.pictures[0].views)).transpose(0, 3, 1, 2)
        # transformers may round its pixels before it resizes, or resize without Pillow.
        assert np.abs(inputs["pixel_values"].numpy() - pixels).max() < 0.05
        with torch.no_grad():
            out = model.generate(
                **{**inputs, "pixel_values": torch.tensor(pixels)},
                max_new_tokens=12,
                do_sample=False,
            )[0].tolist()
        reply = vlm.generate(chat, [image], max_tokens=12)
        assert out[len(ours) :] == reply.tokens


def test_pickles_become_what_loads(tmp_path: Path) -> None:
    """The command that the error shows, as it shows it."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    table = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    torch.save({"embed": table, "head": table}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({"turned": table.T}, folder / "pytorch_model-00002-of-00002.bin")
    torch.save({"seed": 1}, folder / "training_args.bin")
    with pytest.raises(WeightsError) as error:
        Checkpoint.open(folder)
    command = shlex.split(str(error.value).splitlines()[-1])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True)
    found = Checkpoint.open(folder)
    values = {name: np.array(x.astype(mx.float32)) for name, x in found.read(found.tensors).items()}
    wanted = {"embed": table, "head": table, "turned": table.T}
    assert values.keys() == wanted.keys()
    assert all(np.array_equal(values[name], x.float().numpy()) for name, x in wanted.items())
