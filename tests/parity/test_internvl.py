"""InternVL: pixels, token ids, logits, loss and greedy text equal transformers', in every layout of
files, with the tower of the small models and with that of the large ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from internvl_folders import LAYOUTS, internlm2, internvl_tokenizer, rewrite  # noqa: E402
from padded_rows import two_rows  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_tokenizers import write_folder  # noqa: E402
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (  # noqa: E402
    GotOcr2ImageProcessorPil,
)
from transformers.models.internvl.processing_internvl import InternVLProcessor  # noqa: E402

import mlxvlm  # noqa: E402
from mlxvlm.data.buckets import collate, group  # noqa: E402
from mlxvlm.prompts.internvl import SYSTEM  # noqa: E402
from mlxvlm.train.losses import batch_loss, count  # noqa: E402

pytestmark = pytest.mark.parity

SIDE, PER_TILE = 32, 4
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
LARGE = {"norm_type": "rms_norm", "attention_bias": False, "use_qk_norm": True}
DECODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
# The tower's fields, and whether the head is the embedding table.
KINDS = {"300M": ({**TOWER, "attention_bias": True}, False), "6B": ({**TOWER, **LARGE}, True)}
# (width, height)
SIZES = [(40, 30), (30, 40), (64, 32), (33, 97), (200, 31), (7, 7), (100, 100), (400, 3)]

# As InternVL3's transformers repositories have it.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class WithoutVideo(InternVLProcessor):
    """transformers' own, without its check for a video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


@pytest.fixture(scope="module", params=list(KINDS))
def internvl(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tower, tied = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    settings = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast", **names}
    write_folder(folder, internvl_tokenizer(), tokenizer_config=settings)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(
        str(folder), extra_special_tokens=names
    )
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**tower),
        text_config=transformers.Qwen2Config(**DECODER, vocab_size=len(tokenizer) + 3),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=PER_TILE,
        tie_word_embeddings=tied,
    )
    model = transformers.InternVLForConditionalGeneration(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.2 + (1 if "norm" in name and p.ndim == 1 else 0))
    model.save_pretrained(folder)
    pixels = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        crop_to_patches=True,
        max_patches=6,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    pixels.save_pretrained(folder)
    processor = WithoutVideo(pixels, tokenizer, image_seq_length=PER_TILE, chat_template=TEMPLATE)
    return model, folder, processor


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for size in SIZES
    ]


def asked(processor: Any, question: str, images: list[Image.Image]) -> Any:
    """Inputs of transformers' own; its template leaves InternVL's system message to the caller."""
    parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    system = {"role": "system", "content": [{"type": "text", "text": SYSTEM}]}
    messages = [system, {"role": "user", "content": parts}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(text=text, images=images, return_tensors="pt")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixels_ids_and_logits(internvl: Any, layout: str, tmp_path: Path) -> None:
    model, folder, processor = internvl
    vlm = mlxvlm.load(rewrite(folder, tmp_path / layout, layout))
    assert vlm.config.prompt.layout == "internvl2_5" and vlm.config.tiling.max_tiles == 6
    for image in pictures():
        prompt = vlm.tokenize([{"role": "user", "content": "What is this?"}], [image])
        inputs = asked(processor, "What is this?", [image])
        assert prompt.tokens.tolist() == inputs["input_ids"][0].tolist(), image.size
        pixels = np.array(vlm.encoder.pixels(prompt.pictures)).transpose(0, 3, 1, 2)
        assert np.abs(pixels - inputs["pixel_values"].numpy()).max() < 1e-5
        with torch.no_grad():
            wanted = model(**inputs).logits.numpy()
        found = np.array(vlm(prompt.tokens, prompt.pictures))
        assert np.abs(wanted).max() > 1
        assert np.abs(found - wanted).max() < 1e-4, (image.size, np.abs(found - wanted).max())


def test_an_internlm2_is_the_llama_that_it_was_made_of(tmp_path: Path) -> None:
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**KINDS["300M"][0]),
        text_config=transformers.LlamaConfig(**DECODER, vocab_size=400),
        tie_word_embeddings=False,
        image_token_id=399,
    )
    model = transformers.InternVLForConditionalGeneration(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.2 + (1 if "norm" in name and p.ndim == 1 else 0))
    model.save_pretrained(tmp_path / "llama")
    write_folder(tmp_path / "llama", internvl_tokenizer(), preprocessor_config={"max_patches": 6})
    vlm = mlxvlm.load(internlm2(tmp_path / "llama", tmp_path / "internlm2"))
    assert vlm.config.language["model_type"] == "internlm2"
    question = [{"role": "user", "content": "What is this?"}]
    prompt = vlm.tokenize(question, [pictures()[0]])
    assert prompt.tokens[0] == vlm.tokenizer.bos_token_id == 1
    ids = prompt.tokens.copy()
    ids[ids == vlm.config.prompt.image_token_id] = 399
    pixels = np.array(vlm.encoder.pixels(prompt.pictures)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids[None]), pixel_values=torch.tensor(pixels))
    found = np.array(vlm(prompt.tokens, prompt.pictures))
    assert np.abs(found - out.logits.numpy()).max() < 1e-4
    reply = vlm.generate(question, [pictures()[0]], max_tokens=32)
    never = [vlm.config.prompt.image_token_id, *range(vlm.tokenizer.vocab_size, 400)]
    said = model.generate(
        input_ids=torch.tensor(ids[None]),
        pixel_values=torch.tensor(pixels),
        max_new_tokens=32,
        do_sample=False,
        suppress_tokens=never,
        eos_token_id=sorted(vlm.tokenizer.eos_token_ids),
        pad_token_id=0,
    )[0, len(ids) :].tolist()
    assert reply.tokens == said and len(set(said)) > 3


