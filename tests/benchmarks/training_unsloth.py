"""Unsloth's MLX trainer behind the benchmark's gate: python training_unsloth.py SUBJECT

unsloth_zoo's own loader, adapters, loss and loop, on Linux too (UNSLOTH_ZOO_DISABLE_GPU_INIT=1),
with its settings made ours: AdamW at a constant rate without decay or clipping, one batch a step,
answers only, and no compilation, which its vision models do not take on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["UNSLOTH_ZOO_DISABLE_GPU_INIT"] = "1"

from training_gate import Gate
from training_subject import ASSISTANT, USER, Shape
from unsloth_zoo.mlx.loader import FastMLXModel  # pyright: ignore[reportMissingImports]
from unsloth_zoo.mlx.trainer import (  # pyright: ignore[reportMissingImports]
    MLXTrainer,
    MLXTrainingConfig,
    train_on_responses_only,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject", type=Path)
    args = parser.parse_args()
    shape = Shape.load(args.subject)
    gate = Gate()
    model, processor = FastMLXModel.from_pretrained(
        str(args.subject / "model"),
        max_seq_length=4096,
        dtype="float32",
        load_in_4bit=False,
        load_in_16bit=True,
        text_only=False,
    )
    model = FastMLXModel.get_peft_model(
        model,
        r=shape.rank,
        target_modules=shape.keys.split(","),
        lora_alpha=int(shape.scale * shape.rank),
        lora_dropout=0,
        use_gradient_checkpointing="mlx" if shape.grad_checkpoint else False,
        max_seq_length=4096,
    )
    with tempfile.TemporaryDirectory() as out:
        trainer = MLXTrainer(
            model,
            processor,
            _rows(args.subject),
            args=MLXTrainingConfig(
                per_device_train_batch_size=shape.batch,
                gradient_accumulation_steps=1,
                max_steps=10**5,
                warmup_steps=0,
                learning_rate=1e-4,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=0.0,
                max_grad_leaf_norm=0.0,
                logging_steps=1,
                output_dir=out,
                max_seq_length=4096,
                compile=False,
                gradient_checkpointing=shape.grad_checkpoint,
                disable_memory_limits=True,
            ),
            processor=processor,
        )
        train_on_responses_only(trainer, instruction_part=USER, response_part=ASSISTANT)

        def tell(step: int, total: int, loss: float, *values: Any, **more: Any) -> None:
            gate.loss = float(loss)
            gate.closes()
            gate.opens()

        trainer.add_step_callback(tell)
        gate.opens()
        trainer.train()


def _rows(subject: Path) -> list[dict[str, Any]]:
    found = []
    for line in (subject / "data" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        user, answer = row["messages"]
        parts: list[dict[str, Any]] = [{"type": "text", "text": user["content"]}]
        if "image" in row:
            path = str(subject / "data" / "images" / row["image"])
            parts.insert(0, {"type": "image", "image": path})
        found.append(
            {
                "messages": [
                    {"role": "user", "content": parts},
                    {
                        "role": "assistant",
                        "content": [{"type": "text", "text": answer["content"]}],
                    },
                ]
            }
        )
    return found


if __name__ == "__main__":
    main()
