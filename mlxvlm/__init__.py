"""mlxvlm: train, cache and talk to vision-language models on a Mac, with MLX.

The public face, imported lazily so that `mlxvlm --help` stays quick:

    load            a model from a folder or a hub id
    VLM             the model: encoder, projector, language model
    Picture         a picture as views
    Features        what the encoder makes of it
    EmbeddingCache  features on disk
    Reuse           what calls about one picture need not compute twice
    VLMError        every error that a user can mend
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import VLMError

if TYPE_CHECKING:
    from .cache import EmbeddingCache
    from .images.picture import Features, Picture
    from .model import VLM
    from .reuse import Reuse
    from .weights.load import load

__version__ = "0.1.0"
__all__ = [
    "VLM",
    "EmbeddingCache",
    "Features",
    "Picture",
    "Reuse",
    "VLMError",
    "__version__",
    "load",
]

_HOMES = {
    "load": "mlxvlm.weights.load",
    "VLM": "mlxvlm.model",
    "Picture": "mlxvlm.images.picture",
    "Features": "mlxvlm.images.picture",
    "EmbeddingCache": "mlxvlm.cache",
    "Reuse": "mlxvlm.reuse",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mlxvlm' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ImportError as error:
        from .backend import missing_backend

        message = missing_backend(error)
        if message is None:
            raise
        raise VLMError(message) from error
