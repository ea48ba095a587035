"""Checkpoints in: a whole model, an encoder, or SigLIP's two towers, from a folder or a hub id.

Loading is strict: every tensor that is missing, unexpected, misshapen or not finite is named, and
nothing half-loaded is returned. Only safetensors are read, and no code of a repository is run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlxvlm.config import (
    TAKE_ANY_GRID,
    ModelConfig,
    TilingConfig,
    VisionConfig,
    read_dataclass,
    read_json,
)
from mlxvlm.errors import ConfigError, PromptError, UsageError
from mlxvlm.projected import ProjectedEncoder
from mlxvlm.projectors.build import build_projector
from mlxvlm.vision.build import build_vision
from mlxvlm.vision.encoder import Encoder
from mlxvlm.vision.siglip import Siglip
from mlxvlm.weights import peft
from mlxvlm.weights.elsewhere import Elsewhere
from mlxvlm.weights.families import (
    clip,
    eve,
    internvit,
    internvl,
    llava,
    llava_next,
    llava_original,
    llava_uhd,
    minicpm,
    native,
    siglip,
    xtuner,
)
from mlxvlm.weights.folder import ADAPTERS, VISION_ADAPTERS, Checkpoint, Outline
from mlxvlm.weights.hub import Download, resolve, resolve_outline
from mlxvlm.weights.tensors import fill, fit, parse_dtype, rename_quantization, stored_quantization

if TYPE_CHECKING:
    from mlxvlm.language.siglip_tokenizer import SiglipTokenizer
    from mlxvlm.language.tokenizer import Tokenizer
    from mlxvlm.model import VLM

WHOLE = (native, llava, llava_next, llava_original, llava_uhd, xtuner, internvl, minicpm, eve)
ENCODERS = (siglip, clip, internvit)
Report = Callable[[Download], Any]


def load(
    path_or_hub_id: str | Path,
    adapter: str | Path | None = None,
    dtype: str | mx.Dtype | None = None,
    revision: str | None = None,
    report: Report | None = None,
    language: str | None = None,
    vision: str | None = None,
    resize: str = "",
) -> VLM:
    """A model from a folder or a hub id.

    adapter: a folder that `mlxvlm lora` wrote, or PEFT for the model's own layout. dtype: what
    floating tensors become; by default each stays as stored, but a vision tower stored in float16
    becomes float32 (it would overflow). report: called with a `Download` before anything is
    fetched. language, vision: where the parts lie that the folder leaves out (LLaVA's and XTuner's
    exports); by default where it says. resize: how a picture becomes a square, in the stead of the
    model's own way.
    """
    from mlxvlm.model import VLM

    wanted = parse_dtype(dtype)
    if adapter is not None and _is_export(Path(adapter)):
        raise UsageError(
            f"{adapter} is what a whole run of LLaVA's or XTuner's left: give it as -m, and "
            f"{path_or_hub_id} as --language if it is another than the one that it names."
        )
    folder = resolve(path_or_hub_id, revision, report)
    family, checkpoint, config, tokenizer = open_whole(
        folder, report=report, language=language, vision=vision
    )
    config.override(resize)
    foreign = adapter is not None and peft.is_adapter(Path(adapter))
    if foreign:
        peft.attach(checkpoint, Path(adapter), family.rename)
    vlm = VLM(config, tokenizer)
    fill(vlm, checkpoint, family.rename, dtype=wanted, quantization=config.quantization)
    if adapter is not None and not foreign:
        from mlxvlm.weights.adapter import load_adapter

        load_adapter(vlm, adapter)
    vlm.eval()  # an adapter's dropout is for training
    return vlm


def outline(path_or_hub_id: str | Path, revision: str | None = None) -> tuple[VLM, bool]:
    """A model whose tensors are not read, with the shapes and dtypes that they have; and whether
    they are here to be read.

    Of a hub model that is not in the local cache, config, tokenizer and the tensors' headers are
    fetched, a few MB; its tensors, once evaluated, are zeros.
    """
    from mlxvlm.model import VLM

    folder, headers = resolve_outline(path_or_hub_id, revision)
    opened = Checkpoint.open if headers is None else partial(Outline.of, headers=headers)
    family, checkpoint, config, tokenizer = open_whole(folder, opened)
    vlm = VLM(config, tokenizer)
    weights = fit(vlm, checkpoint, family.rename, quantization=config.quantization)
    vlm.load_weights(list(weights.items()), strict=False)
    vlm.eval()
    return vlm, headers is None


def load_prompting(
    path_or_hub_id: str | Path, revision: str | None = None, report: Report | None = None
) -> tuple[ModelConfig, Tokenizer]:
    """A whole model's choices and its tokenizer, without its weights."""
    folder = resolve(path_or_hub_id, revision, report)
    *_, config, tokenizer = open_whole(folder, report=report)
    return config, tokenizer


