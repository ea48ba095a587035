"""The frozen encoder: pictures in, features out, and a name for what made them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..config import TilingConfig, VisionConfig, check_slices, is_adapter, pooled_tokens
from ..errors import ConfigError, PictureError
from ..grids import Views, by_key
from ..images.picture import Features, Picture
from .build import Tower
from .patches import PatchEmbedding, grid_of
from .pooling import mean2

# float16 is left out: activations of SigLIP's and CLIP's sort overflow it.
DTYPES = {mx.float32: "float32", mx.bfloat16: "bfloat16"}

# Patches in one batch: eleven views of SigLIP-So400m at 384 pixels.
MOST_TOKENS = 8192


class Encoder:
    """Tiling, normalisation, tower and parameter-free pooling: what a cache of features stands for.

    pool: "none" or "mean2"; concatenation keeps every byte and belongs to the projector.
    dtype: what the tower computes in, and the features' dtype; the tower is cast to it in place.
    """

    def __init__(
        self,
        vision: Tower,
        config: VisionConfig,
        tiling: TilingConfig,
        pool: str = "none",
        dtype: mx.Dtype = mx.float32,
    ):
        if dtype not in DTYPES:
            raise ConfigError(
                f"an encoder computes in float32 or bfloat16, not in {_name(dtype)}: "
                "float16 overflows inside vision towers."
            )
        if pool not in ("none", "mean2"):
            raise ConfigError(
                f"an encoder's pool (={pool!r}) must be 'none' or 'mean2'; "
                "'concat2' and 'concat3' are the projector's."
            )
        check_slices(tiling, config, pool)
        if tiling.image_size != config.image_size:
            raise ConfigError(
                f"tiling.image_size (={tiling.image_size}) must equal "
                f"vision.image_size (={config.image_size}): the encoder has a fixed grid."
            )
        self.vision = vision
        self.config = config
        self.tiling = tiling
        self.pool = pool
        self.dtype = dtype
        # Of a view of image_size, where views differ.
        self.tokens = pooled_tokens(config, pool)
        self.width = config.hidden_size
        self._digest: tuple[list[mx.array], str] | None = None

    def look(
        self, images: Iterable[Any], max_tiles: int | None = None, allow_urls: bool = False
    ) -> list[Picture]:
        """Opens and tiles paths, bytes, PIL images or arrays; a Picture is taken as it is."""
        from ..images.tiling import look

        return [
            image
            if isinstance(image, Picture)
            else look(image, self.tiling, max_tiles=max_tiles, allow_urls=allow_urls)
            for image in images
        ]

    def encode(self, pictures: list[Picture]) -> list[Features]:
        """Features of pictures, lazy: nothing is computed before they are evaluated.

        Views of one size go through the tower together, in the order given, in batches of up to
        `MOST_TOKENS` patches, so that a hundred pictures need no more memory than a few.
        """
        self._cast()
        views = [np.asarray(view) for picture in pictures for view in picture.views]
        sizes: dict[tuple[int, ...], list[int]] = {}
        for i, view in enumerate(views):
            sizes.setdefault(view.shape, []).append(i)
        tokens: dict[int, mx.array] = {}
        for size, same in sizes.items():
            most = max(1, MOST_TOKENS // self._num_tokens(size))
            for at in range(0, len(same), most):
                places = same[at : at + most]
                features = self.run(self._shipped([views[i] for i in places]))
                tokens.update((i, features[row]) for row, i in enumerate(places))
        out, start = [], 0
        for picture in pictures:
            stop = start + len(picture.views)
            rows = [tokens[i] for i in range(start, stop)]
            features = Features(rows, picture.grid, picture.size, picture.sha256)
            if self.tiling.varied:
                shapes = (view.shape for view in views[start:stop])
                features.grids = [grid_of(shape, self.config.patch_size) for shape in shapes]
            out.append(features)
            start = stop
        return out

    def _shipped(self, views: list[np.ndarray]) -> mx.array:
        """Views of one size as the tower takes them: bytes where it normalises these itself."""
        patches = self.vision.embeddings.patch_embedding
        for view in views:
            _check_view(view)
        if isinstance(patches, PatchEmbedding) and all(v.dtype == np.uint8 for v in views):
            return mx.array(np.stack(views))
        return self.normalise(views)

    def normalise(self, views: list[np.ndarray]) -> mx.array:
        """[H, W, 3] views of one size -> [N, H, W, 3] in the encoder's dtype, order kept.

        uint8 becomes (x / 255 - mean) / std in float32; floating views are taken as normalised.
        """
        raw = [i for i, view in enumerate(views) if view.dtype == np.uint8]
        done = [i for i, view in enumerate(views) if np.issubdtype(view.dtype, np.floating)]
        for view in views:
            _check_view(view)
        parts = []
        if raw:
            mean = mx.array(self.config.image_mean, dtype=mx.float32)
            std = mx.array(self.config.image_std, dtype=mx.float32)
            pixels = mx.array(np.stack([views[i] for i in raw])).astype(mx.float32)
            parts.append((pixels / 255 - mean) / std)
        if done:
            parts.append(mx.array(np.stack([views[i].astype(np.float32) for i in done])))
        if len(parts) == 1:
            return parts[0].astype(self.dtype)
        back = np.argsort(np.array(raw + done)).astype(np.int32)
        return mx.concatenate(parts)[mx.array(back)].astype(self.dtype)

    def identity(self) -> dict[str, Any]:
        """What the features depend on, as plain JSON values: two encoders that agree here agree."""
        config = self.config
        identity: dict[str, Any] = {
            "model_type": config.model_type,
            "sha256": self._sha256(),
            "dtype": DTYPES[self.dtype],
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "hidden_act": config.hidden_act,
            "layer_norm_eps": config.layer_norm_eps,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            # counted from the embeddings, so that -1 and 27 of 27 layers are one
            "vision_feature_layer": config.num_layers_used,
            "vision_feature_norm": config.vision_feature_norm,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "image_mean": list(config.image_mean),
            "image_std": list(config.image_std),
            "pool": self.pool,
        }
        if config.takes_any_grid:
            identity |= {"positions": config.positions, "position_grid": config.table_grid}
        return identity | {f"tiling.{k}": v for k, v in self.tiling.identity().items()}

    def pixels(self, pictures: list[Picture]) -> Views:
        """[views, H, W, 3] of all pictures in order, normalised, as `run` takes them; a list of
        [H, W, 3] where views differ in size."""
        views = [np.asarray(view) for p in pictures for view in p.views]
        if len({view.shape for view in views}) == 1:
            return self.normalise(views)
        return [self.normalise([view])[0] for view in views]

    def run(self, pixels: mx.array) -> mx.array:
        """Tower and pooling alone: [views, H, W, 3] -> [views, tokens, width]; differentiable."""
        x = self.vision(pixels)
        return mean2(x, self.config.grid) if self.pool == "mean2" else x

    def run_all(self, pixels: Views) -> Views:
        """`run` of what `pixels` gives; a list of [tokens, width] for a list."""
        if isinstance(pixels, mx.array):
            return self.run(pixels)
        return by_key(pixels, [view.shape for view in pixels], lambda same, _: self.run(same))

    def shape_of(self, size: tuple[int, ...]) -> tuple[int, int]:
        """[tokens, width] of what a view of [H, W, 3] gives."""
        whole = self._num_tokens(size) if self.config.takes_any_grid else self.tokens
        return whole, self.width

    def _num_tokens(self, size: tuple[int, ...]) -> int:
        """Tokens that the tower gives of a view of [H, W, 3]."""
        if not self.config.takes_any_grid:
            return self.config.num_tokens
        rows, columns = grid_of(size, self.config.patch_size)
        return max(1, rows * columns)

    def _cast(self) -> None:
        # Weights may have been loaded after this encoder was made.
        other = [
            (name, x.astype(self.dtype))
            for name, x in tensors_of(self.vision)
            if mx.issubdtype(x.dtype, mx.floating)
            and x.dtype != self.dtype
            and not is_adapter(name)  # those are masters in float32
        ]
        if other:
            self.vision.load_weights(other, strict=False)

    def _sha256(self) -> str:
        """Over name, shape, dtype and bytes of the tensors that feed the features, by name."""
        self._cast()
        used = [(n, x) for n, x in tensors_of(self.vision) if self.vision.feeds_features(n)]
        arrays = [x for _, x in used]
        # Loading or training puts new arrays in place of these, and then the digest is stale.
        if self._digest is None or not same_arrays(self._digest[0], arrays):
            self._digest = (arrays, digest_of(used))
        return self._digest[1]


def _check_view(view: np.ndarray) -> None:
    if view.dtype != np.uint8 and not np.issubdtype(view.dtype, np.floating):
        raise PictureError(f"views must be uint8 or float32, but one is {view.dtype}.")
    if view.ndim != 3 or view.shape[2] != 3:
        raise PictureError(f"views must be [H, W, 3], but one is {list(view.shape)}.")


def digest_of(tensors: Iterable[tuple[str, mx.array]]) -> str:
    """sha256 over each tensor's name, shape, dtype and bytes, in the order given."""
    digest = hashlib.sha256()
    for name, x in tensors:
        digest.update(f"{name} {list(x.shape)} {_name(x.dtype)}\n".encode())
        # NumPy has no bfloat16, and bits are what is asked for.
        bits = x.view({1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[x.itemsize])
        digest.update(np.ascontiguousarray(np.array(bits)).data)
    return digest.hexdigest()


def tensors_of(module: nn.Module) -> list[tuple[str, mx.array]]:
    """Every parameter of a module, sorted by name."""
    flat = tree_flatten(module.parameters())
    return sorted(((n, x) for n, x in flat if isinstance(x, mx.array)), key=lambda item: item[0])


def same_arrays(a: list[mx.array], b: list[mx.array]) -> bool:
    """Whether two lists hold the very same arrays."""
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
