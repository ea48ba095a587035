"""How well texts fit pictures, as SigLIP sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from .config import TilingConfig
from .vision.encoder import Encoder
from .vision.siglip import Siglip

if TYPE_CHECKING:
    from .language.siglip_tokenizer import SiglipTokenizer


def score(
    siglip: Siglip,
    tokenizer: SiglipTokenizer,
    tiling: TilingConfig,
    images: Sequence[Any],
    texts: Sequence[str],
    allow_urls: bool = False,
) -> np.ndarray:
    """float32 [images, texts]: the probability that a text fits a picture.

    Each pair is judged by itself: a row need not sum to 1. The first three arguments are what
    `weights.load.load_siglip` returns.
    """
    tower = siglip.vision_model
    weight = tower.embeddings.patch_embedding.weight
    encoder = Encoder(tower, tower.config, tiling, dtype=weight.dtype)
    views = [p.views[0] for p in encoder.look(images, allow_urls=allow_urls)]
    ids = mx.array(tokenizer(texts))
    return np.array(siglip.scores(encoder.normalise(views), ids))
