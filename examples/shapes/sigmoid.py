"""Pre-trains the same tower as SigLIP itself was: by the sigmoid loss against captions.

Where `encoder` has the generator name every patch, this has only pictures and sentences. A picture
and its own caption shall agree, and disagree with the batch's other captions, each pair by itself
(Zhai et al. 2023, arXiv 2303.15343). The small text tower, the attention-pooling head, the
temperature and the bias are SigLIP's. The folder is laid out as the hub keeps a whole SigLIP:
`mlxvlm score` reads both towers, `mlxvlm build --vision` takes the one that sees.

    python -m examples.shapes.sigmoid --out runs/shapes/siglip
    mlxvlm score picture.png "a big red circle in the top left" -m runs/shapes/siglip
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from examples.shapes.camera import Shot, as_drawn, shoot
from examples.shapes.encoder import (
    CONFIG,
    fit,
    fresh_scenes,
    pixels,
    report,
    tower_config,
    tower_tensors,
    write_folder,
)
from examples.shapes.phrases import article
from examples.shapes.questions import ask_one
from examples.shapes.things import short
from examples.shapes.tokenizer import build
from examples.shapes.world import NUMBERS, WORDS, Bar, Print, Scene, Thing, make_scene, seeds
from mlxvlm.config import VisionConfig
from mlxvlm.language.siglip_tokenizer import SiglipTokenizer
from mlxvlm.language.tokenizer import Tokenizer
from mlxvlm.vision.siglip import Siglip, SiglipText, SiglipTextConfig

# The longest description has 37 tokens with its end.
LENGTH = 40
WHOLE = 0.5  # of the captions name everything; the others name one or two items
EOS, PAD = "<|eot_id|>", "<|end_of_text|>"
NOTHING = "nothing"  # of a picture with nothing drawn


def tokenizer_settings() -> dict[str, str]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD}


def make_tokenizer() -> SiglipTokenizer:
    """The demo's tokenizer, with printed words in lower case too: SigLIP lower-cases its texts."""
    tokenizer = Tokenizer(
        build(["and", *(word.lower() for word in WORDS)]), None, tokenizer_settings()
    )
    eos, pad = tokenizer.id(EOS), tokenizer.id(PAD)
    assert eos is not None and pad is not None, "the tokenizer has its control tokens."
    return SiglipTokenizer(tokenizer, LENGTH, eos, pad)


def text_config(vocab_size: int, vision: VisionConfig = CONFIG) -> SiglipTextConfig:
    return SiglipTextConfig(
        vocab_size=vocab_size,
        hidden_size=vision.hidden_size,
        intermediate_size=2 * vision.hidden_size,
        num_hidden_layers=2,
        num_attention_heads=vision.num_attention_heads,
        max_position_embeddings=LENGTH,
    )


def make_model(tokenizer: SiglipTokenizer, vision: VisionConfig = CONFIG) -> Siglip:
    """Both towers with fresh weights, the temperature at 10 and the bias at -10."""
    return Siglip(vision, text_config(tokenizer.tokenizer.vocab_size, vision))


def phrase(item: Thing | Print | Bar) -> str:
    if isinstance(item, Bar):
        return f"{article(item.color)} bar at {NUMBERS[item.height]}"
    return f"{short(item)} in the {item.place}"


def caption(scene: Scene) -> str:
    """A sentence about the scene, a function of it: all that is in it, or one or two items."""
    if scene.kind == "texture":
        return NOTHING
    rng = random.Random(f"caption {scene.seed}")
    if rng.random() < WHOLE:
        qa = ask_one("describe", scene)
        assert qa is not None, "every drawn scene has a description."
        return qa.answer
    items: Sequence[Thing | Print | Bar] = scene.bars or scene.items
    some = rng.sample(items, min(len(items), rng.randint(1, 2)))
    return " and ".join(phrase(item) for item in some)


def loss(model: Siglip, shown: mx.array, ids: mx.array) -> mx.array:
    """SigLIP's: of all pairs, those on the diagonal agree; the sum over pairs for each picture."""
    logits = model.logits(shown, ids)
    signs = 2 * mx.eye(logits.shape[0]) - 1
    return -nn.log_sigmoid(signs * logits).sum() / logits.shape[0]


def batch(tokenizer: SiglipTokenizer, shots: Sequence[Shot]) -> tuple[mx.array, mx.array]:
    """Normalised pixels [N, S, S, 3] and the captions' ids [N, LENGTH]."""
    ids = tokenizer([caption(shot.scene) for shot in shots])
    return pixels(shot.image for shot in shots), mx.array(ids)


def retrieval(
    model: Siglip, tokenizer: SiglipTokenizer, split: str = "heldout", count: int = 256
) -> dict[str, float]:
    """How often, in batches of 32, a picture's own caption is the best of all, and the reverse."""
    source, found = seeds(split), []
    for _ in range(0, count, 32):
        shots = [as_drawn(make_scene(next(source))) for _ in range(32)]
        logits = np.array(model.logits(*batch(tokenizer, shots)))
        own = np.arange(32)
        found.append([(logits.argmax(axis) == own).mean() for axis in (1, 0)])
    by_picture, by_caption = np.mean(found, axis=0)
    return {"captions of pictures": float(by_picture), "pictures of captions": float(by_caption)}


def text_tensors(tower: SiglipText) -> dict[str, mx.array]:
    parameters: dict[str, mx.array] = dict(tree_flatten(tower.parameters()))
    return {f"text_model.{name}": value for name, value in parameters.items()}


def save(model: Siglip, tokenizer: SiglipTokenizer, out: Path) -> None:
    """Writes both towers and the tokenizer as the hub keeps a whole SigLIP."""
    tensors = {
        **tower_tensors(model.vision_model),
        **text_tensors(model.text_model),
        "logit_scale": model.logit_scale,
        "logit_bias": model.logit_bias,
    }
    text: dict[str, Any] = {
        "model_type": "siglip_text_model",
        **dataclasses.asdict(model.text_model.config),
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": None,
    }
    raw = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": text,
        "vision_config": tower_config(model.vision_model.config),
    }
    write_folder(out, tensors, raw, model.vision_model.config)
    tokenizer.tokenizer.save(out)
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_settings(), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-trains a small SigLIP by the sigmoid loss.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--eval", type=int, default=256, help="held-out scenes at the end")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    mx.random.seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    fresh = fresh_scenes(args.batch_size)
    batches = (batch(tokenizer, [shoot(scene) for scene in scenes]) for scenes in fresh)
    report(args.steps, fit(model, loss, batches, args.steps, args.learning_rate))
    save(model, tokenizer, args.out)
    temperature, bias = mx.exp(model.logit_scale).item(), model.logit_bias.item()
    print(f"temperature {temperature:.2f}, bias {bias:.2f}")
    for name, share in retrieval(model, tokenizer, count=args.eval).items():
        print(f"held-out {name}, of 32: {100 * share:.1f} %")


if __name__ == "__main__":
    main()
