"""mlx-lm's LoRA trainer behind the benchmark's gate: python training_mlx_lm.py SUBJECT

Its own loop, compiled as it is by default, on the language model's weights and rows without
pictures; `--mask-prompt` as offsets, so that it supervises the same tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, iterate_batches, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from training_gate import Gate
from training_subject import ROPE, Shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject", type=Path)
    args = parser.parse_args()
    shape = Shape.load(args.subject)
    gate = Gate()
    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            intermediate_size=shape.ffn,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            rms_norm_eps=1e-5,
            rope_theta=ROPE,
            vocab_size=shape.vocab,
            tie_word_embeddings=False,
        )
    )
    weights = mx.load(str(args.subject / "model" / "model.safetensors"))
    prefix = "language_model."
    own = [(k.removeprefix(prefix), v) for k, v in weights.items() if k.startswith(prefix)]
    model.load_weights(own)
    del weights, own
    model.freeze()
    mx.random.seed(0)
    keys = [f"{_home(key)}.{key}" for key in shape.keys.split(",")]
    linear_to_lora_layers(
        model,
        shape.layers,
        {"rank": shape.rank, "scale": shape.scale, "dropout": 0.0, "keys": keys},
    )
    mx.eval(tree_map(lambda x: x, model.parameters()))
    rows = np.load(args.subject / "rows.npz")
    first = rows["supervised"].argmax(axis=1)
    # Its lengths are where supervision starts, counted from the second token, and the last token.
    data = [(row.tolist(), int(at)) for row, at in zip(rows["tokens"], first, strict=True)]

    class Tell(TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            gate.loss = train_info["train_loss"]

    def paced(**options):  # the trainer asks for them by these names
        return gate.paced(iterate_batches(**options))

    with tempfile.TemporaryDirectory() as out:
        train(
            model,
            optim.AdamW(learning_rate=1e-4, weight_decay=0.0, bias_correction=True),
            data,
            None,
            TrainingArgs(
                batch_size=shape.batch,
                iters=10**6,
                steps_per_report=1,
                steps_per_save=10**6,
                max_seq_length=4096,
                adapter_file=str(Path(out) / "adapters.safetensors"),
                grad_checkpoint=shape.grad_checkpoint,
            ),
            iterate_batches=paced,
            training_callback=Tell(),
        )


def _home(key: str) -> str:
    return "self_attn" if key in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"


if __name__ == "__main__":
    main()
