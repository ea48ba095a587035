"""`mlxvlm build`: an encoder, a fresh projector and a language model, joined into a model."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import typer

from mlxvlm.errors import UsageError

# Flags that not every projector has, and those that do.
OWN_FLAGS = {
    "num_query_tokens": (
        "--num-query-tokens",
        ("c_abstractor", "resampler", "spatial_resampler"),
    ),
    "num_layers": ("--projector-layers", ("attention", "c_abstractor")),
    "num_attention_heads": ("--projector-heads", ("attention", "resampler", "spatial_resampler")),
    "num_positions": ("--num-positions", ("attention",)),
    "layer_norm": ("--projector-norm", ("mlp",)),
}
# Flags that not every tiling has, and those that do.
TILING_FLAGS = {
    "max_tiles": ("--max-tiles", ("dynamic", "anyres-hd", "slices", "slices-uhd", "cover")),
    "min_tiles": ("--min-tiles", ("dynamic", "anyres-hd", "cover")),
    "use_thumbnail": ("--thumbnail and --no-thumbnail", ("dynamic", "cover", "cover-2x2")),
    "grids": ("--grids", ("anyres",)),
    "view_marks": ("--view-marks", ("dynamic", "cover", "cover-2x2")),
}


def build(
    vision: Annotated[
        str,
        typer.Option(
            help="SigLIP, CLIP, InternViT, or a model whose encoder to take: a folder or a hub id; "
            "or a fresh layer of patches, as EVE's: eve-patch14-anypixel-672, or -1344."
        ),
    ],
    language: Annotated[str, typer.Option(help="A language model: a folder or a hub id.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the new model.")],
    projector: Annotated[
        Literal["attention", "mlp", "c_abstractor", "resampler", "spatial_resampler"] | None,
        typer.Option(
            help="Self-attention blocks; LLaVA's two linear layers; Honeybee's convolutions around "
            "a pooling, as in MM1.5; MiniCPM-V's queries, which look at every patch; or "
            "LLaVA-UHD's, which look at their own part of the view. Default: attention; beside a "
            "model's encoder, all as that model has it."
        ),
    ] = None,
    pool: Annotated[
        Literal["none", "mean2", "concat2", "concat3"] | None,
        typer.Option(help="Fewer visual tokens: means, or neighbours side by side. [none]"),
    ] = None,
    num_query_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Visual tokens a view: of c_abstractor or spatial_resampler (a square), or of "
            "resampler. [144, 144, 96]",
        ),
    ] = None,
    projector_width: Annotated[
        int | None, typer.Option(min=0, help="Width of the projector; 0 is its default. [0]")
    ] = None,
    projector_layers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Attention's blocks; c_abstractor's before, and after, its pooling. [2, 3]"
        ),
    ] = None,
    projector_heads: Annotated[
        int | None,
        typer.Option(
            min=0, help="Heads of attention's blocks, or of resamplers. [0: width / 64, / 128]"
        ),
    ] = None,
    projector_norm: Annotated[
        bool | None,
        typer.Option(
            "--projector-norm/--no-projector-norm",
            help="A LayerNorm at the head of mlp, as InternVL's. [off]",
        ),
    ] = None,
    num_positions: Annotated[
        int | None,
        typer.Option(min=0, help="Learned positions before attention's blocks. [0: none]"),
    ] = None,
    resize: Annotated[
        Literal["squash", "crop", "pad"] | None,
        typer.Option(help="How a picture becomes a square. Default: the encoder's own way."),
    ] = None,
    tiling: Annotated[
        Literal[
            "single", "dynamic", "anyres", "anyres-hd", "slices", "slices-uhd", "cover", "cover-2x2"
        ]
        | None,
        typer.Option(
            help="dynamic: InternVL's tiles. anyres: LLaVA-NeXT's, anyres-hd: LLaVA-1.5-HD's. "
            "slices: MiniCPM-V's, slices-uhd: LLaVA-UHD's, for a resampler. cover: MM1.5's, "
            "cover-2x2: its static four. Default: the encoder's own, one view."
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pixels a side of a view, if not the encoder's own: its positions are "
            "interpolated, as MM1.5's from 378 to 672.",
        ),
    ] = None,
    max_tiles: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most tiles: 12 dynamic ones, which the pictures of a row share; 6 of anyres-hd; "
            "9 slices, 7 of slices-uhd; 9 of cover.",
        ),
    ] = None,
    min_tiles: Annotated[
        int | None, typer.Option(min=1, help="Fewest tiles of a picture alone. [1; 4 of cover]")
    ] = None,
    thumbnail: Annotated[
        bool | None,
        typer.Option(
            "--thumbnail/--no-thumbnail",
            help="The whole picture, after its dynamic or cover tiles. [on]",
        ),
    ] = None,
    view_marks: Annotated[
        Literal["separators", "index"] | None,
        typer.Option(
            help="Texts between dynamic or cover tiles that say where each lies. Default: none."
        ),
    ] = None,
    grids: Annotated[
        str,
        typer.Option(
            metavar="CxR,...",
            help="What anyres chooses from. [2x1,1x2,2x2,1x3,3x1: NeXT's]",
        ),
    ] = "",
    feature_layer: Annotated[
        int | None,
        typer.Option(help="Which hidden state to take: -1 the last block's, -2 the one before."),
    ] = None,
    feature_norm: Annotated[
        bool | None,
        typer.Option("--feature-norm/--no-feature-norm", help="The tower's final norm after it."),
    ] = None,
    layout: Annotated[
        Literal["llama-3", "vicuna_v1", "mistral", "internvl2_5", "plain", "chat_template"] | None,
        typer.Option(help="The prompt's layout. Default: by the tokenizer."),
    ] = None,
    fresh_language: Annotated[
        bool,
        typer.Option(
            "--fresh-language", help="Random weights from the language model's config.json."
        ),
    ] = False,
    about: Annotated[
        str, typer.Option(metavar="TEXT", help="A line that the model says of itself in a chat.")
    ] = "",
    refusal: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="The answer that its data teach it for what it does not know, word for word.",
        ),
    ] = "",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="What tensors become. Default: as stored."),
    ] = None,
    vision_revision: Annotated[str | None, typer.Option(help="Of a hub encoder.")] = None,
    language_revision: Annotated[str | None, typer.Option(help="Of a hub language model.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="What fresh weights are drawn from.")] = 0,
) -> None:
    """Join an encoder and a language model with a fresh projector, to be trained."""
    from mlxvlm.config import TILINGS, ProjectorConfig
    from mlxvlm.weights.join import check_out, join
    from mlxvlm.weights.save import save

    check_out(out, vision, language)
    limits = {"max_tiles": max_tiles, "min_tiles": min_tiles}
    limits = {name: given for name, given in limits.items() if given is not None}
    asked = {**limits, "use_thumbnail": thumbnail, "grids": grids or None, "view_marks": view_marks}
    for name, value in asked.items():
        flag, kinds = TILING_FLAGS[name]
        if value is not None and tiling not in kinds:
            more = "s" if " and " not in flag else ""
            raise UsageError(f"{flag} belong{more} to --tiling {_either(kinds)}.")
    given = {
        "num_query_tokens": num_query_tokens,
        "num_layers": projector_layers,
        "num_attention_heads": projector_heads,
        "num_positions": num_positions,
        "layer_norm": projector_norm,
    }
    given = {name: value for name, value in given.items() if value is not None}
    kind = projector or "attention"
    for name in given:
        flag, kinds = OWN_FLAGS[name]
        if kind not in kinds:
            raise UsageError(f"{flag} belongs to --projector {' or '.join(kinds)}, not {kind}.")
    general = {"type": projector, "pool": pool, "hidden_size": projector_width}
    given |= {name: value for name, value in general.items() if value is not None}
    fields: dict[str, Any] = {**TILINGS[tiling], **limits} if tiling else {}
    if thumbnail is not None:
        fields["use_thumbnail"] = thumbnail
    if grids:
        fields["grids"] = _grids(grids)
    if resize:
        fields["resize"] = resize
    vlm = join(
        vision,
        language,
        ProjectorConfig(**given) if given else None,
        tiling=fields,
        image_size=image_size,
        view_marks=view_marks or "",
        feature_layer=feature_layer,
        feature_norm=feature_norm,
        layout=layout,
        fresh_language=fresh_language,
        about=about,
        refusal=refusal,
        dtype=dtype,
        seed=seed,
        revisions=(vision_revision, language_revision),
        report=lambda download: typer.echo(str(download), err=True),
    )
    save(vlm, out)
    tiles, views = vlm.config.tiling, ""
    upto = "up to " if tiles.type == "whole" else ""
    if tiles.type not in ("single", "whole"):
        more = ", and a thumbnail" if tiles.use_thumbnail else ""
        more = ", and the whole" if tiles.type in ("anyres", "slices", "cover") and more else more
        least, most = tiles.min_tiles, tiles.max_tiles
        number = f"{least} to {most}" if least < most else str(most)
        views = f", {number} tiles a picture{more}"
    typer.echo(
        f"Saved {out}: {upto}{vlm.config.tokens_per_view} visual tokens a view{views}. "
        f"The projector is untrained: mlxvlm pretrain --model {out}"
    )


def _either(names: tuple[str, ...]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _grids(text: str) -> list[list[int]]:
    """Columns and rows, of "2x1,1x2"."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text):
        raise UsageError(f"--grids (={text}) must be columns and rows, as in 2x1,1x2,2x2.")
    return [[int(n) for n in grid.split("x")] for grid in text.split(",")]
