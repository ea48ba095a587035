"""InternVL for tests: a folder as transformers 5 saves it, rewritten into the other layouts."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from checkpoints import Tensors, old_rope, read, rename
from tiny_tokenizers import WORDS, byte_level, write_folder

LAYOUTS = ("transformers5", "memory", "opengvlab")
CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<video>",
)
# Parts of transformers' names -> OpenGVLab's; q, k and v of a block become one matrix besides.
NAMES = {
    "vision_tower.": "vision_model.",
    "embeddings.cls_token": "embeddings.class_embedding",
    "patch_embeddings.projection": "patch_embedding",
    "position_embeddings": "position_embedding",
    "encoder.layer.": "encoder.layers.",
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
    "multi_modal_projector.layer_norm.": "mlp1.0.",
    "multi_modal_projector.linear_1.": "mlp1.1.",
    "multi_modal_projector.linear_2.": "mlp1.3.",
}
INTERNLM2 = {
    "model.embed_tokens": "model.tok_embeddings",
    "self_attn.q_proj": "attention.wqkv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "language_model.lm_head": "language_model.output",
}
# What transformers 4 wrote of every decoder, though it says nothing about one forward pass.
DUMPED = {
    "_attn_implementation_autoset": True,
    "add_cross_attention": False,
    "attn_implementation": "eager",
    "bad_words_ids": None,
    "length_penalty": 1.0,
    "min_length": 0,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "use_bfloat16": True,
}


def internvl_tokenizer() -> Any:
    """A byte-level tokenizer with the control tokens of InternVL on a Qwen2.5."""
    return byte_level(CONTROL)


def sentencepiece_model(folder: Path, prefix: bool = True, remove: bool = False) -> Path:
    """A tokenizer as InternLM2's repositories have it, of few pieces: BPE with bytes, two control
    tokens in the places of vacant pieces, three behind them."""
    from sentencepiece import SentencePieceTrainer

    folder.mkdir(parents=True, exist_ok=True)
    vacant = [f"[UNUSED_TOKEN_{i}]" for i in range(6)]
    SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 3 + ["你好 how  many\nred circles"]),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=340 + len(vacant),
        byte_fallback=True,
        user_defined_symbols=vacant,
        normalization_rule_name="identity",
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=remove,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    # The trainer puts such pieces first, InternLM2 has them last.
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    path = folder / "tokenizer.model"
    model.ParseFromString(path.read_bytes())
    pieces = sorted(model.pieces, key=lambda piece: piece.piece in vacant)
    del model.pieces[:]
    model.pieces.extend(pieces)
    path.write_bytes(model.SerializeToString())
    size = len(pieces)
    names = {size - 1: "<|im_start|>", size - 2: "<|im_end|>"}
    names |= {size: "<img>", size + 1: "</img>", size + 2: "<IMG_CONTEXT>"}
    decoder = {
        str(i): {"content": name, "lstrip": False, "normalized": False, "special": True}
        for i, name in names.items()
    }
    settings = {
        "added_tokens_decoder": decoder,
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_internvl(folder: Path, large: bool = False, tied: bool = False) -> Path:
    """As transformers 5 saves it: tiles of 32 pixels, 16 patches and 4 tokens each, at most 6 of
    them, random weights. large: with the norms of InternViT-6B. tied: without an lm_head."""
    tokenizer = internvl_tokenizer()
    vocab = tokenizer.get_vocab_size() + 3
    width, wide, text, wide_text = 32, 48, 64, 96
    rng = np.random.default_rng(5)

    def matrix(*shape: int) -> mx.array:
        scale = 1.5 * math.prod(shape[1:]) ** -0.5
        return mx.array(rng.normal(0, scale, shape).astype(np.float32))

    def vector(size: int, around: float = 0.0) -> mx.array:
        return mx.array((around + rng.normal(0, 0.2, size)).astype(np.float32))

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> Tensors:
        out = {f"{name}.weight": matrix(rows, columns)}
        return {**out, f"{name}.bias": vector(rows)} if bias else out

    def norm(name: str, size: int, bias: bool = True) -> Tensors:
        out = {f"{name}.weight": vector(size, 1.0)}
        return {**out, f"{name}.bias": vector(size)} if bias else out

    at = "vision_tower.embeddings"
    tensors: Tensors = {
        f"{at}.cls_token": matrix(1, 1, width),
        f"{at}.position_embeddings": matrix(1, 17, width),
        f"{at}.patch_embeddings.projection.weight": matrix(width, 3, 8, 8),
        f"{at}.patch_embeddings.projection.bias": vector(width),
    }
    for number in range(2):
        at = f"vision_tower.encoder.layer.{number}"
        for part in ("q_proj", "k_proj", "v_proj"):
            tensors |= linear(f"{at}.attention.{part}", width, width, not large)
        tensors |= linear(f"{at}.attention.projection_layer", width, width)
        tensors |= linear(f"{at}.mlp.fc1", wide, width) | linear(f"{at}.mlp.fc2", width, wide)
        for part in ("before", "after"):
            tensors |= norm(f"{at}.layernorm_{part}", width, not large)
        tensors |= {f"{at}.lambda_1": vector(width, 0.5), f"{at}.lambda_2": vector(width, 0.5)}
        if large:
            for part in ("q_norm", "k_norm"):
                tensors |= norm(f"{at}.attention.{part}", width, False)
    at = "multi_modal_projector"
    tensors |= norm(f"{at}.layer_norm", 4 * width)
    tensors |= linear(f"{at}.linear_1", text, 4 * width) | linear(f"{at}.linear_2", text, text)
    at = "language_model.model"
    tensors |= {f"{at}.embed_tokens.weight": matrix(vocab, text)} | norm(f"{at}.norm", text, False)
    for number in range(2):
        at = f"language_model.model.layers.{number}"
        for part, rows in (("q_proj", text), ("k_proj", text // 2), ("v_proj", text // 2)):
            tensors |= linear(f"{at}.self_attn.{part}", rows, text)
        tensors |= linear(f"{at}.self_attn.o_proj", text, text, False)
        for part in ("gate_proj", "up_proj"):
            tensors |= linear(f"{at}.mlp.{part}", wide_text, text, False)
        tensors |= linear(f"{at}.mlp.down_proj", text, wide_text, False)
        for part in ("input_layernorm", "post_attention_layernorm"):
            tensors |= norm(f"{at}.{part}", text, False)
    if not tied:
        tensors["language_model.lm_head.weight"] = matrix(vocab, text)
    config = {
        "model_type": "internvl",
        "image_token_id": tokenizer.token_to_id("<IMG_CONTEXT>"),
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": tied,
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": text,
            "intermediate_size": wide_text,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "vocab_size": vocab,
            "max_position_embeddings": 4096,
            "hidden_act": "silu",
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
            "use_sliding_window": False,
        },
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": width,
            "intermediate_size": wide,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [32, 32],
            "patch_size": [8, 8],
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
            "norm_type": "rms_norm" if large else "layer_norm",
            "attention_bias": not large,
            "use_qk_norm": large,
        },
    }
    pixels = {
        "size": {"height": 32, "width": 32},
        "crop_to_patches": False,  # as on the hub, where the processor asks for tiles all the same
        "min_patches": 1,
        "max_patches": 6,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    files = {"tokenizer_config": {"eos_token": "<|im_end|>"}, "preprocessor_config": pixels}
    write_folder(folder, tokenizer, config=config, **files)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    return folder


def rewrite(source: Path, folder: Path, layout: str, **changes: Any) -> Path:
    """A transformers 5 InternVL in another of the layouts found in the wild; changes: fields of
    config.json, None to leave one out."""
    shutil.copytree(source, folder)
    config, tensors = read(source)
    if layout == "memory":
        tensors = rename(tensors, "language_model.model.", "model.language_model.")
        tensors = rename(tensors, "language_model.lm_head.", "lm_head.")
        tensors = rename(tensors, "vision_tower.", "model.vision_tower.")
        tensors = rename(tensors, "multi_modal_projector.", "model.multi_modal_projector.")
    if layout == "opengvlab":
        pixels = json.loads((source / "preprocessor_config.json").read_text())
        config, tensors = opengvlab_config(config, pixels["max_patches"]), opengvlab(tensors)
        # Theirs describes CLIP's pictures; their code never reads it.
        clip = {"size": 224, "crop_size": 224, "do_center_crop": True, "image_mean": [0, 0, 0]}
        (folder / "preprocessor_config.json").write_text(json.dumps(clip))
    config = {k: v for k, v in {**config, **changes}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    return folder


def internlm2(source: Path, folder: Path) -> Path:
    """An InternVL on a Llama, in OpenGVLab's layout, with the Llama written as an InternLM2: the
    same numbers under other names, a group's queries, key and value in one matrix."""
    rewrite(source, folder, "opengvlab")
    (folder / "tokenizer.json").unlink()
    sentencepiece_model(folder)
    config, tensors = read(folder)
    text = config["llm_config"]
    heads, groups = text["num_attention_heads"], text["num_key_value_heads"]
    out: Tensors = {}
    for name, value in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            each, columns = text["hidden_size"] // heads, value.shape[1]
            parts = [
                tensors[name.replace("q_proj", part)].reshape(groups, -1, each, columns)
                for part in ("q_proj", "k_proj", "v_proj")
            ]
            value = mx.concatenate(parts, axis=1).reshape(-1, columns)
        for theirs, other in INTERNLM2.items():
            name = name.replace(theirs, other)
        out[name] = value
    config["llm_config"] = {
        **{k: v for k, v in text.items() if k not in ("attention_bias", "mlp_bias", "head_dim")},
        "model_type": "internlm2",
        "architectures": ["InternLM2ForCausalLM"],
        "bias": False,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), out, {"format": "pt"})
    return folder