def load_encoder(
    path_or_hub_id: str | Path,
    pool: str | None = None,
    dtype: str | mx.Dtype | None = None,
    revision: str | None = None,
    tiling: TilingConfig | dict[str, Any] | None = None,
    feature_layer: int | None = None,
    feature_norm: bool | None = None,
    report: Report | None = None,
) -> Encoder:
    """The encoder alone, from a SigLIP or CLIP repository or from any whole model.

    pool: "none" or "mean2"; by default what a whole model's projector asks for, otherwise "none".
    tiling: fields that override the checkpoint's. feature_layer, feature_norm: which hidden state
    it gives, and whether the final norm follows; by default the checkpoint's own choice (a SigLIP's
    last layer with its norm; CLIP's last but one without).
    """
    checkpoint, family = open_encoder(path_or_hub_id, revision, report)
    config, tiles = encoder_configs(checkpoint, family, feature_layer, feature_norm, tiling)
    holder = Holder(vision=build_vision(config))
    fill(
        holder,
        checkpoint,
        family.rename,
        prefixes=("vision.",),
        dtype=parse_dtype(dtype),
        quantization=_quantization(checkpoint, family),
    )
    weight = holder.vision.embeddings.patch_embedding.weight
    if pool is None:
        pool = family.model(checkpoint).encoder_pool if family in WHOLE else "none"
    return Encoder(holder.vision, config, tiles, pool=pool, dtype=weight.dtype)


def load_projected(
    path_or_hub_id: str | Path,
    dtype: str | mx.Dtype | None = None,
    revision: str | None = None,
    tiling: TilingConfig | dict[str, Any] | None = None,
    report: Report | None = None,
) -> ProjectedEncoder:
    """Encoder and projector of a whole model, without its language model; tiling: as above."""
    from mlxvlm.language.load import language_width

    folder = resolve(path_or_hub_id, revision, report)
    family = _family(folder, WHOLE, "a vision-language model")
    checkpoint = _checkpoint(folder, family, Elsewhere(partial(resolve, report=report)))
    config = family.model(checkpoint)
    width = language_width(config.language)
    merged = config.prompt.merge == "spatial_unpad"
    projector = build_projector(config.projector, config.vision, width, newline=merged)
    holder = Holder(vision=build_vision(config.vision), projector=projector)
    fill(
        holder,
        checkpoint,
        family.rename,
        prefixes=("vision.", "projector."),
        dtype=parse_dtype(dtype),
        quantization=_quantization(checkpoint, family),
    )
    stored = holder.vision.embeddings.patch_embedding.weight.dtype
    _, tiles = encoder_configs(checkpoint, family, tiling=tiling)
    encoder = Encoder(holder.vision, config.vision, tiles, config.encoder_pool, stored)
    return ProjectedEncoder(encoder, projector, config, width)


def load_siglip(
    path_or_hub_id: str | Path,
    dtype: str | mx.Dtype | None = None,
    revision: str | None = None,
    report: Report | None = None,
) -> tuple[Siglip, SiglipTokenizer, TilingConfig]:
    """SigLIP's two towers, the tokenizer of its texts, and how its pictures are tiled."""
    from mlxvlm.language.siglip_tokenizer import SiglipTokenizer

    folder = resolve(path_or_hub_id, revision, report)
    _family(folder, (siglip,), "a SigLIP with its text tower")
    checkpoint = Checkpoint.open(folder)
    if checkpoint.config["model_type"] != "siglip":
        raise ConfigError(
            f"{folder} holds only SigLIP's vision tower; scores need the text tower too."
        )
    vision, tiling = siglip.vision(checkpoint)
    text = siglip.text(checkpoint.config)
    model = Siglip(dataclasses.replace(vision, vision_use_head=True), text)
    tokenizer = SiglipTokenizer.load(folder, text.max_position_embeddings)
    fill(
        model,
        checkpoint,
        lambda key: key,
        dtype=parse_dtype(dtype),
        quantization=stored_quantization(checkpoint.config),
    )
    return model, tokenizer, tiling


