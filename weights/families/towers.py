"""Vision towers of Hugging Face: their configs, and what their preprocessor files say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxvlm.config import TilingConfig, VisionConfig, read_json
from mlxvlm.errors import ConfigError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# transformers' defaults: a config.json on the hub lists only what differs from them.
DEFAULTS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
    },
    "internvl_vision": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_channels": 3,
        "image_size": 448,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "attention_bias": False,
        "use_qk_norm": False,
    },
}
COLOURS = {
    "siglip_vision_model": (HALF, HALF),
    "clip_vision_model": (CLIP_MEAN, CLIP_STD),
    "internvl_vision": (IMAGENET_MEAN, IMAGENET_STD),
}
RESAMPLE = {2: "bilinear", 3: "bicubic"}
PILLOW = {0: "nearest", 1: "lanczos", 4: "box", 5: "hamming"}


def vision_config(raw: dict[str, Any], **ours: Any) -> VisionConfig:
    """A tower's `vision_config` as our own; `ours` are the fields that it does not have."""
    kind = raw.get("model_type")
    if kind not in DEFAULTS:
        raise ConfigError(
            f"vision towers of type {kind!r} are not supported: only {', '.join(DEFAULTS)}."
        )
    known = {name: raw.get(name, value) for name, value in DEFAULTS[kind].items()}
    for name, value in known.items():
        wanted = DEFAULTS[kind][name]
        if name not in ("image_size", "patch_size") and not isinstance(value, type(wanted)):
            raise ConfigError(f"vision {name} (={value!r}) must be like {wanted!r}.")
    for name in ("image_size", "patch_size"):
        sides = known[name] if isinstance(known[name], list) else [known[name]]
        if len(set(sides)) != 1 or not isinstance(sides[0], int):
            raise ConfigError(f"vision {name} (={known[name]}) must be one whole number: a square.")
        known[name] = sides[0]
    return VisionConfig(model_type=kind, **known, **ours)


def tower_config(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """The `vision_config` of a CLIP's or SigLIP's config.json, whole or of its tower alone.

    name: what the tower is called, for the error.
    """
    kind = raw.get("model_type")
    if kind not in ("clip", "clip_vision_model", "siglip", "siglip_vision_model"):
        raise ConfigError(
            f"the vision tower {name} is of type {kind!r}; only CLIP and SigLIP towers are "
            "supported."
        )
    own = raw.get("vision_config")
    return {"model_type": f"{kind}_vision_model", **own} if isinstance(own, dict) else raw


def preprocessing(
    folder: Path, vision: VisionConfig
) -> tuple[TilingConfig, tuple[float, ...], tuple[float, ...]]:
    """How the folder's image processor makes pixels: (tiling, mean, std).

    Without a file, as their processors do: SigLIP and InternViT squash; CLIP scales the short side
    and crops.
    """
    raw = processor(folder)
    clip = vision.model_type == "clip_vision_model"
    size = raw.get("size", {"shortest_edge": vision.image_size} if clip else vision.image_size)
    where = f"{folder}'s image processor"
    for name in ("do_resize", "do_rescale"):
        if raw.get(name) is False:
            raise ConfigError(f"{where} has {name} false, which is not supported.")
    if abs(raw.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise ConfigError(
            f"{where} has rescale_factor (={raw['rescale_factor']}), which must be 1/255."
        )
    resample = raw.get("resample", 3)
    if resample not in RESAMPLE:
        raise ConfigError(
            f"{where} resamples by {PILLOW.get(resample, resample)!r}; "
            "only bilinear (2) and bicubic (3) are supported."
        )
    normal = raw.get("do_normalize", True) is not False
    usual_mean, usual_std = COLOURS[vision.model_type]
    mean = tuple(raw.get("image_mean") or usual_mean) if normal else (0.0,) * 3
    std = tuple(raw.get("image_std") or usual_std) if normal else (1.0,) * 3
    resize, side = _resize(raw, size, clip, where)
    if side != vision.image_size:
        raise ConfigError(
            f"{where} makes pictures of {side} pixels, but the vision tower's image_size is "
            f"{vision.image_size}: its grid is fixed."
        )
    tiling = TilingConfig(image_size=side, resample=RESAMPLE[resample])
    return tiling.resized(resize, mean), mean, std


def _resize(raw: dict[str, Any], size: Any, clip: bool, where: str) -> tuple[str, int]:
    if isinstance(size, int):
        size = {"shortest_edge": size} if clip else {"height": size, "width": size}
    if not isinstance(size, dict):
        raise ConfigError(f"{where} has an unreadable size (={size!r}).")
    cropped = raw.get("do_center_crop", clip)
    crop = raw.get("crop_size") if cropped else None
    crop = crop["height"] if isinstance(crop, dict) else crop
    if "shortest_edge" in size:
        side = size["shortest_edge"]
        if not cropped and not raw.get("do_pad"):
            raise ConfigError(f"{where} neither crops nor pads: its pictures would differ in size.")
        if crop not in (None, side):
            raise ConfigError(
                f"{where} scales the shortest side to {side} and crops {crop}; "
                "only equal numbers are supported."
            )
        return ("pad" if raw.get("do_pad") else "crop"), side
    height, width = size.get("height"), size.get("width")
    if height is None or height != width or crop not in (None, height):
        raise ConfigError(f"{where} has size {size}, which is no square.")
    return ("pad" if raw.get("do_pad") else "squash"), height


def processor_config(tiling: TilingConfig, vision: VisionConfig) -> dict[str, Any]:
    """The preprocessor_config.json that makes the same pixels of a picture, where it is one view.

    What `preprocessing` reads back; a padded canvas is of the mean's colour.
    """
    square = {"height": tiling.image_size, "width": tiling.image_size}
    names = {v: k for k, v in RESAMPLE.items()}
    squash = tiling.resize == "squash"
    kind = {"squash": "Siglip", "crop": "CLIP", "pad": "Llava"}[tiling.resize]
    raw: dict[str, Any] = {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": tiling.image_size},
        "resample": names[tiling.resample],
        "do_center_crop": not squash,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }
    if not squash:
        raw["crop_size"] = square
        raw["do_pad"] = tiling.resize == "pad"
    return raw


def processor(folder: Path) -> dict[str, Any]:
    """What the folder says of its image processor; empty where it has no such file."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            raw = read_json(folder / name)
            nested = raw.get("image_processor")
            if isinstance(nested, dict):
                return nested
            if name.startswith("pre"):
                return raw
    return {}
