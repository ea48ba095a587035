"""The language model of a whole model as a folder of its own, for `mlxvlm build --language`.

    python -m examples.llava_stages.language weights/demo --out DIR

LLaVA begins with a tower and a language model that have never met; this parts two that have.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

import mlxvlm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    vlm = mlxvlm.load(options.model, dtype="float32")
    options.out.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(vlm.language.parameters()))
    mx.save_safetensors(str(options.out / "model.safetensors"), weights, {"format": "mlx"})
    (options.out / "config.json").write_text(json.dumps(vlm.config.language, indent=2) + "\n")
    assert vlm.tokenizer is not None, "a model from a folder has one."
    vlm.tokenizer.save(options.out)


if __name__ == "__main__":
    main()