def open_encoder(
    path_or_hub_id: str | Path, revision: str | None = None, report: Report | None = None
) -> tuple[Checkpoint, ModuleType]:
    """The checkpoint of an encoder, and its family."""
    folder = resolve(path_or_hub_id, revision, report)
    family = _family(folder, (*ENCODERS, *WHOLE), "a vision encoder")
    return _checkpoint(folder, family, Elsewhere(partial(resolve, report=report))), family


def encoder_configs(
    checkpoint: Checkpoint,
    family: ModuleType,
    feature_layer: int | None = None,
    feature_norm: bool | None = None,
    tiling: TilingConfig | dict[str, Any] | None = None,
) -> tuple[VisionConfig, TilingConfig]:
    """A checkpoint's tower and tiling; the final norm follows the last layer only, unless asked.

    tiling: another one, or fields that override the checkpoint's.
    """
    if family in WHOLE:
        whole = family.model(checkpoint)
        config, tiles = whole.vision, whole.tiling
    else:
        config, tiles = family.vision(checkpoint)
    if isinstance(tiling, TilingConfig):
        tiles = tiling
    elif tiling:
        if "type" in tiling:
            tiles = dataclasses.replace(tiles, patch_size=config.patch_size)
            if tiling["type"] == "slices" and config.model_type in TAKE_ANY_GRID:
                # A tower of one grid takes others with its positions resized.
                rule = config.positions if config.takes_any_grid else "bicubic"
                config = dataclasses.replace(config, positions=rule)
        tiles = retiled(tiles, tiling, config.image_mean)
    if feature_layer is not None:
        config = dataclasses.replace(config, vision_feature_layer=feature_layer)
        last = config.num_layers_used == config.num_hidden_layers
        config.vision_feature_norm = config.vision_feature_norm and last
    if feature_norm is not None:
        config = dataclasses.replace(config, vision_feature_norm=feature_norm)
    return config, tiles


def retiled(
    tiles: TilingConfig, fields: dict[str, Any], image_mean: tuple[float, ...]
) -> TilingConfig:
    """The same with some fields changed, of another type with none of its tiles."""
    own = dataclasses.asdict(tiles)
    if "type" in fields:  # of the encoder's own tiling, only what is not of tiles holds on
        kept = ("image_size", "patch_size", "resize", "resample", "background")
        own = {name: own[name] for name in kept}
    padded = fields.get("resize") == "pad" or fields.get("type") == "centred"
    if padded and "background" not in fields:  # the encoder's mean colour
        own["background"] = TilingConfig().resized("pad", image_mean).background
    return read_dataclass(TilingConfig, {**own, **fields}, "tiling")


def model_config(checkpoint: Checkpoint, family: ModuleType) -> ModelConfig:
    """A whole model's five choices, and how its tensors are quantised."""
    config = family.model(checkpoint)
    config.quantization = _quantization(checkpoint, family)
    return config


