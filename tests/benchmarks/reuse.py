"""Time to the first token of a second question about a picture, beside the first's.

    OPENBLAS_NUM_THREADS=1 LD_PRELOAD=libopenblas.so.0 python tests/benchmarks/reuse.py \\
        [--width 512] [--layers 8] [--vision-layers 4] [--pairs 15] [--dtype float32] [--json]

729 visual tokens: So400m's views (384 pixels, patches of 14) through layers of its width, the
attention projector and a Llama, all with random weights; a question and an answer of some twenty
bytes, a token each. Goal: at most 15% of the first's, every pair on a picture of its own. `same`
says whether the second answer is that of a call without a past, token for token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mlx.core as mx
from tiny_vlm import IMAGE, VOCAB, picture, tiny_tokenizer

from mlxvlm.chat import Conversation
from mlxvlm.config import ModelConfig, ProjectorConfig, PromptConfig, TilingConfig, VisionConfig
from mlxvlm.model import VLM
from mlxvlm.reply import last_reply

GOAL = 0.15


def main() -> None:
    args = parse()
    vlm = build(args)
    last_reply(Conversation(vlm, max_tokens=2).ask("Warm up."))
    ratios, firsts, seconds, same, reused = [], [], [], True, 0
    for pair in range(args.pairs):
        chat = Conversation(vlm, max_tokens=20)
        chat.add(picture(pair, 480))
        first = last_reply(chat.ask("What is in this picture?"))
        second = last_reply(chat.ask("And what colour is it?"))
        fresh = vlm.generate(chat.messages[:-1], chat.pictures, max_tokens=20)
        same &= second.tokens == fresh.tokens
        firsts.append(first.time_to_first_token_s)
        seconds.append(second.time_to_first_token_s)
        ratios.append(seconds[-1] / firsts[-1])
        reused = second.reused_tokens
    result = {
        "pairs": args.pairs,
        "first_s": statistics.median(firsts),
        "second_s": statistics.median(seconds),
        "ratio": statistics.median(ratios),
        "worst": max(ratios),
        "goal": GOAL,
        "prompt_tokens": second.prompt_tokens,
        "reused_tokens": reused,
        "same": same,
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"first {result['first_s']:.3f} s, second {result['second_s']:.3f} s: "
            f"{100 * result['ratio']:.1f}% (worst of {args.pairs}: {100 * result['worst']:.1f}%), "
            f"goal {100 * GOAL:.0f}%; {reused} of {second.prompt_tokens} tokens reused; same "
            f"answers: {'yes' if same else 'no'}"
        )
    sys.exit(result["ratio"] > GOAL or (args.dtype == "float32" and not same))


def build(args: argparse.Namespace) -> VLM:
    mx.random.seed(0)
    language: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": args.width,
        "num_hidden_layers": args.layers,
        "intermediate_size": 4 * args.width,
        "num_attention_heads": args.width // 64,
        "num_key_value_heads": max(1, args.width // 256),
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    vision = VisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=args.vision_layers,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    config = ModelConfig(
        tiling=TilingConfig(image_size=384),
        vision=vision,
        projector=ProjectorConfig(hidden_size=args.width, num_attention_heads=args.width // 64),
        prompt=PromptConfig(image_token_id=IMAGE),
        language=language,
    )
    vlm = VLM(config, tiny_tokenizer())
    vlm.set_dtype(getattr(mx, args.dtype))
    vlm.eval()
    mx.eval(vlm.parameters())
    return vlm


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vision-layers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
