"""LLaVA-NeXT: pixels, token ids, logits, loss and greedy text equal transformers', in every layout
of files, on Llama and Mistral, and as each of its chats is laid out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mlx.core as mx  # noqa: E402
from checkpoints import LAYOUTS, rewrite  # noqa: E402
from padded_rows import two_rows  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_tokenizers import byte_level, sentencepiece, write_folder  # noqa: E402
from transformers.models.llava_next.image_processing_pil_llava_next import (  # noqa: E402
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor  # noqa: E402

import mlxvlm  # noqa: E402
from mlxvlm.data.buckets import collate, group  # noqa: E402
from mlxvlm.images.anyres import choose_grid  # noqa: E402
from mlxvlm.prompts.vicuna import SYSTEM  # noqa: E402
from mlxvlm.train.losses import batch_loss, count  # noqa: E402

pytestmark = pytest.mark.parity

SIDE = 32
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
DECODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
# (width, height)
SIZES = [(40, 30), (30, 40), (64, 32), (33, 97), (200, 31), (7, 7), (100, 100), (400, 3)]

IMAGES = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
)
TEXTS = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}"
)
# A user's turn, and what stands around an answer, as the chat templates of llava-hf have them.
VICUNA = (
    "{{ '" + SYSTEM.replace("'", "\\'") + " ' }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'USER: ' }}" + IMAGES + TEXTS + "{{ ' ASSISTANT:' }}"
    "{% else %}{{ ' ' }}" + TEXTS + "{{ '</s>' }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' }}" + IMAGES + TEXTS + "{{ ' [/INST]' }}"
    "{% else %}{{ ' ' }}" + TEXTS + "{{ ' </s>' }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    + IMAGES
    + TEXTS
    + "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
KINDS = {
    "mistral": (transformers.MistralConfig, MISTRAL),
    "vicuna_v1": (transformers.LlamaConfig, VICUNA),
    "llama-3": (transformers.LlamaConfig, LLAMA3),
}


def tokens_of(kind: str, folder: Path) -> Any:
    """A tokenizer's folder, and transformers' tokenizer of it."""
    backend = byte_level() if kind == "llama-3" else sentencepiece()
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    if kind == "llama-3":
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    config = {**names, "tokenizer_class": "PreTrainedTokenizerFast", "image_token": "<image>"}
    files = {"tokenizer_config": config, "chat_template": {"chat_template": KINDS[kind][1]}}
    write_folder(folder, backend, **files)
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))


@pytest.fixture(scope="module", params=list(KINDS))
def next_(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    kind: str = request.param
    folder = tmp_path_factory.mktemp(kind)
    tokenizer = tokens_of(kind, folder)
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        text_config=KINDS[kind][0](**DECODER, vocab_size=len(tokenizer)),
        image_token_index=image,
        image_grid_pinpoints=PINPOINTS,
    )
    model = transformers.LlavaNextForConditionalGeneration(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.2 + (1 if "norm" in name and p.ndim == 1 else 0))
    model.save_pretrained(folder)
    pixels = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
    )
    pixels.save_pretrained(folder)
    processor = LlavaNextProcessor(
        pixels,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=KINDS[kind][1],
    )
    return kind, model, folder, processor


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for size in SIZES
    ]


def asked(processor: Any, question: str, images: list[Image.Image], **more: Any) -> Any:
    parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": parts}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(text=text, images=images, return_tensors="pt", **more)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixels_ids_and_logits(next_: Any, layout: str, tmp_path: Path) -> None:
    kind, model, folder, processor = next_
    place = rewrite(folder, tmp_path / layout, layout)
    tokens_of(kind, place)
    vlm = mlxvlm.load(place)
    assert vlm.config.prompt.layout == kind and vlm.config.prompt.merge == "spatial_unpad"
    for image in pictures():
        prompt = vlm.tokenize([{"role": "user", "content": "What is this?"}], [image])
        inputs = asked(processor, "What is this?", [image], add_special_tokens=False)
        ids = inputs["input_ids"][0].tolist()
        if kind != "llama-3":  # its template writes the BOS itself
            ids = [vlm.tokenizer.bos_token_id, *ids]
        assert prompt.tokens.tolist() == ids, image.size
        inputs["input_ids"] = torch.tensor([ids])
        inputs["attention_mask"] = torch.ones(1, len(ids), dtype=torch.long)
        pixels = np.array(vlm.encoder.pixels(prompt.pictures)).transpose(0, 3, 1, 2)
        assert np.abs(pixels - inputs["pixel_values"][0].numpy()).max() < 1e-5
        with torch.no_grad():
            wanted = model(**inputs).logits.numpy()
        found = np.array(vlm(prompt.tokens, prompt.pictures))
        assert np.abs(wanted).max() > 1
        assert np.abs(found - wanted).max() < 1e-4, (image.size, np.abs(found - wanted).max())


def test_two_pictures_of_two_sizes_in_one_turn(next_: Any) -> None:
    kind, model, folder, processor = next_
    vlm = mlxvlm.load(folder)
    images = [pictures()[0], pictures()[3]]
    prompt = vlm.tokenize([{"role": "user", "content": "Which?"}], images)
    inputs = asked(processor, "Which?", images, add_special_tokens=False)
    ids = inputs["input_ids"][0].tolist()
    ids = ids if kind == "llama-3" else [vlm.tokenizer.bos_token_id, *ids]
    assert prompt.tokens.tolist() == ids
    inputs["input_ids"] = torch.tensor([ids])
    inputs["attention_mask"] = torch.ones(1, len(ids), dtype=torch.long)
    with torch.no_grad():
        wanted = model(**inputs).logits.numpy()
    assert np.abs(np.array(vlm(prompt.tokens, prompt.pictures)) - wanted).max() < 1e-4


def test_greedy_text(next_: Any) -> None:
    kind, model, folder, processor = next_
    vlm = mlxvlm.load(folder)
    image = pictures()[0]
    reply = vlm.generate([{"role": "user", "content": "What is this?"}], [image], max_tokens=32)
    inputs = asked(processor, "What is this?", [image], add_special_tokens=False)
    if kind != "llama-3":
        bos = torch.tensor([[vlm.tokenizer.bos_token_id]])
        inputs["input_ids"] = torch.cat([bos, inputs["input_ids"]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    length = inputs["input_ids"].shape[1]
    said = model.generate(
        **inputs,
        max_new_tokens=32,
        do_sample=False,
        suppress_tokens=[vlm.config.prompt.image_token_id],
        eos_token_id=sorted(vlm.tokenizer.eos_token_ids),
        pad_token_id=0,
    )[0, length:].tolist()
    assert reply.tokens == said and len(set(said)) > 3


def test_loss_of_a_training_batch_and_the_gradient_of_image_newline(next_: Any) -> None:
    """Two rows of pictures of other sizes, padded to one length."""
    _, model, folder, _ = next_
    vlm = mlxvlm.load(folder)
    looked = vlm.look(pictures()[:2])
    rows, padded_rows = two_rows(vlm, looked)
    pixels = np.array(vlm.encoder.pixels(looked)).transpose(0, 3, 1, 2)
    most = max(p.cut.views for p in looked)
    padded = np.zeros((2, most, *pixels.shape[1:]), np.float32)
    start = 0
    for i, picture in enumerate(looked):
        padded[i, : picture.cut.views] = pixels[start : start + picture.cut.views]
        start += picture.cut.views
    out = model(
        **{name: torch.tensor(values) for name, values in padded_rows.items()},
        pixel_values=torch.tensor(padded),
        image_sizes=torch.tensor([p.cut.size[::-1] for p in looked]),
    )
    model.zero_grad()
    out.loss.backward()
    vlm.freeze()
    vlm.projector.unfreeze()
    batch = collate(group(rows, 0), 8)
    views = mx.concatenate([f.array for f in vlm.features(looked)])
    import mlx.nn as nn

    (_, parts), tree = nn.value_and_grad(vlm, batch_loss)(
        vlm, batch, views, {}, count([batch]), True
    )
    assert parts["loss"].item() == pytest.approx(out.loss.item(), abs=1e-5)
    theirs = model.model.image_newline.grad.numpy()
    ours = np.array(tree["projector"]["image_newline"]) / count([batch])["loss"]
    assert np.abs(theirs).max() > 1e-4 and np.abs(ours - theirs).max() < 1e-5


@pytest.mark.parametrize("side", [24, 32, 336])
def test_canvases_agree(side: int) -> None:
    from transformers.image_processing_utils import select_best_resolution

    from mlxvlm.config import TILINGS, TilingConfig

    tiling = TilingConfig(image_size=side, **TILINGS["anyres"])
    points = [(rows * side, columns * side) for columns, rows in tiling.grids]
    rng = np.random.default_rng(side)
    sizes = [tuple(int(n) for n in pair) for pair in rng.integers(1, 2500, (3000, 2))]
    sizes += [(n, n) for n in range(1, 1500)] + [(2 * n, n) for n in range(1, 700)]
    sizes += [(20000, 20), (20, 20000), (1, 20000)]
    for width, height in sizes:
        rows, columns = (n // side for n in select_best_resolution((height, width), points))
        assert choose_grid((width, height), tiling) == (columns, rows), (width, height)
