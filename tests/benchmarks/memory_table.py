"""What runs on Macs of 8 to 64 GB, by `mlxvlm plan`'s arithmetic: chat, LoRA, projector training.

    python tests/benchmarks/memory_table.py [--json]

Language models of three sizes, bf16 and in 4 bits, behind SigLIP-So400m at 384 pixels (bf16) with
the default projector and 729 visual tokens a picture. Nothing is loaded: memory is worked out from
the graphs of a model of 4 blocks and one of 8, and carried on to all blocks. Training is a row of
one picture and 60 tokens from a cache of features, blocks computed twice where else it does not
fit. Chat is the heavier of encoding a picture and reading a prompt with it, with keys and values
for 4,096 tokens. Half a GB is added for Python and its libraries. Estimates: no Mac has measured
them; tests/benchmarks/plan.py measures the same arithmetic on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlxvlm.config import ModelConfig, ProjectorConfig
from mlxvlm.language.kv import KVSettings, arrays_of, make_caches
from mlxvlm.language.quantise import quantise
from mlxvlm.machine.chips import machine
from mlxvlm.machine.memory import peak
from mlxvlm.machine.tonight import HOST, LANGUAGES, scaled_step
from mlxvlm.machine.trace import trace
from mlxvlm.model import VLM

NAMES = ("Llama 3.2 1B", "Llama 3.2 3B", "Llama 3 8B")
MEMORY = (8, 16, 24, 32, 64)
CONTEXT = 4096
PROMPT = 729 + 60
BLOCKS = (4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in NAMES:
        for bits in (16, 4):
            row: dict[str, Any] = {"language": name, "bits": bits, "chat": [chat(name, bits)]}
            for stage in ("lora", "pretrain"):
                row[stage] = [
                    scaled_step(LANGUAGES[name], bits, "none", stage, twice).peak.bytes + HOST
                    for twice in (False, True)
                ]
            rows.append(row)
            if not args.json:
                print(f"{name}, {bits} bits: done", file=sys.stderr)
    usable = {size: machine(f"{size}GB", "M1").usable for size in MEMORY}
    if args.json:
        print(json.dumps({"usable": usable, "rows": rows}))
        return
    print(table(rows, usable))


def table(rows: list[dict[str, Any]], usable: dict[int, int]) -> str:
    """Markdown: the memory that each takes, and the smallest Mac whose GPU may use so much."""
    lines = [
        "| language model | weights | chat | LoRA | projector |",
        "|---|---|--:|--:|--:|",
    ]
    for row in rows:
        cells = [row["language"], "bf16" if row["bits"] == 16 else "4 bits"]
        for task in ("chat", "lora", "pretrain"):
            cells.append(cell(row[task], usable))
        lines.append("| " + " | ".join(cells) + " |")
    room = ", ".join(f"{size}: {most / 1e9:.1f}" for size, most in usable.items())
    lines.append(
        f"\nGB, then the smallest Mac that has them (usable GB of each: {room}); `*`: "
        "with `--grad-checkpoint`."
    )
    return "\n".join(lines)


def cell(needs: list[int], usable: dict[int, int]) -> str:
    for size, most in usable.items():
        for twice, need in enumerate(needs):
            if need <= most:
                return f"{need / 1e9:.1f}{'*' if twice else ''}, **{size} GB**"
    return f"{min(needs) / 1e9:.1f}, more than {max(usable)} GB"


def chat(name: str, bits: int) -> int:
    few, more = (_chat({**LANGUAGES[name], "num_hidden_layers": n}, bits) for n in BLOCKS)
    steps = (LANGUAGES[name]["num_hidden_layers"] - BLOCKS[0]) / (BLOCKS[1] - BLOCKS[0])
    return max(round(a + steps * (b - a)) for a, b in zip(few, more, strict=True)) + HOST


def _chat(language: dict[str, Any], bits: int) -> tuple[int, int]:
    """Bytes while a picture is encoded, and while a prompt with it is read."""
    vlm = VLM(ModelConfig(projector=ProjectorConfig(), language=language))
    vlm.set_dtype(mx.bfloat16)
    if bits < 16:
        quantise(vlm.language, bits)
    side, width = vlm.config.vision.image_size, language["hidden_size"]
    view = mx.zeros((1, side, side, 3), mx.uint8)
    visual = mx.zeros((1, vlm.config.tokens_per_view, vlm.config.vision.hidden_size), mx.bfloat16)
    encoding = _peak(vlm, "vision", [view], lambda found: [vlm.encoder.run(found[0])])
    # The features of the picture, and their projection, stay while the prompt is read.
    beside = visual.nbytes + 2 * vlm.config.tokens_per_view * width
    caches = make_caches(vlm.language, KVSettings())
    tokens = mx.zeros((1, PROMPT), mx.int32)

    def read(found: list[mx.array]) -> list[mx.array]:
        vlm.language(tokens, cache=caches, input_embeddings=found[0])
        return arrays_of(caches)

    embeddings = mx.zeros((1, PROMPT, width), mx.bfloat16)
    reading = _peak(vlm, "language", [embeddings], read) + beside
    a_token = 2 * 2 * language["num_key_value_heads"] * (width // language["num_attention_heads"])
    kept = language["num_hidden_layers"] * a_token * (CONTEXT - PROMPT)
    sizes = {
        part: sum(x.nbytes for _, x in _arrays(vlm[part]))
        for part in ("vision", "projector", "language")
    }
    return (
        encoding + sizes["projector"] + sizes["language"],
        reading + sizes["projector"] + sizes["vision"] + kept,
    )


def _peak(vlm: VLM, part: str, inputs: list[mx.array], run: Any) -> int:
    """MLX's peak over one call, its weights among them."""
    module = vlm[part]
    weights = _arrays(module)
    names = [name for name, _ in weights]

    def call(*given: mx.array) -> list[mx.array]:
        own = list(given[len(inputs) :])
        module.update(tree_unflatten(list(zip(names, own, strict=True))))
        return run(list(given[: len(inputs)]))

    try:
        graph = trace(call, [*inputs, *(x for _, x in weights)])
    finally:
        module.update(tree_unflatten(weights))
    return peak(graph, [graph.outputs], lambda number: "", held=graph.inputs).bytes


def _arrays(module: Any) -> list[tuple[str, mx.array]]:
    flat: Any = tree_flatten(module.parameters())
    return flat


if __name__ == "__main__":
    main()