def opengvlab(tensors: Tensors) -> Tensors:
    out: Tensors = {}
    for name, value in tensors.items():
        if ".attention.k_proj." in name or ".attention.v_proj." in name:
            continue
        if ".attention.q_proj." in name:
            three = [
                tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")
            ]
            value, name = mx.concatenate(three), name.replace("attention.q_proj", "attn.qkv")
        for theirs, other in NAMES.items():
            name = name.replace(theirs, other)
        out[name] = value
    return out


def opengvlab_config(config: dict[str, Any], most: int) -> dict[str, Any]:
    text, tower = config["text_config"], config["vision_config"]
    old_rope(text)
    return {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": tower["image_size"][0],
        "llm_config": {**text, **DUMPED, "tie_word_embeddings": False},
        "max_dynamic_patch": most,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_thumbnail": True,
        "vision_config": {
            "model_type": "intern_vit_6b",
            "image_size": tower["image_size"][0],
            "patch_size": tower["patch_size"][0],
            "qkv_bias": tower["attention_bias"],
            "qk_normalization": tower["use_qk_norm"],
            "drop_path_rate": 0.1,
            "use_flash_attn": True,
        }
        | {
            name: tower[name]
            for name in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "norm_type",
                "hidden_act",
                "layer_norm_eps",
            )
        },
    }
