"""What the training benchmark trains: one LLaVA folder, its rows and their exact tokens.

The folder is in the hub's layout, so that every trainer loads the same float32 weights: a CLIP
tower, a two-layer MLP and a Llama (rope base 10,000, no scaling), the one combination that all of
them compute alike. Rows have one picture, or none, and exactly so many tokens; `rows.npz` holds
them as our own trainer lays them out, for trainers that take tokens.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

IMAGE, BOS, EOS, USER, ASSISTANT, PAD = "<image>", "<s>", "</s>", "<u>", "<a>", "<pad>"
WORDS = 200
ROPE = 10_000.0
# Every content is shown as a string or in parts, as trainers hand it over.
TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "{{ '<u>' if message['role'] == 'user' else '<a>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of one subject. text: tokens of a row beside its picture's; supervised: of those."""

    vocab: int
    text: int = 60
    supervised: int = 30
    width: int = 768
    layers: int = 10
    heads: int = 12
    kv_heads: int = 4
    ffn: int = 2688
    tower_width: int = 384
    tower_layers: int = 12
    tower_heads: int = 6
    image_size: int = 378
    patch_size: int = 14
    pictures: bool = True
    rows: int = 4
    batch: int = 4
    keys: str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    rank: int = 8
    scale: float = 2.0
    grad_checkpoint: bool = False

    @property
    def visual(self) -> int:
        return (self.image_size // self.patch_size) ** 2 if self.pictures else 0

    def save(self, folder: Path) -> None:
        (folder / "shape.json").write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Shape:
        return cls(**json.loads((folder / "shape.json").read_text()))


def make(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Writes model/, data/, rows.npz and cache/ (bf16) into `folder`."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    model = folder / "model"
    model.mkdir(parents=True)
    shape.save(folder)
    save_file(_weights(shape, rng), model / "model.safetensors", {"format": "pt"})
    _tokenizer(model)
    for name, value in _configs(shape).items():
        (model / name).write_text(json.dumps(value, indent=1))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    _data(folder / "data", shape, rng)
    _tokens(folder, shape)
    if shape.pictures:
        _cache(folder)
    return folder


def _weights(shape: Shape, rng: np.random.Generator) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}

    def draw(name: str, *size: int, bias: bool = False) -> None:
        out[name + ".weight"] = rng.standard_normal(size, dtype=np.float32) * np.float32(0.02)
        if bias:
            out[name + ".bias"] = np.zeros(size[0], np.float32)

    def norm(name: str, size: int, bias: bool = False) -> None:
        out[name + ".weight"] = np.ones(size, np.float32)
        if bias:
            out[name + ".bias"] = np.zeros(size, np.float32)

    D, F, W = shape.width, shape.ffn, shape.tower_width
    kv = D // shape.heads * shape.kv_heads
    text = "language_model.model."
    draw(text + "embed_tokens", shape.vocab, D)
    draw("language_model.lm_head", shape.vocab, D)
    norm(text + "norm", D)
    for i in range(shape.layers):
        at = f"{text}layers.{i}."
        for name, size in (("q", (D, D)), ("k", (kv, D)), ("v", (kv, D)), ("o", (D, D))):
            draw(f"{at}self_attn.{name}_proj", *size)
        for name, size in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
            draw(f"{at}mlp.{name}_proj", *size)
        norm(at + "input_layernorm", D)
        norm(at + "post_attention_layernorm", D)
    tower = "vision_tower.vision_model."
    patches = (shape.image_size // shape.patch_size) ** 2
    out[tower + "embeddings.class_embedding"] = np.zeros(W, np.float32)
    draw(tower + "embeddings.patch_embedding", W, 3, shape.patch_size, shape.patch_size)
    draw(tower + "embeddings.position_embedding", patches + 1, W)
    norm(tower + "pre_layrnorm", W, bias=True)
    norm(tower + "post_layernorm", W, bias=True)
    for i in range(shape.tower_layers):
        at = f"{tower}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            draw(f"{at}self_attn.{name}", W, W, bias=True)
        draw(at + "mlp.fc1", 4 * W, W, bias=True)
        draw(at + "mlp.fc2", W, 4 * W, bias=True)
        norm(at + "layer_norm1", W, bias=True)
        norm(at + "layer_norm2", W, bias=True)
    draw("multi_modal_projector.linear_1", D, W, bias=True)
    draw("multi_modal_projector.linear_2", D, D, bias=True)
    return out


def _configs(shape: Shape) -> dict[str, Any]:
    side = {"height": shape.image_size, "width": shape.image_size}
    ids = {name: i for i, name in enumerate((PAD, BOS, EOS, USER, ASSISTANT, IMAGE))}
    return {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "torch_dtype": "float32",
            "image_token_index": ids[IMAGE],
            "ignore_index": -100,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": False,
            "vocab_size": shape.vocab,
            "eos_token_id": ids[EOS],
            "text_config": {
                "model_type": "llama",
                "hidden_size": shape.width,
                "num_hidden_layers": shape.layers,
                "intermediate_size": shape.ffn,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.kv_heads,
                "rms_norm_eps": 1e-5,
                "rope_theta": ROPE,
                "vocab_size": shape.vocab,
                "max_position_embeddings": 4096,
                "bos_token_id": ids[BOS],
                "eos_token_id": ids[EOS],
                "pad_token_id": ids[PAD],
                "tie_word_embeddings": False,
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": shape.tower_width,
                "intermediate_size": 4 * shape.tower_width,
                "num_hidden_layers": shape.tower_layers,
                "num_attention_heads": shape.tower_heads,
                "image_size": shape.image_size,
                "patch_size": shape.patch_size,
                "hidden_act": "quick_gelu",
                "layer_norm_eps": 1e-5,
                "projection_dim": shape.tower_width,
            },
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "do_center_crop": True,
            "do_normalize": True,
            "do_rescale": True,
            "size": {"shortest_edge": shape.image_size},
            "crop_size": side,
            "resample": 3,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE,
            "patch_size": shape.patch_size,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "add_bos_token": False,
            "model_max_length": 4096,
            "processor_class": "LlavaProcessor",
            "chat_template": TEMPLATE,
        },
        "special_tokens_map.json": {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD},
    }


def _tokenizer(model: Path) -> None:
    """A word a token, so that a row's tokens are those that its words count."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    control = (PAD, BOS, EOS, USER, ASSISTANT, IMAGE)
    vocab = {name: i for i, name in enumerate((*control, "<unk>"))}
    vocab |= {f"w{i}": len(vocab) + i for i in range(WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(name, special=True) for name in control])
    backend.save(str(model / "tokenizer.json"))


def _data(folder: Path, shape: Shape, rng: np.random.Generator) -> None:
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    with open(folder / "train.jsonl", "w", encoding="utf-8") as file:
        for number in range(shape.rows):
            answer = shape.supervised - 1  # the end token is supervised too
            question = shape.text - shape.supervised - 3  # <s>, <u> and <a>
            words = [f"w{i}" for i in rng.integers(0, WORDS, question + answer)]
            row: dict[str, Any] = {
                "messages": [
                    {"role": "user", "content": " ".join(words[:question])},
                    {"role": "assistant", "content": " ".join(words[question:])},
                ]
            }
            if shape.pictures:
                row["image"] = f"{number:03}.png"
                pixels = rng.integers(0, 256, (shape.image_size, shape.image_size, 3), np.uint8)
                Image.fromarray(pixels).save(folder / "images" / row["image"], compress_level=1)
            file.write(json.dumps(row) + "\n")


def _tokens(folder: Path, shape: Shape) -> None:
    from mlxvlm.data.samples import prepare
    from mlxvlm.data.sources import read_rows
    from mlxvlm.images.picture import Cut
    from mlxvlm.weights.load import load

    vlm = load(folder / "model")
    rows = list(read_rows(str(folder / "data")))
    samples, skipped = prepare(rows, vlm.tokenizer, vlm.config, lambda name, among=1: Cut(1), 4096)
    assert not skipped, skipped[0]
    tokens = np.stack([sample.tokens for sample in samples])
    supervised = np.stack([sample.supervised for sample in samples])
    assert tokens.shape[1] == shape.visual + shape.text, tokens.shape
    assert (supervised.sum(axis=1) == shape.supervised).all(), supervised.sum(axis=1)
    pixels = np.zeros(0, np.float32)
    if shape.pictures:
        names = sorted((folder / "data" / "images").iterdir())
        views = [p.views[0] for p in vlm.look([str(name) for name in names])]
        pixels = np.stack(views).astype(np.float32) / 127.5 - 1
    np.savez(folder / "rows.npz", tokens=tokens, supervised=supervised, pixels=pixels)


def _cache(folder: Path) -> None:
    from mlxvlm.cache.writer import write_cache
    from mlxvlm.weights.load import load_encoder, load_projected

    images = folder / "data" / "images"
    sources = [(path.name, path) for path in sorted(images.iterdir())]
    write_cache(load_encoder(str(folder / "model")), sources, folder / "cache", "bf16")
    write_cache(load_projected(str(folder / "model")), sources, folder / "projected", "bf16")
