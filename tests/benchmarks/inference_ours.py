"""Ours behind the inference benchmark's gate: python inference_ours.py SUBJECT TASK

pictures and tower take turns with a peer in another process; language has mlx-lm in this one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mlx.core as mx
import numpy as np
from inference_gate import Turn, serve
from inference_subject import Sizes

from mlxvlm.config import TilingConfig, VisionConfig
from mlxvlm.images.picture import Picture
from mlxvlm.vision.build import build_vision
from mlxvlm.vision.encoder import Encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject", type=Path)
    parser.add_argument("task", choices=("pictures", "tower", "language"))
    args = parser.parse_args()
    sizes = Sizes.load(args.subject)
    tasks = {"pictures": pictures, "tower": tower, "language": language}
    serve(tasks[args.task](args.subject, sizes))


def pictures(subject: Path, sizes: Sizes) -> dict[str, Turn]:
    """Files to normalised pixels on the device, and to the uint8 that the encoder really takes."""
    encoder = _encoder(sizes, layers=1)
    files = [str(path) for path in sorted((subject / "pictures").iterdir())]
    out = subject / "pixels-ours.npy"

    def normalised() -> dict[str, Any]:
        pixels = encoder.pixels(encoder.look(files))
        mx.eval(pixels)
        if not out.exists():
            np.save(out, np.array(pixels))
        return {}

    def shipped() -> dict[str, Any]:
        mx.eval(mx.array(np.stack([p.views[0] for p in encoder.look(files)])))
        return {}

    return {"ours": normalised, "ours, uint8": shipped}


def tower(subject: Path, sizes: Sizes) -> dict[str, Turn]:
    encoder = _encoder(sizes, sizes.tower_layers)
    encoder.vision.load_weights(str(subject / "tower" / "model.safetensors"))
    mx.eval(encoder.vision.parameters())
    view = np.load(subject / "view.npy")
    out = subject / "features-ours.npy"

    def run() -> dict[str, Any]:
        (features,) = encoder.encode([Picture([view])])
        mx.eval(features.views)
        if not out.exists():
            np.save(out, np.array(features.array))
        return {}

    return {"ours": run}


def _encoder(sizes: Sizes, layers: int) -> Encoder:
    config = VisionConfig(
        hidden_size=sizes.tower_width,
        intermediate_size=sizes.tower_ffn,
        num_hidden_layers=layers,
        num_attention_heads=sizes.tower_heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        vision_feature_layer=-1,
        vision_feature_norm=True,
    )
    return Encoder(build_vision(config), config, TilingConfig(image_size=sizes.image_size))


def language(subject: Path, sizes: Sizes) -> dict[str, Turn]:
    """`VLM.stream`'s own loop beside mlx-lm's `stream_generate`: one prompt, greedy, no stop."""
    from mlx_lm import load as load_alone
    from mlx_lm import stream_generate

    from mlxvlm.prompts import Prompt
    from mlxvlm.reply import answer
    from mlxvlm.weights.load import load

    vlm = load(subject / "model")
    loaded: Any = load_alone(str(subject / "language"))
    alone, tokenizer = loaded[:2]
    mx.eval(vlm.parameters(), alone.parameters())
    assert vlm.tokenizer is not None
    vlm.tokenizer.eos_token_ids = []  # neither stops early
    tokenizer.eos_token_ids = set()
    rng = np.random.default_rng(0)
    ids = rng.integers(10, 150, sizes.prompt)

    def timed(tokens: Any) -> dict[str, Any]:
        start, found, first = time.process_time(), [], 0.0
        for token in tokens:
            if not found:
                first = time.process_time() - start
            found.append(token)
        whole = time.process_time() - start
        return {"prefill": first, "decode": whole - first, "tokens": found[: sizes.answer]}

    def ours() -> dict[str, Any]:
        prompt = Prompt(ids.copy(), np.zeros(len(ids), bool))
        chunks = answer(vlm, prompt, max_tokens=sizes.answer)
        return timed(c.token for c in chunks if c.token is not None)

    def theirs() -> dict[str, Any]:
        found = stream_generate(alone, tokenizer, ids.tolist(), max_tokens=sizes.answer)
        return timed(step.token for step in found)

    return {"ours": ours, "mlx-lm": theirs}


if __name__ == "__main__":
    main()