def choose_prompt(config: ModelConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """A LLaVA's layout, from what its tokenizer and chat template look like; sets config.prompt."""
    if tokenizer.chat_template is None:  # LLaVA's processors keep it beside the tokenizer
        for name in ("chat_template.json", "processor_config.json"):
            if (folder / name).is_file():
                template = read_json(folder / name).get("chat_template")
                tokenizer.chat_template = template if isinstance(template, str) else None
                if tokenizer.chat_template:
                    break
    config.prompt.layout = layout_for(tokenizer)
    # Of a language model alone such a template is Mistral's own, which LLaVA's differs from.
    if any(text.strip().endswith("[INST] x [/INST]") for text in _asked(tokenizer)):
        config.prompt.layout = "mistral"


def open_whole(
    folder: Path,
    opened: Callable[[Path], Checkpoint] = Checkpoint.open,
    report: Report | None = None,
    language: str | None = None,
    vision: str | None = None,
) -> tuple[ModuleType, Checkpoint, ModelConfig, Tokenizer]:
    """A whole model's family, checkpoint, choices and tokenizer; no tensor is read.

    language, vision: as in `load`.
    """
    from mlxvlm.language.tokenizer import Tokenizer

    family = _family(folder, WHOLE, "a vision-language model")
    elsewhere = Elsewhere(partial(resolve, report=report), language, vision)
    checkpoint = _checkpoint(folder, family, elsewhere, opened)
    config = model_config(checkpoint, family)
    tokenizer = Tokenizer.load(checkpoint.language or folder)
    tokenizer.num_embeddings = config.language.get("vocab_size")
    if family in (llava_original, llava_uhd):
        config.prompt.layout = family.layout(checkpoint, tokenizer)
    if family in (llava, llava_next, xtuner):
        choose_prompt(config, tokenizer, folder)
    elif family in (internvl, minicpm):
        family.find_image_token(config, checkpoint, tokenizer)
    return family, checkpoint, config, tokenizer


def layout_for(tokenizer: Tokenizer) -> str:
    """The prompt layout that a tokenizer's control tokens and template ask for."""
    if tokenizer.id("<|start_header_id|>") is not None:
        return "llama-3"
    said = _asked(tokenizer)
    if tokenizer.chat_template is None or any(
        "USER: x" in text and text.rstrip().endswith("ASSISTANT:") for text in said
    ):
        return "vicuna_v1"
    return "chat_template"


def _asked(tokenizer: Tokenizer) -> list[str]:
    """What a template makes of a question; only its output tells how it speaks, not its source."""
    part, said = {"type": "text", "text": "x"}, []
    for content in ("x", [part]):  # some templates read plain strings, LLaVA's own typed parts
        with suppress(PromptError):
            said.append(tokenizer.render([{"role": "user", "content": content}], True))
    return said


def _quantization(checkpoint: Checkpoint, family: ModuleType) -> dict[str, Any] | None:
    return rename_quantization(stored_quantization(checkpoint.config), family.rename)


def _checkpoint(
    folder: Path,
    family: ModuleType,
    elsewhere: Elsewhere,
    opened: Callable[[Path], Checkpoint] = Checkpoint.open,
) -> Checkpoint:
    """What lies in a folder, and with it what its family keeps elsewhere."""
    if family in (llava_original, llava_uhd):
        checkpoint = family.assemble(folder, opened, elsewhere)
    elif family is xtuner:
        checkpoint = family.assemble(folder, elsewhere)
    else:
        checkpoint = opened(folder)
    elsewhere.check(folder)
    return checkpoint


def _family(folder: Path, families: tuple[ModuleType, ...], what: str) -> ModuleType:
    if xtuner in families and xtuner.is_xtuner(folder):
        return xtuner
    _check_not_unfinished(folder)
    raw = read_json(folder / "config.json")
    kind = raw.get("model_type")
    if llava_uhd in families and llava_uhd.is_uhd(raw):
        return llava_uhd
    if llava_original in families and llava_original.is_original(raw):
        return llava_original
    for family in families:
        if kind in family.MODEL_TYPES:
            return family
    known = ", ".join(dict.fromkeys(name for family in families for name in family.MODEL_TYPES))
    hint = ""
    if kind in ("siglip2", "siglip2_vision_model"):
        hint = " NaFlex checkpoints take pictures of any shape; use a fixed-resolution SigLIP 2."
    elif families == WHOLE:
        hint = " An encoder and a language model are joined into one by `mlxvlm build`."
    raise ConfigError(
        f"{folder} is not {what} that can be loaded: its model_type is {kind!r}, not one of "
        f"{known}.{hint}"
    )


def _is_export(folder: Path) -> bool:
    """Whether a folder speaks of a whole model, and not of adapters alone."""
    config = folder / "config.json"
    original = config.is_file() and llava_original.is_original(read_json(config))
    return original or xtuner.is_xtuner(folder)


def _check_not_unfinished(folder: Path) -> None:
    if (folder / "config.json").exists():
        return
    if any((folder / name).exists() for name in (ADAPTERS, VISION_ADAPTERS)):
        raise ConfigError(
            f"{folder} holds adapters, not a model: give them as --adapter-path, and with -m the "
            "model that they were trained on."
        )
    if (folder / "checkpoints").is_dir():
        raise ConfigError(
            f"{folder} holds a training run that is not finished: finish it with --resume."
        )


class Holder(nn.Module):
    """Parts under the names that they have in a whole model."""

    def __init__(self, **parts: Any):
        super().__init__()
        for name, part in parts.items():
            self[name] = part
