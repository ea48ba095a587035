"""`mlxvlm build`: an encoder, a fresh projector and a language model, joined into a model."""

from __future__ import annotations

from typing import Annotated, Literal

import typer


def build(
    vision: Annotated[
        str,
        typer.Option(help="SigLIP, CLIP, or a model whose encoder to take: a folder or a hub id."),
    ],
    language: Annotated[str, typer.Option(help="A language model: a folder or a hub id.")],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the new model.")],
    projector: Annotated[
        Literal["attention", "mlp"],
        typer.Option(help="Two self-attention blocks, or LLaVA's two linear layers."),
    ] = "attention",
    pool: Annotated[
        Literal["none", "mean2", "concat2", "concat3"],
        typer.Option(help="Fewer visual tokens: means, or neighbours side by side."),
    ] = "none",
    projector_width: Annotated[
        int, typer.Option(min=0, help="Width of the projector; 0 is its default.")
    ] = 0,
    projector_layers: Annotated[
        int, typer.Option(min=1, help="Self-attention blocks of the projector.")
    ] = 2,
    projector_heads: Annotated[
        int, typer.Option(min=0, help="Attention heads of the projector; 0 is width / 64.")
    ] = 0,
    num_positions: Annotated[
        int, typer.Option(min=0, help="Learned positions in the projector; 0 is none.")
    ] = 0,
    feature_layer: Annotated[
        int | None,
        typer.Option(help="Which hidden state to take: -1 the last block's, -2 the one before."),
    ] = None,
    feature_norm: Annotated[
        bool | None,
        typer.Option("--feature-norm/--no-feature-norm", help="The tower's final norm after it."),
    ] = None,
    layout: Annotated[
        Literal["llama-3", "vicuna_v1", "plain", "chat_template"] | None,
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
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="What tensors become. Default: as stored."),
    ] = None,
    vision_revision: Annotated[str | None, typer.Option(help="Of a hub encoder.")] = None,
    language_revision: Annotated[str | None, typer.Option(help="Of a hub language model.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="What fresh weights are drawn from.")] = 0,
) -> None:
    """Join an encoder and a language model with a fresh projector, to be trained."""
    from mlxvlm.config import ProjectorConfig
    from mlxvlm.weights.join import check_out, join
    from mlxvlm.weights.save import save

    check_out(out, vision, language)
    vlm = join(
        vision,
        language,
        ProjectorConfig(
            type=projector,
            pool=pool,
            hidden_size=projector_width,
            num_layers=projector_layers,
            num_attention_heads=projector_heads,
            num_positions=num_positions,
        ),
        feature_layer=feature_layer,
        feature_norm=feature_norm,
        layout=layout,
        fresh_language=fresh_language,
        about=about,
        dtype=dtype,
        seed=seed,
        revisions=(vision_revision, language_revision),
        report=lambda download: typer.echo(str(download), err=True),
    )
    save(vlm, out)
    typer.echo(
        f"Saved {out}: {vlm.config.tokens_per_view} visual tokens a view. "
        f"The projector is untrained: mlxvlm pretrain --model {out}"
    )
