"""Makes the small Llama that the demo starts from: config, tokenizer and fresh weights.

The folder looks like any Llama's from the hub, so `mlxvlm build --language` takes it as it is.

    python -m examples.shapes.language --out runs/shapes/language
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import Tokenizer

from examples.shapes.tokenizer import CONTROLS, build, tokenizer_config
from mlxvlm.language.load import build_language

# Keys start as the queries times this: every head first looks for tokens like its own.
KEYS_FROM_QUERIES = 1.5


def config(vocab_size: int, bos: int, eos: list[int]) -> dict:
    """config.json, under Hugging Face's names."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 160,
        "intermediate_size": 416,
        "num_hidden_layers": 5,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 1024,
        "vocab_size": vocab_size,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }


def weights(raw: dict) -> dict[str, mx.array]:
    """MLX's own random start, but for the keys."""
    found = dict(tree_flatten(build_language(raw).parameters()))
    for name in list(found):
        if name.endswith("k_proj.weight"):
            queries = found[name.replace("k_proj", "q_proj")]
            found[name] = queries * KEYS_FROM_QUERIES
    return found


def save(out: Path, seed: int = 0, tokenizer: Tokenizer | None = None, **changes: int) -> int:
    """Writes the folder; the number of tokens in the vocabulary.

    tokenizer: one with the same `CONTROLS`, instead of the drawn world's. `changes` are to the
    config.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or build()
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    vocab = tokenizer.get_vocab()
    bos, end, *_, eot, _ = (vocab[name] for name in CONTROLS)
    raw = config(tokenizer.get_vocab_size(), bos, [end, eot]) | changes
    for name, value in (("config.json", raw), ("tokenizer_config.json", tokenizer_config())):
        (out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    mx.random.seed(seed)
    mx.save_safetensors(str(out / "model.safetensors"), weights(raw), metadata={"format": "mlx"})
    return tokenizer.get_vocab_size()


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the small Llama that the demo starts from.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{args.out}: {save(args.out, args.seed)} tokens")


if __name__ == "__main__":
    main()
