"""The drawn world's small SigLIP is one: transformers reads its folder and agrees on the logits."""

import dataclasses
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.shapes import encoder, sigmoid, world  # noqa: E402
from examples.shapes.camera import as_drawn  # noqa: E402

pytestmark = pytest.mark.parity


def test_transformers_reads_the_folder(tmp_path):
    small = dataclasses.replace(
        encoder.CONFIG,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    mx.random.seed(5)
    tokenizer = sigmoid.make_tokenizer()
    model = sigmoid.make_model(tokenizer, small)
    model.logit_bias = mx.array([-3.0])
    sigmoid.save(model, tokenizer, tmp_path)
    shown, ids = sigmoid.batch(tokenizer, [as_drawn(world.make_scene(seed)) for seed in range(4)])
    theirs, report = transformers.SiglipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found = theirs.eval()(
            pixel_values=torch.tensor(np.array(shown)).permute(0, 3, 1, 2),
            input_ids=torch.tensor(np.array(ids)),
        ).logits_per_image
    assert np.allclose(found.numpy(), np.array(model.logits(shown, ids)), atol=1e-3)
