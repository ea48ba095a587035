"""`mlxvlm export --to transformers`: the folder loads back with the same logits, and says why not.

What transformers makes of it is in parity/test_transformers_export.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import rewrite
from tiny_tokenizers import byte_level, llama3, sentencepiece, vicuna
from tiny_vlm import IMAGE, VOCAB, picture, tiny_config, tiny_tokenizer, tiny_vlm
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

import mlxvlm
from mlxvlm import VLM, Picture
from mlxvlm.cli.main import app
from mlxvlm.config import ModelConfig, ProjectorConfig, PromptConfig, TilingConfig, VisionConfig
from mlxvlm.errors import ConfigError
from mlxvlm.language.quantise import Quantisation
from mlxvlm.language.tokenizer import Tokenizer
from mlxvlm.prompts import normalize_messages, render
from mlxvlm.weights.chat_template import chat_template
from mlxvlm.weights.convert import convert
from mlxvlm.weights.export import export, obstacles
from mlxvlm.weights.folder import read_header
from mlxvlm.weights.save import save

LLAVA = Path(__file__).parent / "golden/llava"
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vision_feature_layer": -2,
    "vision_feature_norm": False,
}
CLIP = {
    **TOWER,
    "model_type": "clip_vision_model",
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
    "vision_feature_select_strategy": "default",
}


def plain_config(**changes: Any) -> ModelConfig:
    """What transformers' LLaVA can express."""
    parts = {"vision": VisionConfig(**TOWER), "projector": ProjectorConfig(type="mlp")}
    return tiny_config(**{**parts, **changes})


def stored(config: ModelConfig, folder: Path, tokenizer: Any = None) -> VLM:
    mx.random.seed(2)
    vlm = VLM(config, tokenizer or tiny_tokenizer())
    save(vlm, folder)
    return mlxvlm.load(folder)


def logits(vlm: Any, image: int | None = None) -> np.ndarray:
    count, image = vlm.config.tokens_per_view, image or vlm.config.prompt.image_token_id
    rows = np.array([[1, 5, *[image] * count, 7, 9, *[image] * count, 11]])
    pictures = [Picture([picture(seed, vlm.config.vision.image_size)]) for seed in (3, 4)]
    return np.array(vlm(rows, pictures).astype(mx.float32))


@pytest.mark.parametrize("tower", (TOWER, CLIP))
@pytest.mark.parametrize("resize", ("squash", "crop", "pad"))
def test_it_loads_back(tmp_path: Path, tower: dict[str, Any], resize: str) -> None:
    vision = VisionConfig(**tower)
    tiling = TilingConfig(image_size=32).resized(resize, vision.image_mean)
    vlm = stored(plain_config(vision=vision, tiling=tiling), tmp_path / "in")
    export(tmp_path / "in", tmp_path / "out")
    again = mlxvlm.load(tmp_path / "out")
    assert np.array_equal(logits(again), logits(vlm))
    assert again.config.tiling == tiling and again.config.prompt == vlm.config.prompt
    assert again.encoder.identity() == vlm.encoder.identity()
    assert again.tokenizer is not None and vlm.tokenizer is not None
    assert again.tokenizer.eos_token_ids == vlm.tokenizer.eos_token_ids
    question = [{"role": "user", "content": "What is it?"}]
    shown = picture(5, 50)[:30]  # wider than high
    a, b = (v.tokenize(question, [shown]).tokens for v in (vlm, again))
    assert a.tolist() == b.tolist()
    export(tmp_path / "out", tmp_path / "twice")
    twice = {f.name: f.read_bytes() for f in (tmp_path / "twice").iterdir()}
    assert twice == {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}


def test_what_lies_in_the_folder(tmp_path: Path) -> None:
    stored(plain_config(), tmp_path / "in")
    (tmp_path / "in/LICENSE").write_text("free")
    export(tmp_path / "in", tmp_path / "out", dtype="bfloat16")
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["architectures"] == ["LlavaForConditionalGeneration"]
    assert (raw["torch_dtype"], raw["image_token_index"]) == ("bfloat16", IMAGE)
    assert raw["vision_config"]["num_hidden_layers"] == 2 and raw["vision_feature_layer"] == -1
    tensors, metadata = read_header(tmp_path / "out/model.safetensors")
    assert metadata == {"format": "pt"} and {t.dtype for t in tensors.values()} == {"BF16"}
    patches = tensors["vision_tower.vision_model.embeddings.patch_embedding.weight"]
    assert patches.shape == (32, 3, 8, 8)
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["suppress_tokens"] == [IMAGE, *range(IMAGE + 1, VOCAB)]
    assert (tmp_path / "out/LICENSE").read_text() == "free"


