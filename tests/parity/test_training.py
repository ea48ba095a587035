"""One training step against transformers and torch, on the same tiny LLaVA."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mlx.utils import tree_flatten  # noqa: E402
from tiny_tokenizers import sentencepiece, write_folder  # noqa: E402

from mlxvlm.data.buckets import collate, group  # noqa: E402
from mlxvlm.data.samples import Sample  # noqa: E402
from mlxvlm.train.losses import batch_loss, count, gradients  # noqa: E402
from mlxvlm.train.optimizer import Optimizer, clip  # noqa: E402
from mlxvlm.train.stages import TrainConfig  # noqa: E402
from mlxvlm.weights.load import load  # noqa: E402

pytestmark = pytest.mark.parity

IMAGE, VOCAB = 99, 120


def make(tower: str, select: str):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    text = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_theta": 500000.0,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    vision = {"clip": transformers.CLIPVisionConfig, "siglip": transformers.SiglipVisionConfig}
    config = transformers.LlavaConfig(
        vision_config=vision[tower](**sizes),
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy=select,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.08)
    return model


def rows(visual: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    found = []
    for length, answer in ((9, 3), (14, 6)):
        words = rng.integers(3, 90, length)
        tokens = np.concatenate([[1, 2], [IMAGE] * visual, words]).astype(np.int32)
        supervised = np.zeros(len(tokens), bool)
        supervised[-answer:] = True
        found.append(Sample(tokens, supervised, [str(length)], 2 + visual))
    return found


def torch_inputs(samples: list[Sample], pixels: np.ndarray) -> dict:
    width = max(len(s.tokens) for s in samples)
    ids, labels, mask = (np.zeros((len(samples), width), np.int64) for _ in range(3))
    for i, s in enumerate(samples):
        n = len(s.tokens)
        ids[i, :n], mask[i, :n] = s.tokens, 1
        labels[i] = -100
        labels[i, :n] = np.where(s.supervised, s.tokens, -100)
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
        "pixel_values": torch.tensor(pixels.transpose(0, 3, 1, 2)),
    }


def store(model, folder) -> None:
    write_folder(folder, sentencepiece())
    model.save_pretrained(folder)


def as_ours(model, values: dict, folder) -> dict[str, mx.array]:
    """Tensors of torch's model (weights or gradients) under our names, through our own loader."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values.get(name, torch.zeros_like(parameter)))
    store(model, folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    return dict(tree_flatten(load(folder).parameters()))


# On SigLIP "default" drops a patch: transformers drops the first token of any tower.
@pytest.mark.parametrize(
    ("tower", "select", "visual"),
    [("clip", "default", 16), ("siglip", "full", 16), ("siglip", "default", 15)],
)
def test_loss_gradients_and_five_steps(tower, select, visual, tmp_path):
    model, samples = make(tower, select), rows(visual)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    store(model, tmp_path / "model")
    vlm = load(tmp_path / "model")
    pixels = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    inputs = torch_inputs(samples, pixels)
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)

    vlm.freeze()
    vlm.projector.unfreeze()
    vlm.language.unfreeze()
    config = TrainConfig(train="projector,lm", learning_rate=1e-3, max_grad_norm=1.0)
    optimizer = Optimizer(config, dict(tree_flatten(vlm.trainable_parameters())))
    batch = collate(group(samples, 0), 8)
    features = mx.stack(
        [
            view
            for found in vlm.encoder.encode([_picture(p) for p in pixels])
            for view in found.views
        ]
    )
    gradient = nn.value_and_grad(vlm, batch_loss)
    for step in range(5):
        adamw.zero_grad()
        theirs = model(**inputs).loss
        theirs.backward()
        parameters = dict(tree_flatten(vlm.trainable_parameters()))
        grads, parts = gradients(gradient, vlm, batch, features, {}, count([batch]))
        assert parts["loss"].item() == pytest.approx(theirs.item(), abs=1e-5)
        if step == 0:
            theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            expected = as_ours(model, theirs, tmp_path / "gradients")
            for name, value in grads.items():
                assert mx.abs(value - expected[name]).max().item() < 1e-5, name
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        grads, _ = clip(grads, 1.0)
        vlm.load_weights(list(optimizer.apply(grads, parameters, 1.0).items()), strict=False)
    expected = as_ours(model, dict(model.named_parameters()), tmp_path / "after")
    for name, value in tree_flatten(vlm.trainable_parameters()):
        assert mx.abs(value - expected[name]).max().item() < 1e-5, name


def _picture(pixels: np.ndarray):
    from mlxvlm.images.picture import Picture

    return Picture([pixels])
