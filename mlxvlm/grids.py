"""Views of many shapes in one batch.

Where a model's views are squares of one size, what the encoder gives of them is one array
[views, tokens, width]. Where they differ (`tiling.type` "slices") it is a list, an array a view;
which tokens lie beside each other follows from how each picture was cut:

    cut: 640 x 480, 1 x 2 slices    ->    28 x 37, 39 x 26, 39 x 26 patches

Views of one shape go through tower and projector together, so that none is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import mlx.core as mx
import mlx.nn as nn

from .config import TilingConfig
from .dtypes import dtype_of
from .errors import PromptError
from .images.picture import Cut, Features
from .images.tiling import view_sizes

Grid = tuple[int, int]
Views = mx.array | list[mx.array]


def batched(views: Sequence[mx.array]) -> Views:
    """One array of views that agree in shape, else the list of them."""
    return mx.stack(list(views)) if len({tuple(view.shape) for view in views}) == 1 else [*views]


def joined(parts: Sequence[Views]) -> Views:
    """Several batches as one, in order."""
    if len(parts) == 1:
        return parts[0]
    shapes = {part.shape[1:] if isinstance(part, mx.array) else None for part in parts}
    if len(shapes) == 1 and None not in shapes:
        return mx.concatenate([part for part in parts if isinstance(part, mx.array)])
    return [view for part in parts for view in part]


def is_pixels(views: Views) -> bool:
    """Whether views are [H, W, 3] pixels, and not yet [tokens, width] features."""
    return views[0].ndim == 3


def cut_grids(tiling: TilingConfig, cuts: Sequence[Cut]) -> list[Grid] | None:
    """(rows, columns) of patches of each view of pictures cut so, as `project` takes them."""
    if not tiling.varied or tiling.type == "whole":
        return [] if tiling.varied else None
    return view_grids(tiling, cuts)


def view_grids(tiling: TilingConfig, cuts: Sequence[Cut]) -> list[Grid]:
    """(rows, columns) of patches of each view of pictures cut so, in order."""
    P = tiling.patch_size
    return [(h // P, w // P) for cut in cuts for w, h in view_sizes(cut, tiling)]


def by_key(
    views: Sequence[mx.array],
    keys: Sequence[Hashable],
    run: Callable[[mx.array, list[int]], mx.array],
) -> list[mx.array]:
    """What `run` makes of each view: those with one key are stacked, and run together with their
    places; order kept."""
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    found: dict[int, mx.array] = {}
    for places in groups.values():
        out = run(mx.stack([views[i] for i in places]), places)
        found.update((place, out[row]) for row, place in enumerate(places))
    return [found[place] for place in range(len(views))]


def feature_grids(tiling: TilingConfig, found: Sequence[Features]) -> list[Grid] | None:
    """(rows, columns) of patches of each view of features, as `project` takes them."""
    if not tiling.varied or tiling.type == "whole":
        return cut_grids(tiling, ())
    return [
        grid
        for one in found
        for grid in (view_grids(tiling, [one.cut]) if one.grids is None else one.grids)
    ]


def project(projector: nn.Module, views: Views, grids: Sequence[Grid] | None) -> mx.array:
    """[views, tokens, D] embeddings of views of (rows, columns) patches.

    grids: None where all views are of one size; empty where they differ and the projector takes
    each token by itself, which gives [1, tokens of all views, D].
    """
    dtype = dtype_of(projector)
    if grids is None:
        if not isinstance(views, mx.array):
            shapes = sorted({tuple(view.shape) for view in views})
            raise PromptError(
                f"features of different shapes came, {shapes[0]} and {shapes[1]}, and this model's "
                "views are all of one size: they are another encoder's."
            )
        return projector(views.astype(dtype))
    if not grids:
        flat = list(views)

        def alone(same: mx.array, places: list[int]) -> mx.array:
            return projector(same.astype(dtype))

        return mx.concatenate(by_key(flat, [len(view) for view in flat], alone))[None]
    found = [len(view) for view in views]
    if found != [h * w for h, w in grids]:
        raise PromptError(
            f"features of {_some(found)} tokens a view came for views of "
            f"{_some([f'{h} x {w}' for h, w in grids])} patches: they are another encoder's, or of "
            "pictures that were cut otherwise."
        )

    def run(same: mx.array, places: list[int]) -> mx.array:
        return projector(same.astype(dtype), [grids[i] for i in places])

    return mx.stack(by_key(list(views), grids, run))


def _some(values: Sequence[object], most: int = 8) -> str:
    more = ", ..." if len(values) > most else ""
    return ", ".join(str(value) for value in values[:most]) + more
