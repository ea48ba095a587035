"""`mlxvlm export --to minicpm`: a model in the layout of MiniCPM-Llama3-V 2.5's authors.

    config.json, model.safetensors     as `families.minicpm` reads them, and their own code does
    tokenizer.json, ...                the tokenizer's files as they are

The code that runs such a folder elsewhere is its authors' (trust_remote_code), and not written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxvlm.config import ModelConfig
from mlxvlm.errors import ConfigError
from mlxvlm.weights.convert import LICENCES, keep_files, refuse_adapters
from mlxvlm.weights.families.minicpm import TOWER, hub_name
from mlxvlm.weights.families.towers import HALF
from mlxvlm.weights.hub import Download, resolve
from mlxvlm.weights.join import check_out
from mlxvlm.weights.load import open_whole
from mlxvlm.weights.save import check_room, put_in_place, room_beside, write_tensors
from mlxvlm.weights.tensors import PATCHES, fill, parse_dtype


def export_minicpm(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | mx.Dtype | None = None,
    revision: str | None = None,
    report: Callable[[Download], Any] | None = None,
) -> None:
    """Writes the model of a folder or a hub id to the folder `out`, under its authors' names."""
    from mlxvlm.model import VLM

    wanted = parse_dtype(dtype)
    out = check_out(out, source)
    folder = resolve(source, revision, report)
    refuse_adapters(folder)
    family, checkpoint, config, tokenizer = open_whole(folder, report=report)
    if found := obstacles(config):
        raise ConfigError(f"{folder} cannot become a MiniCPM-Llama3-V 2.5: {'; '.join(found)}.")
    vlm = VLM(config, tokenizer)
    fill(vlm, checkpoint, family.rename, dtype=wanted)
    tensors = {hub_name(name): value for name, value in tree_flatten(vlm.parameters())}
    patches = next(name for name in tensors if name.endswith(PATCHES))
    tensors[patches] = mx.contiguous(tensors[patches].transpose(0, 3, 1, 2))
    mx.eval(list(tensors.values()))
    out.mkdir(parents=True, exist_ok=True)
    check_room(out, sum(value.nbytes for value in tensors.values()))
    with room_beside(out) as beside:
        keep_files(folder, beside, LICENCES)
        write_tensors(tensors, beside, writer="pt")
        tokenizer.save(beside)
        text = json.dumps(_config(config), indent=2)
        (beside / "config.json").write_text(text + "\n", encoding="utf-8")
        put_in_place(beside, out)


def obstacles(config: ModelConfig) -> list[str]:
    """What of a model that layout cannot say, each with why."""
    tiling, vision, projector, prompt = (
        config.tiling,
        config.vision,
        config.projector,
        config.prompt,
    )
    width = config.language.get("hidden_size", 0)
    theirs: list[tuple[str, Any, Any]] = [
        ("tiling.type", tiling.type, "slices"),
        ("tiling.rounding", tiling.rounding, "nearest"),
        ("tiling.resample", tiling.resample, "bicubic"),
        ("vision.model_type", vision.model_type, "siglip_vision_model"),
        ("vision.positions", vision.positions, "buckets"),
        ("vision.vision_feature_norm", vision.vision_feature_norm, True),
        ("vision.image_mean", vision.image_mean, HALF),
        ("vision.image_std", vision.image_std, HALF),
        ("projector.type", projector.type, "resampler"),
        ("prompt.merge", prompt.merge, "minicpm"),
        ("prompt.layout", prompt.layout, "llama-3"),
        ("language.model_type", config.language.get("model_type"), "llama"),
    ]
    found = [
        f"{name} is {ours!r}, not {wanted!r}" for name, ours, wanted in theirs if ours != wanted
    ]
    if vision.num_layers_used < vision.num_hidden_layers - 1:
        found.append(
            f"the projector takes layer {vision.num_layers_used} of {vision.num_hidden_layers}, "
            "neither the last nor the one before"
        )
    heads = max(1, width // 128)
    if projector.hidden_size not in (0, width) or projector.num_attention_heads not in (0, heads):
        found.append(f"the resampler is not {width} wide with {heads} heads")
    if config.quantization is not None:
        found.append("its weights are quantised: export the model that it was made from")
    return found


def _config(config: ModelConfig) -> dict[str, Any]:
    tiling, vision = config.tiling, config.vision
    tower: dict[str, Any] = {name: getattr(vision, name) for name in TOWER}
    return {
        **config.language,
        "architectures": ["MiniCPMV"],
        "model_type": "minicpmv",
        "version": "2.5",
        "query_num": config.projector.num_query_tokens,
        "image_size": tiling.image_size,
        "patch_size": tiling.patch_size,
        "batch_vision_input": True,
        "drop_vision_last_layer": vision.num_layers_used < vision.num_hidden_layers,
        "slice_mode": True,
        "slice_config": {
            "max_slice_nums": tiling.max_tiles,
            "scale_resolution": tiling.image_size,
            "patch_size": tiling.patch_size,
        },
        "vision_config": {
            **tower,
            "model_type": "idefics2",
            "image_size": vision.table_grid * vision.patch_size,
        },
    }