def test_a_published_model_goes_there_and_back(tmp_path: Path) -> None:
    """To our layout and to the hub's again: transformers' own logits, as stored in golden/."""
    source = rewrite(LLAVA, tmp_path / "source", "transformers5")
    convert(source, tmp_path / "ours", dtype="float32")
    export(tmp_path / "ours", tmp_path / "theirs")
    io = mx.load(str(LLAVA.with_suffix(".safetensors")))
    assert isinstance(io, dict)
    vlm = mlxvlm.load(tmp_path / "theirs")
    tokens, image = np.array(io["tokens"]), vlm.config.prompt.image_token_id
    assert image == 499  # of the tokenizer that the test put there, whose id 63 is a text's
    found = vlm(
        np.where(tokens == 63, image, tokens), [Picture([v]) for v in np.array(io["pixels"])]
    )
    assert mx.abs(found[..., :64] - io["logits"]).max().item() < 1e-4
    assert vlm.config.prompt.layout == "vicuna_v1"


@pytest.mark.parametrize("tied", (False, True))
def test_an_image_token_beyond_the_table_gets_a_row(tmp_path: Path, tied: bool) -> None:
    """The next free id of the tokenizer, and rows that are never sampled."""
    backend = byte_level(("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"))
    backend.add_special_tokens(["<|eot_id|>"])
    # A tokenizer without "<image>", as those of language models are.
    raw = json.loads(backend.to_str())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] != "<image>"]
    for number, token in enumerate(raw["added_tokens"], raw["added_tokens"][0]["id"]):
        token["id"] = number
    tokenizer = Tokenizer(type(backend).from_str(json.dumps(raw)), None, {})
    rows = tokenizer.vocab_size
    config = plain_config(prompt=PromptConfig(image_token_id=rows + 100))
    config.language.update(vocab_size=rows, tie_word_embeddings=tied)
    vlm = stored(config, tmp_path / "in", tokenizer)
    export(tmp_path / "in", tmp_path / "out")
    again = mlxvlm.load(tmp_path / "out")
    assert again.config.prompt.image_token_id == rows == again.tokenizer.id("<image>")
    assert again.config.language["vocab_size"] == rows + 1
    assert np.array_equal(logits(again)[..., :rows], logits(vlm))


REASONS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"tiling": TilingConfig("dynamic", 32)}, "cuts pictures into tiles (tiling.type 'dynamic')"),
    (
        {"tiling": TilingConfig(image_size=32, resize="pad", background=(0, 0, 0))},
        "pads pictures with (0, 0, 0)",
    ),
    (
        {"vision": VisionConfig(**{**TOWER, "vision_feature_norm": True})},
        "final norm comes before its projector",
    ),
    (
        {"vision": VisionConfig(**{**TOWER, "vision_feature_layer": 0})},
        "the tower's embeddings, before any block",
    ),
    (
        {"projector": ProjectorConfig(hidden_size=32, num_attention_heads=2)},
        "projector is of type 'attention', not 'mlp'",
    ),
    ({"projector": ProjectorConfig(type="mlp", pool="mean2")}, "pools visual tokens ('mean2')"),
    ({"projector": ProjectorConfig(type="mlp", hidden_size=48)}, "projector is 48 wide inside"),
)
LANGUAGE: tuple[tuple[dict[str, Any], str], ...] = (
    ({"model_type": "gemma"}, "language model is of type 'gemma', not one of llama, mistral"),
    (
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
        "layers with sliding windows",
    ),
    ({"rope_traditional": True}, "rotates neighbouring pairs"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
        "rope_scaling of type 'yarn'",
    ),
    ({"model_type": "mistral", "mlp_bias": True}, "mistral language model has mlp_bias"),
)


@pytest.mark.parametrize(("changes", "says"), REASONS)
def test_what_cannot_be_expressed(changes: dict[str, Any], says: str) -> None:
    found = obstacles(VLM(plain_config(**changes)))
    assert len(found) == 1 and says in found[0]
    assert not obstacles(VLM(plain_config()))


@pytest.mark.parametrize(("changes", "says"), LANGUAGE)
def test_language_models_that_cannot(changes: dict[str, Any], says: str) -> None:
    config = plain_config()
    config.language |= {"head_dim": 16, **changes}
    found = obstacles(VLM(config))
    assert len(found) == 1 and says in found[0]


def test_one_error_with_every_reason(tmp_path: Path) -> None:
    save(tiny_vlm(), tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "four", quantisation=Quantisation())
    command = ["export", "-m", str(tmp_path / "four"), "--to", "transformers"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert done.exit_code == 1 and len(done.output.splitlines()) == 1
    for says in ("final norm", "'attention', not 'mlp'", "weights are quantised: export the model"):
        assert says in done.output
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path) -> None:
    stored(plain_config(), tmp_path / "in")
    command = ["export", "-m", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, command).exit_code == 2  # --to is asked for
    done = CliRunner().invoke(app, [*command, "--to", "transformers"])
    assert done.exit_code == 0, done.output
    assert "AutoProcessor.from_pretrained" in done.output