def test_qwen_files_without_a_tokenizer_json(internvl: Any, tmp_path: Path) -> None:
    """OpenGVLab's repositories have vocab.json, merges.txt and the added tokens."""
    _, folder, _ = internvl
    place = rewrite(folder, tmp_path / "old", "opengvlab")
    state = json.loads((place / "tokenizer.json").read_text())
    (place / "tokenizer.json").unlink()
    (place / "vocab.json").write_text(json.dumps(state["model"]["vocab"], ensure_ascii=False))
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    (place / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    names = {token["content"]: token["id"] for token in state["added_tokens"]}
    (place / "added_tokens.json").write_text(json.dumps(names))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "special": True}
    settings = {
        "added_tokens_decoder": {str(i): {"content": name, **flags} for name, i in names.items()},
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    vlm = mlxvlm.load(place)
    assert vlm.config.prompt.image_token_id == names["<IMG_CONTEXT>"]
    theirs = transformers.Qwen2Tokenizer.from_pretrained(str(place))
    text = "What is this picture?\n\n12 éß 你好"
    prompt = vlm.tokenize([{"role": "user", "content": text}])
    whole = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n"
    wanted = theirs(whole + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    assert prompt.tokens.tolist() == wanted


def test_two_pictures_of_two_sizes_in_one_turn(internvl: Any) -> None:
    """Each with all the tiles that it may have: transformers shares no budget."""
    model, folder, processor = internvl
    vlm = mlxvlm.load(folder)
    images = [pictures()[0], pictures()[3]]
    prompt = vlm.tokenize([{"role": "user", "content": "Which?"}], vlm.look(images))
    inputs = asked(processor, "Which?", images)
    assert prompt.tokens.tolist() == inputs["input_ids"][0].tolist()
    with torch.no_grad():
        wanted = model(**inputs).logits.numpy()
    assert np.abs(np.array(vlm(prompt.tokens, prompt.pictures)) - wanted).max() < 1e-4


def test_greedy_text(internvl: Any, tmp_path: Path) -> None:
    model, folder, processor = internvl
    image = pictures()[0]
    inputs = asked(processor, "What is this?", [image])
    length = inputs["input_ids"].shape[1]
    for layout in ("transformers5", "opengvlab"):
        vlm = mlxvlm.load(rewrite(folder, tmp_path / layout, layout))
        reply = vlm.generate([{"role": "user", "content": "What is this?"}], [image], max_tokens=32)
        said = model.generate(
            **inputs,
            max_new_tokens=32,
            do_sample=False,
            suppress_tokens=[vlm.config.prompt.image_token_id],
            eos_token_id=sorted(vlm.tokenizer.eos_token_ids),
            pad_token_id=0,
        )[0, length:].tolist()
        assert reply.tokens == said and len(set(said)) > 3


def test_loss_of_a_training_batch_and_the_projectors_gradients(internvl: Any) -> None:
    """Two rows of pictures of other sizes, padded to one length."""
    model, folder, _ = internvl
    vlm = mlxvlm.load(folder)
    looked = vlm.look(pictures()[:2])
    rows, padded_rows = two_rows(vlm, looked)
    pixels = np.array(vlm.encoder.pixels(looked)).transpose(0, 3, 1, 2)
    out = model(
        **{name: torch.tensor(values) for name, values in padded_rows.items()},
        pixel_values=torch.tensor(pixels),
    )
    model.zero_grad()
    out.loss.backward()
    vlm.freeze()
    vlm.projector.unfreeze()
    batch = collate(group(rows, 0), 8)
    views = mx.concatenate([f.array for f in vlm.features(looked)])
    (_, parts), tree = nn.value_and_grad(vlm, batch_loss)(
        vlm, batch, views, {}, count([batch]), True
    )
    assert parts["loss"].item() == pytest.approx(out.loss.item(), abs=1e-5)
    for name in ("layer_norm", "linear_1", "linear_2"):
        theirs = getattr(model.model.multi_modal_projector, name).weight.grad.numpy()
        ours = np.array(tree["projector"][name]["weight"]) / count([batch])["loss"]
        assert np.abs(theirs).max() > 1e-4 and np.abs(ours - theirs).max() < 1e-5
