"""A new model from parts: an encoder, a fresh projector, a language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxvlm.config import ModelConfig, ProjectorConfig, PromptConfig
from mlxvlm.errors import ConfigError, UsageError, WeightsError
from mlxvlm.prompts import render
from mlxvlm.vision.build import build_vision
from mlxvlm.vision.carry import carry
from mlxvlm.weights.families import eve, llama
from mlxvlm.weights.folder import ADAPTERS, VISION_ADAPTERS, Checkpoint, weight_files
from mlxvlm.weights.hub import Download, resolve
from mlxvlm.weights.load import WHOLE, Holder, encoder_configs, layout_for, open_encoder
from mlxvlm.weights.save import quantization_of
from mlxvlm.weights.tensors import fill, parse_dtype, rename_quantization, stored_quantization

if TYPE_CHECKING:
    from mlxvlm.language.tokenizer import Tokenizer
    from mlxvlm.model import VLM

# Tokens that vocabularies hold for a use like this; the first one that is there marks a picture.
IMAGE_TOKENS = (
    "<|reserved_special_token_0|>",
    "<IMG_CONTEXT>",
    "<image>",
    "<|image|>",
    "<|image_pad|>",
    "<image_soft_token>",
    "<unused0>",
    "<|placeholder1|>",
)


def join(
    vision: str | Path,
    language: str | Path,
    projector: ProjectorConfig | None = None,
    *,
    tiling: dict[str, Any] | None = None,
    image_size: int | None = None,
    view_marks: str = "",
    feature_layer: int | None = None,
    feature_norm: bool | None = None,
    layout: str | None = None,
    fresh_language: bool = False,
    about: str = "",
    refusal: str = "",
    dtype: str | mx.Dtype | None = None,
    seed: int = 0,
    revisions: tuple[str | None, str | None] = (None, None),
    report: Callable[[Download], Any] | None = None,
) -> VLM:
    """An encoder and a language model, from folders or hub ids, and a fresh projector between.

    vision: or what EVE's authors call a patch embedding layer, openai/eve-patch14-anypixel-672,
    whose weights are fresh. projector: by default of the same kind as that of a whole model whose
    encoder is taken, else ProjectorConfig's. tiling: fields that override the encoder's own.
    image_size: of a view in pixels, where it is not the encoder's own: its positions are
    interpolated. view_marks: "separators" or "index", as `PromptConfig.merge` has them.
    feature_layer, feature_norm: as in `load_encoder`. layout: a prompt layout; by default the one
    that the tokenizer asks for.
    fresh_language: random weights, its config.json alone.
    dtype: what stored tensors become; fresh ones are float32, because they are about to be trained.
    seed: what the fresh weights are drawn from.
    """
    from mlxvlm.language.tokenizer import Tokenizer
    from mlxvlm.model import VLM

    wanted = parse_dtype(dtype)
    eyes = family = None
    if is_layer := eve.NAME.fullmatch(str(vision)) is not None and not Path(vision).exists():
        if tiling or image_size or feature_layer is not None or feature_norm is not None:
            raise UsageError(
                f"{vision} is a patch embedding layer: pictures keep their shape, and there are no "
                "hidden states to choose from."
            )
        tower, tiles = eve.choices(str(vision))
        usual = ProjectorConfig(type="mlp")
    else:
        eyes, family = open_encoder(vision, revisions[0], report)
        tower, tiles = encoder_configs(eyes, family, feature_layer, feature_norm, tiling)
        usual = family.model(eyes).projector if family in WHOLE else ProjectorConfig()
    folder = resolve(language, revisions[1], report)
    mouth = _language(folder, fresh_language)
    tokenizer = Tokenizer.load(folder)
    raw = llama.language(mouth)
    # Any vocabulary has the comma and the newline between LLaVA-UHD's slices.
    merges = {"anyres": "spatial_unpad", "slices": "uhd", "whole": "rows"}
    merge = merges.get(tiles.type, "flat")
    stored = dataclasses.replace(tower, vision_use_head=False)
    wide = dataclasses.replace(stored, image_size=image_size or stored.image_size)
    if wide != stored and tiles.varied:
        raise UsageError(f"{tiles.type!r} views have shapes of their own: leave --image-size out.")
    config = ModelConfig(
        tiling=dataclasses.replace(tiles, image_size=image_size) if wide != stored else tiles,
        vision=wide,
        projector=projector or usual,
        prompt=PromptConfig(layout=layout or layout_for(tokenizer), merge=view_marks or merge),
        language=raw,
        about=about,
        refusal=refusal,
    )
    config.prompt.image_token_id = image_token_id(tokenizer, raw)
    # A layout that the tokenizer cannot write is refused now, not by the first chat.
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    render([question], [1], tokenizer, config.prompt, add_generation_prompt=True)
    randomness: Any = mx.random.state
    state = mx.array(randomness[0])
    mx.random.seed(seed)
    try:
        vlm = VLM(config, tokenizer)
        mx.eval(vlm.projector.parameters())
        if is_layer:
            mx.eval(vlm.vision.parameters())
        elif eyes is not None and family is not None:
            block = stored_quantization(eyes.config)
            seen = Holder(vision=build_vision(stored)) if wide != stored else vlm
            fill(
                seen,
                eyes,
                family.rename,
                prefixes=("vision.",),
                dtype=wanted,
                quantization=rename_quantization(block, family.rename),
            )
            if seen is not vlm:
                carry(seen.vision, vlm.vision, (stored.table_grid, wide.table_grid))
        if fresh_language:
            mx.eval(vlm.language.parameters())
        else:
            fill(
                vlm,
                mouth,
                llama.rename,
                prefixes=("language.",),
                dtype=wanted,
                quantization=rename_quantization(stored_quantization(mouth.config), llama.rename),
            )
    finally:
        randomness[0][:] = state  # the caller's draws go on as if nothing had been drawn here
    vlm.config.quantization = quantization_of(vlm)
    return vlm


def image_token_id(tokenizer: Tokenizer, language: dict[str, Any]) -> int:
    """A reserved id of the vocabulary, or the first beyond it: none is added to the table."""
    for token in IMAGE_TOKENS:
        # Only a control token will do: a word of the vocabulary could come up in a text.
        if token in tokenizer.control:
            return tokenizer.control[token]
    return max(int(language.get("vocab_size", 0)), tokenizer.vocab_size)


def check_out(out: str | Path, *sources: str | Path) -> Path:
    """The folder for a new model: not one of its sources, nor one that holds something else."""
    out = Path(out)
    for source in sources:
        if Path(source).exists() and out.resolve() == Path(source).resolve():
            raise UsageError(f"--out (={out}) is one of the parts: give a folder of its own.")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out must name a folder, and {out} is a file.")
    if any((out / name).exists() for name in ("config.json", ADAPTERS, VISION_ADAPTERS)):
        raise UsageError(f"--out {out} holds a model already; name another folder.")
    return out


def _language(folder: Path, fresh: bool) -> Checkpoint:
    if fresh:
        from mlxvlm.config import read_json

        return Checkpoint(folder, read_json(folder / "config.json"))
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json: it is no language model's folder.")
    try:
        weight_files(folder)
    except WeightsError as error:
        raise WeightsError(
            f"{error} For random weights from its config.json, say --fresh-language."
        ) from None
    checkpoint = Checkpoint.open(folder)
    kinds = [kind for family in WHOLE for kind in family.MODEL_TYPES]
    if checkpoint.config.get("model_type") in kinds:
        raise ConfigError(
            f"{folder} is a whole vision-language model, not a language model alone: give the "
            "repository of its language model."
        )
    return checkpoint
