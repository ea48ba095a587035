"""What the inference benchmark runs on, as files: pictures, a SigLIP tower, a language model.

pictures/ has 640 x 480 JPEGs at quality 90, some 70 KB each; tower/ a model.safetensors with
Hugging Face's names, the patch weights in MLX's layout; model/ a LLaVA folder, as in the training
benchmark, and language/ its Llama alone; shape.json the sizes.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import training_subject

PICTURE = (640, 480)
# Of `training_subject`'s tokenizer.
IMAGE_ID = 5


@dataclass(frozen=True)
class Sizes:
    """pictures: how many. tower_*: of SigLIP-So400m, but for the layers. prompt, answer: tokens."""

    pictures: int = 32
    image_size: int = 384
    patch_size: int = 14
    tower_width: int = 1152
    tower_ffn: int = 4304
    tower_heads: int = 16
    tower_layers: int = 2
    width: int = 512
    layers: int = 8
    vocab: int = 32_000
    prompt: int = 512
    answer: int = 48

    def save(self, folder: Path) -> None:
        (folder / "shape.json").write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Sizes:
        return cls(**json.loads((folder / "shape.json").read_text()))


def make(folder: Path, sizes: Sizes, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    sizes.save(folder)
    rng = np.random.default_rng(seed)
    _pictures(folder / "pictures", sizes, rng)
    _tower(folder / "tower", sizes, rng)
    _language(folder, sizes, seed)
    return folder


def _pictures(folder: Path, sizes: Sizes, rng: np.random.Generator) -> None:
    """Detail at every scale, as photographs have it."""
    from PIL import Image

    folder.mkdir()
    width, height = PICTURE
    for number in range(sizes.pictures):
        canvas = np.full((height, width, 3), 128.0, np.float32)
        for cells in (4, 16, 64, 256):
            noise = rng.uniform(0, 255, (max(3, cells * 3 // 4), cells, 3)).astype(np.uint8)
            layer = Image.fromarray(noise).resize(PICTURE, Image.Resampling.BICUBIC)
            canvas += (np.asarray(layer, np.float32) - 127.5) * np.float32(1.6 / cells**0.5)
        image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
        image.save(folder / f"{number:03}.jpg", quality=90)


def _tower(folder: Path, sizes: Sizes, rng: np.random.Generator) -> None:
    from safetensors.numpy import save_file

    folder.mkdir()
    out: dict[str, np.ndarray] = {}

    def draw(name: str, *shape: int, bias: bool = True) -> None:
        scale = np.float32(int(np.prod(shape[1:])) ** -0.5)
        out[name + ".weight"] = rng.standard_normal(shape, dtype=np.float32) * scale
        if bias:
            out[name + ".bias"] = rng.standard_normal(shape[0], dtype=np.float32) * scale

    W, F, P = sizes.tower_width, sizes.tower_ffn, sizes.patch_size
    draw("embeddings.patch_embedding", W, P, P, 3)
    draw("embeddings.position_embedding", (sizes.image_size // P) ** 2, W, bias=False)
    for i in range(sizes.tower_layers):
        at = f"encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            draw(f"{at}self_attn.{name}", W, W)
        draw(at + "mlp.fc1", F, W)
        draw(at + "mlp.fc2", W, F)
        for name in ("layer_norm1", "layer_norm2"):
            out[f"{at}{name}.weight"] = np.ones(W, np.float32)
            out[f"{at}{name}.bias"] = np.zeros(W, np.float32)
    out["post_layernorm.weight"] = np.ones(W, np.float32)
    out["post_layernorm.bias"] = np.zeros(W, np.float32)
    save_file(out, folder / "model.safetensors", {"format": "mlx"})


def _language(folder: Path, sizes: Sizes, seed: int) -> None:
    from safetensors.numpy import load_file, save_file

    shape = training_subject.Shape(
        sizes.vocab,
        width=sizes.width,
        layers=sizes.layers,
        heads=sizes.width // 64,
        kv_heads=max(1, sizes.width // 256),
        ffn=sizes.width * 11 // 4,
        tower_width=32,
        tower_layers=1,
        tower_heads=1,
        image_size=28,
        pictures=False,
        rows=1,
        text=64,
    )
    whole = training_subject.make(folder / "whole", shape, seed) / "model"
    whole.rename(folder / "model")
    alone = folder / "language"
    alone.mkdir()
    weights = load_file(folder / "model" / "model.safetensors")
    mark = "language_model."
    # Ours never says what the tokenizer has no word for, nor an image token; mlx-lm might.
    kept = json.loads((folder / "model" / "tokenizer.json").read_text())["model"]["vocab"].values()
    spoken = np.isin(np.arange(sizes.vocab), [*kept]) & (np.arange(sizes.vocab) != IMAGE_ID)
    weights[mark + "lm_head.weight"] *= spoken[:, None].astype(np.float32)
    save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})
    save_file(
        {n.removeprefix(mark): x for n, x in weights.items() if n.startswith(mark)},
        alone / "model.safetensors",
        {"format": "mlx"},
    )
    config = json.loads((folder / "model" / "config.json").read_text())["text_config"]
    (alone / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (alone / name).write_text((folder / "model" / name).read_text())