# Chat templates say what the layouts say.


def picture_turn(text: str, pictures: int = 1) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in range(pictures)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


CHATS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "  Hi there "}],
    [picture_turn(" What is this? ")],
    [{"role": "user", "content": [{"type": "text", "text": "  "}]}],
    [{"role": "user", "content": [{"type": "text", "text": " \n Hi "}]}],
    [{"role": "system", "content": "Be brief."}, picture_turn("A?", 2), answer(" B. ")],
    [
        picture_turn("One?"),
        answer("1"),
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "  left "},
                {"type": "image"},
                {"type": "text", "text": ""},
                {"type": "text", "text": "right\n"},
                {"type": "image"},
            ],
        },
    ],
)
# It does not trim, so the whitespace around a text is seen.
OWN = (
    "{% if messages[0]['role'] == 'system' %}{{ '<|start_header_id|>s' + messages[0]['content'] }}"
    "{% endif %}{% for message in messages if message['role'] != 'system' %}"
    "{{ '<|start_header_id|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\n' }}{% endif %}"
)
TYPED = OWN.replace("['content']", "['content'][0]['text']")
CASES = (
    ("llama-3", {}),
    ("llama-3", {"system": " Say it. ", "image_suffix": ""}),
    ("llama-3", {"image_placement": "sequence"}),
    ("vicuna_v1", {}),
    ("vicuna-legacy", {}),
    ("vicuna-first", {}),
    ("vicuna_v1", {"image_placement": "sequence", "image_suffix": "|"}),
    ("mistral", {"system": "Say it."}),
    ("internvl2_5", {}),
    ("plain", {}),
    ("chat_template", {"system": "Say it."}),
    ("typed", {}),
)


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize(("layout", "fields"), CASES)
def test_a_template_says_what_the_layout_says(
    layout: str, fields: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    scheme = layout.removeprefix("vicuna-") if layout.startswith("vicuna-") else "never"
    layout = layout if scheme == "never" else "vicuna_v1"
    if layout in ("vicuna_v1", "mistral", "plain"):
        tokenizer, name = vicuna(scheme), "<image>"
        if scheme == "first":  # as Llama-2's newer files: BOS is the tokenizer's own to put
            bos = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
            tokenizer.backend.post_processor = bos
    elif layout == "internvl2_5":
        names = ("<|im_start|>", "<|im_end|>", "<img>", "</img>")
        tokenizer, name = Tokenizer(byte_level(names), None, {}), "<image>"
    else:
        tokenizer, name = llama3(), "<|reserved_special_token_0|>"
        tokenizer.chat_template = TYPED if layout == "typed" else OWN
    kind: str = "chat_template" if layout == "typed" else layout
    prompt = PromptConfig(layout=kind, image_token_id=tokenizer.control[name], **fields)
    if layout == "plain":
        messages = [m for m in messages if m["role"] != "system"][:2]
        if not count(messages):
            pytest.skip("plain wants a picture")
    ask = messages[-1]["role"] == "user"
    parts, _ = normalize_messages(messages, [None] * count(messages))
    wanted = render(parts, [1] * count(messages), tokenizer, prompt, ask).tokens.tolist()
    tokenizer.chat_template = chat_template(prompt, tokenizer, name)
    text = tokenizer.render(messages, ask)
    # As transformers' processors do it.
    found = tokenizer.backend.encode(text, add_special_tokens=not text.startswith("<s>"))
    assert found.ids == wanted


def count(messages: list[dict[str, Any]]) -> int:
    return sum(
        part["type"] == "image"
        for m in messages
        if isinstance(m["content"], list)
        for part in m["content"]
    )


def test_text_cannot_speak_in_a_template() -> None:
    """Suffixes and systems are literals there, whatever they hold."""
    tokenizer = Tokenizer(sentencepiece("never"), None, {})
    odd = "\"{{ 1 }}' \\ \n{% é"
    prompt = PromptConfig(layout="vicuna_v1", system=odd, image_suffix=odd, image_token_id=3)
    tokenizer.chat_template = chat_template(prompt, tokenizer, "<image>")
    text = tokenizer.render([picture_turn("x")], True)
    assert text == f"<s>{odd} USER: <image>{odd}x ASSISTANT:"


def test_templates_that_there_are_not() -> None:
    for layout in ("chat_template", "internvl2_5"):
        prompt = PromptConfig(layout=layout, image_placement="sequence")
        with pytest.raises(ConfigError, match="'sequence' is no template of"):
            chat_template(prompt, llama3(), "<image>")
    with pytest.raises(ConfigError, match="the tokenizer has none"):
        chat_template(PromptConfig(layout="chat_template"), llama3(), "<image>")
