"""`mlxvlm export --to transformers`: a model as a LlavaForConditionalGeneration folder.

    config.json, model.safetensors          the hub's older LLaVA layout, which transformers 4 and 5
                                            read, mlx-vlm, and `mlxvlm` itself
    tokenizer.json, tokenizer_config.json   with the image token
    processor_config.json, preprocessor_config.json, chat_template.jinja, generation_config.json

transformers' LLaVA is narrower than what can be trained here: a picture is one view, the projector
two linear layers, and the tower's hidden state comes without the final norm. What does not fit is
named, all of it, before a tensor is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxvlm.config import ModelConfig
from mlxvlm.errors import ConfigError
from mlxvlm.weights.chat_template import chat_template
from mlxvlm.weights.convert import LICENCES, keep_files, refuse_adapters
from mlxvlm.weights.families.llava import hub_name
from mlxvlm.weights.families.towers import processor_config
from mlxvlm.weights.hub import Download, resolve
from mlxvlm.weights.join import check_out
from mlxvlm.weights.load import open_whole
from mlxvlm.weights.save import check_room, put_in_place, room_beside, write_tensors
from mlxvlm.weights.tensors import fill, parse_dtype

if TYPE_CHECKING:
    from mlxvlm.language.tokenizer import Tokenizer
    from mlxvlm.model import VLM

# Decoders that mlx-lm and transformers compute alike; what each reads beside TEXT, and what says
# that it has no window, which here is the limit of its length.
FAMILY: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "llama": (("head_dim", "attention_bias", "mlp_bias"), {}),
    "mistral": (("head_dim",), {"sliding_window": None}),
    "qwen2": ((), {"use_sliding_window": False}),
    "qwen3": (("head_dim",), {"use_sliding_window": False}),
}
TEXT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_theta",
    "tie_word_embeddings",
)
TOWER = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "layer_norm_eps",
    "hidden_act",
)
# Special tokens that configs name by their ids; of end tokens there may be several.
IDS = ("bos_token", "pad_token")
ROPES = ("default", "linear", "llama3")
IMAGE_TOKEN = "<image>"
TABLES = ("language.model.embed_tokens.weight", "language.lm_head.weight")


def export(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | mx.Dtype | None = None,
    revision: str | None = None,
    report: Callable[[Download], Any] | None = None,
) -> None:
    """Writes the model of a folder or a hub id to the folder `out`, for transformers.

    dtype: what floating tensors become; by default as stored. A ConfigError names everything of the
    model that transformers' LLaVA has no place for.
    """
    from mlxvlm.model import VLM

    wanted = parse_dtype(dtype)
    out = check_out(out, source)
    folder = resolve(source, revision, report)
    refuse_adapters(folder)
    family, checkpoint, config, tokenizer = open_whole(folder, report=report)
    vlm = VLM(config, tokenizer)
    if found := obstacles(vlm):
        raise ConfigError(
            f"{folder} cannot become transformers' LlavaForConditionalGeneration: "
            + "; ".join(found)
            + "."
        )
    backend, image_token, image_id = _image_token(tokenizer, config)
    template = chat_template(config.prompt, tokenizer, image_token)
    fill(vlm, checkpoint, family.rename, dtype=wanted, quantization=config.quantization)
    tensors = _tensors(vlm, image_id)
    out.mkdir(parents=True, exist_ok=True)
    check_room(out, sum(value.nbytes for value in tensors.values()))
    rows = tensors[hub_name(TABLES[0])].shape[0]
    special = _special_tokens(tokenizer)
    ids = {name: backend.token_to_id(special[name]) for name in IDS if name in special}
    raw = _config(vlm, image_id, rows, ids)
    raw["torch_dtype"] = _dtype(tensors)
    with room_beside(out) as beside:
        keep_files(folder, beside, LICENCES)
        write_tensors(tensors, beside, writer="pt")
        backend.save(str(beside / "tokenizer.json"))
        (beside / "chat_template.jinja").write_text(template, encoding="utf-8")
        for name, values in {
            "config.json": raw,
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **special,
                "clean_up_tokenization_spaces": False,
                "model_max_length": raw["text_config"].get("max_position_embeddings", 2048),
                "padding_side": "left",
            },
            "preprocessor_config.json": processor_config(config.tiling, config.vision),
            "processor_config.json": {
                "processor_class": "LlavaProcessor",
                "image_token": image_token,
                "patch_size": config.vision.patch_size,
                "num_additional_image_tokens": int(config.vision.has_class_token),
                "vision_feature_select_strategy": config.vision.vision_feature_select_strategy,
            },
            "generation_config.json": {
                **tokenizer.generation_config,
                **{f"{name}_id": i for name, i in ids.items()},
                "eos_token_id": sorted(tokenizer.eos_token_ids),
                # Never sampled: the image token, and rows that no token has.
                "suppress_tokens": sorted(
                    {image_id, *range(backend.get_vocab_size(with_added_tokens=True), rows)}
                ),
            },
        }.items():
            (beside / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        put_in_place(beside, out)


def obstacles(vlm: VLM) -> list[str]:
    """What of a model LlavaForConditionalGeneration cannot express, each with why."""
    config, args = vlm.config, getattr(vlm.language, "args", None)
    tiling, vision, projector = config.tiling, config.vision, config.projector
    found: list[str] = []
    if tiling.type != "single":
        found.append(
            f"it cuts pictures into tiles (tiling.type {tiling.type!r}), and takes one view"
        )
    elif tiling.resize == "pad" and tiling != tiling.resized("pad", vision.image_mean):
        found.append(
            f"it pads pictures with {tiling.background}, and transformers with the encoder's mean"
        )
    if vision.takes_any_grid:
        found.append(
            f"its tower resizes its table of positions (vision.positions {vision.positions!r})"
        )
    if vision.vision_feature_norm:
        found.append(
            "the tower's final norm comes before its projector (vision.vision_feature_norm), and "
            "transformers takes the hidden state without it: train one built with "
            "--no-feature-norm"
        )
    if vision.num_layers_used == 0:
        found.append("its projector takes the tower's embeddings, before any block")
    if projector.type != "mlp":
        found.append(f"its projector is of type {projector.type!r}, not 'mlp'")
    else:
        if projector.pool != "none":
            found.append(f"its projector pools visual tokens ({projector.pool!r})")
        if projector.hidden_size not in (0, args.hidden_size if args else 0):
            found.append(
                f"its projector is {projector.hidden_size} wide inside, and not as wide as the "
                "language model"
            )
    if config.quantization is not None:
        found.append("its weights are quantised: export the model that it was made from")
    found += _language_obstacles(config.language.get("model_type"), args)
    return found


def _language_obstacles(kind: Any, args: Any) -> list[str]:
    if kind not in FAMILY:
        return [f"its language model is of type {kind!r}, not one of {', '.join(FAMILY)}"]
    found = []
    if "sliding_attention" in (getattr(args, "layer_types", None) or ()):
        found.append("its language model has layers with sliding windows")
    if getattr(args, "rope_traditional", False):
        found.append("its language model rotates neighbouring pairs (rope_traditional)")
    if (rope := _rope_scaling(args)) and rope["rope_type"] not in ROPES:
        found.append(
            f"its language model has rope_scaling of type {rope['rope_type']!r}, which mlx-lm and "
            "transformers are not known to compute alike"
        )
    odd = [n for n in ("attention_bias", "mlp_bias") if getattr(args, n, False)]
    if odd and kind != "llama":
        found.append(f"its {kind} language model has {' and '.join(odd)}")
    return found


def _rope_scaling(args: Any) -> dict[str, Any] | None:
    rope = dict(getattr(args, "rope_scaling", None) or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rope.pop("rope_theta", None)
    return None if kind == "default" else {**rope, "type": kind, "rope_type": kind}


def _image_token(tokenizer: Tokenizer, config: ModelConfig) -> tuple[Any, str, int]:
    """A tokenizer that has the image token, its name and its id.

    One whose id no token has gets a new token, whose id is the next that is free.
    """
    given = config.prompt.image_token_id
    name = tokenizer.added.get(given)
    if name is None and IMAGE_TOKEN in tokenizer.control:
        name, given = IMAGE_TOKEN, tokenizer.control[IMAGE_TOKEN]
    if name is not None:
        return tokenizer.backend, name, given
    backend = tokenizer.backend_with(IMAGE_TOKEN)
    return backend, IMAGE_TOKEN, backend.token_to_id(IMAGE_TOKEN)


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """bos_token, eos_token, ...; padding is the end token where the folder names none."""
    tokens = dict(tokenizer.special_tokens)
    name = tokenizer.backend.id_to_token
    if tokenizer.bos_token_id is not None:
        tokens.setdefault("bos_token", name(tokenizer.bos_token_id))
    if tokenizer.eos_token_ids:
        tokens.setdefault("eos_token", name(max(tokenizer.eos_token_ids)))
        tokens.setdefault("pad_token", tokens["eos_token"])
    return tokens


def _tensors(vlm: VLM, image_id: int) -> dict[str, mx.array]:
    """Every tensor under its name on the hub, convolutions as PyTorch has them."""
    ours: dict[str, mx.array] = dict(tree_flatten(vlm.parameters()))
    for name in TABLES:
        table = ours.get(name)
        if table is not None and len(table) <= image_id:  # transformers looks the image token up
            more = mx.zeros((image_id + 1 - len(table), table.shape[1]), table.dtype)
            ours[name] = mx.concatenate([table, more])
    patches = "vision.embeddings.patch_embedding.weight"
    ours[patches] = mx.contiguous(ours[patches].transpose(0, 3, 1, 2))
    if "vision.post_layernorm.weight" not in ours:  # its class has one, which no feature sees
        like = ours["vision.encoder.layers.0.layer_norm1.weight"]
        ours["vision.post_layernorm.weight"] = mx.ones_like(like)
        ours["vision.post_layernorm.bias"] = mx.zeros_like(like)
    mx.eval(list(ours.values()))
    return {hub_name(name): value for name, value in ours.items()}


def _config(vlm: VLM, image_id: int, rows: int, ids: dict[str, int]) -> dict[str, Any]:
    language: Any = vlm.language
    config, args = vlm.config, language.args
    kind = config.language["model_type"]
    more, fixed = FAMILY[kind]
    text = {"model_type": kind, **{name: getattr(args, name) for name in (*TEXT, *more)}, **fixed}
    if "head_dim" in more and text["head_dim"] is None:
        text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    if text["max_position_embeddings"] is None:  # transformers has a default of its own
        del text["max_position_embeddings"]
    text |= {
        "vocab_size": rows,
        "hidden_act": "silu",
        "rope_scaling": _rope_scaling(args),
        **{f"{name}_id": i for name, i in ids.items()},
    }
    if vlm.tokenizer is not None:
        text["eos_token_id"] = sorted(vlm.tokenizer.eos_token_ids)
    vision: dict[str, Any] = {name: getattr(config.vision, name) for name in TOWER}
    # Blocks past the feature layer are not kept here, so the layer is the last.
    vision["num_hidden_layers"] = config.vision.num_layers_used
    if config.vision.model_type == "siglip_vision_model":
        vision["vision_use_head"] = False
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_id,
        "image_seq_length": config.tokens_per_view,
        "projector_hidden_act": config.projector.hidden_act,
        "multimodal_projector_bias": config.projector.bias,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": config.vision.vision_feature_select_strategy,
        "tie_word_embeddings": args.tie_word_embeddings,
        "text_config": text,
        "vision_config": vision,
    }


def _dtype(tensors: dict[str, mx.array]) -> str:
    """The dtype that holds every tensor: transformers loads a model in one."""
    kinds = {value.dtype for value in tensors.values()}
    kind = kinds.pop() if len(kinds) == 1 else mx.float32
    return str(kind).removeprefix("mlx.core.")
