"""mlx-vlm's SFT trainer behind the benchmark's gate: python training_mlx_vlm.py SUBJECT

Its own engine, loss, collation, LoRA layers and LLaVA, with two of that LLaVA's faults mended, for
else a batch of four crashes: the padding mask is not taken for the whole attention mask, and each
row gets its own picture. Pixels come ready, so that opening pictures costs it nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_vlm.models.llava import llava  # pyright: ignore[reportMissingImports]
from mlx_vlm.trainer.common.engine import train  # pyright: ignore[reportMissingImports]
from mlx_vlm.trainer.peft.utils import get_peft_model  # pyright: ignore[reportMissingImports]
from mlx_vlm.trainer.vlm.config import VLMTrainingArgs  # pyright: ignore[reportMissingImports]
from mlx_vlm.trainer.vlm.sft.runtime import make_task  # pyright: ignore[reportMissingImports]
from mlx_vlm.utils import load_model  # pyright: ignore[reportMissingImports]
from training_gate import Gate
from training_subject import Shape


class Mended(llava.Model):
    """Causal, and with as many pictures as rows."""

    def __call__(self, input_ids: Any, pixel_values: Any, mask: Any, **options: Any) -> Any:
        return super().__call__(input_ids, pixel_values, None, **options)

    def _merge_input_ids_with_image_features(self, image_features, inputs_embeds, input_ids):
        B, N, D = image_features.shape
        places = input_ids == self.config.image_token_index
        index = mx.clip(mx.cumsum(places, axis=1) - 1, 0, N - 1)
        found = mx.take_along_axis(image_features, index[..., None], axis=1)
        return mx.where(places[..., None], found, inputs_embeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject", type=Path)
    args = parser.parse_args()
    shape = Shape.load(args.subject)
    gate = Gate()
    model = load_model(args.subject / "model")
    model.__class__ = Mended
    model.set_dtype(mx.float32)
    mx.random.seed(0)
    get_peft_model(
        model,
        shape.keys.split(","),
        rank=shape.rank,
        alpha=shape.scale * shape.rank,
        dropout=0.0,
        verbose=False,
    )
    mx.eval(model.parameters())
    mx.clear_cache()
    options = VLMTrainingArgs(
        batch_size=shape.batch,
        iters=10**6,
        steps_per_report=1,
        steps_per_eval=None,
        steps_per_save=10**6,
        max_seq_length=4096,
        train_on_completions=True,
        grad_checkpoint=shape.grad_checkpoint,
    )
    task = make_task(model, options)
    batches = task.batches
    task = dataclasses.replace(task, batches=lambda *a, **k: gate.paced(iter(batches(*a, **k))))

    def tell(info: dict[str, Any]) -> None:
        gate.loss = info["train_loss"]

    with tempfile.TemporaryDirectory() as out:
        train(
            model,
            optim.AdamW(learning_rate=1e-4, weight_decay=0.0, bias_correction=True),
            _rows(args.subject),
            None,
            dataclasses.replace(options, adapter_file=str(Path(out) / "adapters.safetensors")),
            task,
            SimpleNamespace(on_train_loss_report=tell),
        )


def _rows(subject: Path) -> list[dict[str, Any]]:
    rows = np.load(subject / "rows.npz")
    found = []
    for number, (tokens, supervised) in enumerate(
        zip(rows["tokens"], rows["supervised"], strict=True)
    ):
        row: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "completion_mask": supervised.astype(np.int32),
        }
        if len(rows["pixels"]):
            row["pixel_values"] = mx.array(rows["pixels"][number].transpose(2, 0, 1))
        found.append(row)
    return found


if __name__ == "__main__":
    main()
