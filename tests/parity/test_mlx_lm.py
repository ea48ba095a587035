"""mlx-lm's folders and ours: what it converts we build on, and what we adapt it loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mlx.core as mx  # noqa: E402
import mlx_lm  # noqa: E402
from checkpoints import old_rope  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from tiny_tokenizers import LLAMA3_TEMPLATE, byte_level, write_folder  # noqa: E402
from tiny_vlm import picture  # noqa: E402

import mlxvlm  # noqa: E402
from mlxvlm.config import LoRAConfig  # noqa: E402
from mlxvlm.language.lora import add_lora, fuse  # noqa: E402
from mlxvlm.weights.adapter import save_adapter  # noqa: E402
from mlxvlm.weights.join import join  # noqa: E402
from mlxvlm.weights.save import save  # noqa: E402

pytestmark = pytest.mark.parity

DECODER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
# name -> dtype, tied embeddings, mlx_lm.convert's settings (None: transformers' own folder)
CASES: dict[str, tuple[str, bool, dict[str, Any] | None]] = {
    "float32": ("float32", False, None),
    "float32-tied": ("float32", True, None),
    "bfloat16": ("bfloat16", False, {}),
    "q4": ("float32", False, {"quantize": True, "q_group_size": 64, "q_bits": 4}),
    "q4-bf16-tied": ("bfloat16", True, {"quantize": True, "q_group_size": 64, "q_bits": 4}),
    "q8-bf16": ("bfloat16", False, {"quantize": True, "q_group_size": 32, "q_bits": 8}),
    "mixed": ("float32", False, {"quantize": True, "quant_predicate": "mixed_3_6"}),
    "mxfp4": ("bfloat16", False, {"quantize": True, "q_mode": "mxfp4"}),
    "nvfp4": ("bfloat16", False, {"quantize": True, "q_mode": "nvfp4"}),
}


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("siglip")
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER))
    draw(model)
    model.save_pretrained(folder)
    return folder


def draw(model: Any) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.15 + (1 if "norm" in name and p.ndim == 1 else 0))


def llama(folder: Path, dtype: str, tied: bool, convert: dict[str, Any] | None) -> Path:
    """A Llama 3 with the hub's names, as transformers or mlx-lm writes it."""
    config = transformers.LlamaConfig(**DECODER, rope_parameters=LLAMA3, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config)
    draw(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder / "hf")
    (folder / "hf/generation_config.json").unlink()  # names ends of another vocabulary
    backend = byte_level()
    raw = json.loads((folder / "hf/config.json").read_text())
    old_rope(raw)
    ends = [backend.token_to_id(name) for name in ("<|end_of_text|>", "<|eot_id|>")]
    raw |= {"bos_token_id": backend.token_to_id("<|begin_of_text|>"), "eos_token_id": ends}
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    names |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": LLAMA3_TEMPLATE}
    write_folder(folder / "hf", backend, config=raw, tokenizer_config=names)
    if convert is None:
        return folder / "hf"
    mlx_lm.convert(str(folder / "hf"), str(folder / "mlx"), **convert)
    return folder / "mlx"


def array(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize(
    ("name", "dora"),
    [(name, dora) for name in CASES for dora in (False, True) if name != "mixed" or not dora],
)
def test_base_adapter_and_fusion(siglip: Path, name: str, dora: bool, tmp_path: Path) -> None:
    base = llama(tmp_path, *CASES[name])
    save(join(siglip, base, seed=1), tmp_path / "vlm")
    vlm = mlxvlm.load(tmp_path / "vlm")
    theirs, wrapper = mlx_lm.load(str(base))[:2]
    a, b = (dict(tree_flatten(m.parameters())) for m in (vlm.language, theirs))
    assert a.keys() == b.keys()
    assert all(a[n].dtype == b[n].dtype and mx.array_equal(a[n], b[n]).item() for n in a)
    assert vlm.tokenizer is not None and vlm.tokenizer.eos_token_ids == wrapper.eos_token_ids
    ids = np.arange(5, 45)[None]
    before = array(vlm(ids))
    assert np.array_equal(before, array(theirs(mx.array(ids))))

    config = LoRAConfig(rank=4, dora=dora)
    add_lora(vlm.language, config)
    for _, module in vlm.language.named_modules():
        if "lora_b" in module:
            module.lora_b = 0.02 * mx.random.normal(module.lora_b.shape)
        if "m" in module:
            module.m = module.m * (1 + 0.05 * mx.random.normal(module.m.shape))
    save_adapter(vlm, config, tmp_path / "adapter")
    adapted = mlxvlm.load(tmp_path / "vlm", adapter=tmp_path / "adapter")
    theirs = mlx_lm.load(str(base), adapter_path=str(tmp_path / "adapter"))[0]
    assert np.array_equal(array(adapted(ids)), array(theirs(mx.array(ids))))
    assert relative(array(adapted(ids)), before) > 0.05

    pictures = adapted.look([picture(0)])
    tokens = adapted.tokenize([{"role": "user", "content": "Hi"}], pictures).tokens[None]
    wide = mlxvlm.load(tmp_path / "vlm", adapter=tmp_path / "adapter", dtype="float32")
    wanted = array(wide(tokens, pictures))
    fuse(wide.language)
    # Floating blocks come back from mx.dequantize in bfloat16, whatever the rest is in.
    close = 0.02 if "fp4" in name else 1e-4
    assert relative(array(wide(tokens, pictures)), wanted) < close
    stored = array(adapted(tokens, pictures))
    fuse(adapted.language)
    # As stored, fusing costs no more than computing in that dtype does.
    assert relative(array(adapted(tokens, pictures)), wanted) < 2 * relative(stored, wanted) + 1e-4
    save(adapted, tmp_path / "fused")
    fused = mlxvlm.load(tmp_path / "fused")
    assert np.array_equal(array(fused(tokens, pictures)), array(adapted(tokens, pictures)))
    # What had no adapter, the table and the head, stays quantised.
    assert (fused.config.quantization is not None) == bool((CASES[name][2] or {}).get("quantize"))
