"""The model: an encoder, a projector and a language model, as one.

    tokens    <bos> user: [img][img][img]...[img] What is this? assistant:
                            |    |    |        |
    pictures  views -> vision -> projector  (one embedding per image token)

Tokens hold the image token once per visual token. Its id never reaches the embedding table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .config import ModelConfig, pooled_side
from .dtypes import dtype_of
from .errors import PromptError, VLMError
from .frames import with_frames
from .grids import Views, batched, cut_grids, feature_grids, project
from .images.picture import Cut, Features, Picture
from .images.tiling import tiles_each
from .language.forward import embedding
from .language.load import build_language, language_width
from .merge import merge_tokens, spelling, unbroken, visual_tokens
from .projected import ProjectedEncoder
from .projectors.build import build_projector
from .prompts import Prompt, normalize_messages, render
from .vision.build import build_vision
from .vision.carry import carry
from .vision.encoder import Encoder

if TYPE_CHECKING:
    from .language.tokenizer import Tokenizer
    from .reply import Chunk, Reply
    from .vote import Vote


class VLM(nn.Module):
    """A vision-language model.

    Parameters are named `vision.*`, `projector.*` and `language.*`, the last with mlx-lm's names.
    A new object has random weights; `mlxvlm.load` gives one from a checkpoint.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.vision = build_vision(config.vision)
        self.projector = build_projector(
            config.projector,
            config.vision,
            language_width(config.language),
            newline=config.prompt.merge == "spatial_unpad",
        )
        self.language = build_language(config.language)
        embedding(self.language)  # refuses, by name, a decoder that cannot be put together here

    def resize_views(self, image_size: int) -> None:
        """Views of `image_size` pixels a side from here on: learned positions of the tower, and of
        the projector, are interpolated, as MM1.5's are from 378 to 672 pixels."""
        old, config = self.config, self.config.with_image_size(image_size)
        vision = build_vision(config.vision)
        carry(self.vision, vision, (old.vision.table_grid, config.vision.table_grid))
        newline = config.prompt.merge == "spatial_unpad"
        width = language_width(config.language)
        projector = build_projector(config.projector, config.vision, width, newline)
        sides = (0, 0)
        if config.projector.has_positions:
            asker, pool = "a projector with positions", config.projector.pool
            before, after = (pooled_side(c.vision, pool, asker) for c in (old, config))
            sides = before, after
        carry(self.projector, projector, sides)
        self.config, self.vision, self.projector = config, vision, projector
        mx.eval(self.vision.parameters(), self.projector.parameters())

    @property
    def encoder(self) -> Encoder:
        """The frozen half: pictures to features, as an embedding cache stores them."""
        config, dtype = self.config, self.vision.embeddings.patch_embedding.weight.dtype
        return Encoder(self.vision, config.vision, config.tiling, config.encoder_pool, dtype)

    @property
    def projected_encoder(self) -> ProjectedEncoder:
        """Encoder and projector as one, for a cache of what the language model sees."""
        width = language_width(self.config.language)
        return ProjectedEncoder(self.encoder, self.projector, self.config, width)

    def look(
        self, images: Sequence[Any], max_tiles: int | None = None, allow_urls: bool = False
    ) -> list[Picture]:
        """Opens, orients and tiles pictures: paths, bytes, PIL images or arrays."""
        return self.encoder.look(images, max_tiles=max_tiles, allow_urls=allow_urls)

    def features(self, images: Sequence[Any]) -> list[Features]:
        """What an embedding cache would store for each picture, before the codec."""
        pictures = [i if isinstance(i, Picture) else self.look([i])[0] for i in images]
        return self.encoder.encode(pictures)

    def tokenize(
        self,
        messages: Sequence[dict[str, Any]],
        images: Sequence[Any] = (),
        add_generation_prompt: bool | None = None,
        allow_urls: bool = False,
        look: Callable[..., list[Any]] | None = None,
    ) -> Prompt:
        """Lays out messages and pictures as tokens.

        images: what `look` takes, or Picture or Features; those that are opened here share the
        tiling's budget as in a row of data. A part {"type": "video", "video": "clip.gif", "frames":
        8} of a user's message shows a video, a view a frame. `add_generation_prompt` opens the
        assistant's turn; by default, where the last message is not the assistant's. look: what
        opens pictures in the stead of `self.look`.
        """
        if self.tokenizer is None:
            raise PromptError("this model has no tokenizer; load it from a folder that has one.")
        look = look or self.look
        messages = with_frames(messages, self.config.prompt, look)
        parts, images = normalize_messages(messages, images)
        if add_generation_prompt is None:
            add_generation_prompt = bool(parts[-1]["role"] != "assistant")
        limit = tiles_each(self.config.tiling, len(images))
        pictures = [
            i if isinstance(i, (Picture, Features)) else look([i], limit, allow_urls)[0]
            for i in images
        ]
        counts = [spelling(self.config, p.cut, at) for at, p in enumerate(pictures)]
        prompt = render(parts, counts, self.tokenizer, self.config.prompt, add_generation_prompt)
        prompt.pictures = pictures
        return prompt

    def project(self, pictures: Sequence[Picture | Features]) -> mx.array:
        """[visual tokens, D] of all pictures, one after the other."""
        encoded = iter(self.encoder.encode([p for p in pictures if isinstance(p, Picture)]))
        features = [next(encoded) if isinstance(p, Picture) else p for p in pictures]
        parts = []
        for done, same in groupby(features, key=lambda found: found.projected):
            group = list(same)
            views = batched([mx.array(view) for found in group for view in found.views])
            cuts = [found.cut for found in group]
            if done and isinstance(views, mx.array):
                parts.append(self.merge(views.astype(dtype_of(self.projector)), cuts))
            else:
                grids = feature_grids(self.config.tiling, group)
                parts.append(self.merge(project(self.projector, views, grids), cuts))
        return mx.concatenate(parts) if len(parts) > 1 else parts[0]

    def project_views(self, views: Views, cuts: Sequence[Cut] = ()) -> mx.array:
        """[views, tokens, width] features of pictures to [visual tokens, D] embeddings; a list of
        [tokens, width] where views differ in size.

        cuts: how the pictures are cut, which `prompt.merge` "flat" of views of one size need not
        know.
        """
        grids = cut_grids(self.config.tiling, cuts)
        return self.merge(project(self.projector, views, grids), cuts)

    def merge(self, projected: mx.array, cuts: Sequence[Cut] = ()) -> mx.array:
        """[views, tokens_per_view, D] of pictures to [visual tokens, D]; cuts: as above."""
        tokens = projected.reshape(-1, projected.shape[-1])
        return merge_tokens(self.config, tokens, self.projector.get("image_newline"), cuts)

    def embed(self, tokens: Any, pictures: Sequence[Picture | Features] | None = None) -> mx.array:
        """Embeddings [B, L, D] of tokens [B, L] with the pictures in their places.

        pictures: one flat list in order of appearance, row after row. The counts are checked on the
        host: a picture that does not fill its places exactly is a PromptError, never a shift.
        """
        rows = np.array(tokens)
        rows = rows[None] if rows.ndim == 1 else rows
        pictures = pictures or []
        cuts = [p.cut for p in pictures]
        self._check_places(rows == self.config.prompt.image_token_id, cuts)
        visual = self.project(pictures) if pictures else None
        if visual is not None:
            self._check_count(len(visual), cuts)
        return self.splice(rows, visual)

    def embed_after(
        self, tokens: np.ndarray, pictures: Sequence[Picture | Features], start: int
    ) -> mx.array:
        """`embed` of one prompt, tokens [L], for the positions from `start` on: [L - start, D].

        Pictures that end before `start` are not looked at.
        """
        places = tokens == self.config.prompt.image_token_id
        cuts = [p.cut for p in pictures]
        self._check_places(places[None], cuts)
        before = int(places[:start].sum())
        ends = np.cumsum([visual_tokens(self.config, cut) for cut in cuts])
        first = int(np.searchsorted(ends, before, side="right"))
        if first == len(cuts):
            return self.splice(tokens[None, start:], None)[0]
        visual = self.project(pictures[first:])
        self._check_count(len(visual), cuts[first:])
        skip = before - (int(ends[first - 1]) if first else 0)
        return self.splice(tokens[None, start:], visual[skip:])[0]

    def splice(self, tokens: np.ndarray, visual: mx.array | None) -> mx.array:
        """Text embeddings of host tokens [B, L], with `visual` [N, D] at the image tokens."""
        places = tokens == self.config.prompt.image_token_id
        text = embedding(self.language)(mx.array(np.where(places, 0, tokens).astype(np.int32)))
        if visual is None:
            return text
        # A gather, not a scatter: each place looks up its row, and text rows look up row 0 unused.
        index = np.where(places.reshape(-1), np.cumsum(places.reshape(-1)) - 1, 0)
        found = visual[mx.array(index.astype(np.int32))].reshape(*tokens.shape, -1)
        return mx.where(mx.array(places)[..., None], found.astype(text.dtype), text)

    def _check_count(self, found: int, cuts: Sequence[Cut]) -> None:
        wanted = sum(visual_tokens(self.config, cut) for cut in cuts)
        if found != wanted:
            raise PromptError(
                f"the features give {found} visual tokens instead of {wanted}, "
                f"{self.config.tokens_per_view} a view: they are another encoder's."
            )

    def _check_places(self, places: np.ndarray, cuts: Sequence[Cut]) -> None:
        counts = [visual_tokens(self.config, cut) for cut in cuts]
        ends = np.cumsum([0, *counts])
        needed = np.cumsum(places.sum(axis=1))
        for row, end in enumerate(needed):
            if end not in ends:
                raise PromptError(
                    f"row {row} has {int(places[row].sum())} image tokens, which its pictures "
                    f"do not fill exactly (the pictures give {counts} in order)."
                )
        if ends[-1] != needed[-1]:
            raise PromptError(
                f"{len(counts)} pictures give {int(ends[-1])} visual tokens, but the tokens have "
                f"places for {int(needed[-1])}."
            )
        runs = [run for cut in cuts for run in unbroken(self.config, cut)]
        edges = np.cumsum([0, *runs])
        where = np.flatnonzero(places)
        for start, end in pairwise(edges.tolist()):
            if where[end - 1] - where[start] != end - start - 1:
                raise PromptError(
                    f"other tokens stand among {end - start} image tokens of one picture, which "
                    "must follow each other."
                )

    def __call__(
        self, tokens: Any, pictures: Sequence[Picture | Features] | None = None
    ) -> mx.array:
        """Logits [B, L, V] of right-padded tokens [B, L]; causal, so padding is never seen."""
        embeddings = self.embed(tokens, pictures)
        ids = mx.zeros(embeddings.shape[:2], dtype=mx.int32)
        return self.language(ids, input_embeddings=embeddings)

    def stream(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Any] = (), **options: Any
    ) -> Iterator[Chunk]:
        """Answers, piece by piece; options as in `reply.stream`."""
        from .reply import stream

        return stream(self, messages, images, **options)

    def generate(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Any] = (), **options: Any
    ) -> Reply:
        """Answers the last user message; options as in `reply.stream`."""
        from .reply import generate

        return generate(self, messages, images, **options)

    def batch(
        self, asks: Iterable[tuple[Sequence[dict[str, Any]], Sequence[Any]]], **options: Any
    ) -> Iterator[tuple[int, Reply | VLMError]]:
        """Answers many (messages, images) together; as `batch.batch`, with its options."""
        from .batch import batch

        return batch(self, asks, **options)

    def vote(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Any] = (), **options: Any
    ) -> Vote:
        """What most of several sampled answers come to; as `vote.vote`, with its options."""
        from .vote import vote

        return vote(self, messages, images, **options)
