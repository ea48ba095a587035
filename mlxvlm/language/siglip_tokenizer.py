"""SigLIP's texts as ids: put in plain form, ended, and padded to the tower's length."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..config import read_json
from ..errors import ConfigError
from .tokenizer import Tokenizer

PUNCTUATION = str.maketrans("", "", string.punctuation)


class SiglipTokenizer:
    """texts -> int32 [T, length].

    Texts are lower-cased. SigLIP 1 was trained without punctuation and with single spaces; SigLIP
    2, whose tokenizer is Gemma's, with both as they are. A long text is cut and keeps its end.
    """

    def __init__(
        self, tokenizer: Tokenizer, length: int, eos_id: int, pad_id: int, plain: bool = True
    ):
        self.tokenizer = tokenizer
        self.length = length
        self.eos_id, self.pad_id = eos_id, pad_id
        self.plain = plain

    @classmethod
    def load(cls, folder: str | Path, length: int = 64) -> SiglipTokenizer:
        folder = Path(folder)
        tokenizer = Tokenizer.load(folder)
        path = folder / "tokenizer_config.json"
        kind = str(read_json(path).get("tokenizer_class", "")) if path.exists() else ""
        gemma = "Gemma" in kind or "Siglip2" in kind
        ids = []
        for name, fallback in (
            ("eos_token", "<eos>" if gemma else "</s>"),
            ("pad_token", "<pad>" if gemma else "</s>"),
        ):
            token = tokenizer.special_tokens.get(name, fallback)
            number = tokenizer.id(token)
            if number is None:
                raise ConfigError(
                    f"{folder}'s tokenizer has no {token!r}, which SigLIP's texts need."
                )
            ids.append(number)
        return cls(tokenizer, length, *ids, plain=not gemma)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        out = np.full((len(texts), self.length), self.pad_id, np.int32)
        for row, text in enumerate(texts):
            ids = self.tokenizer.encode(self.canonical(text))[0][: self.length - 1]
            out[row, : len(ids) + 1] = [*ids, self.eos_id]
        return out

    def canonical(self, text: str) -> str:
        """The text as the tower was trained to see it."""
        text = text.lower()
        if not self.plain:
            return text
        return re.sub(r"\s+", " ", text.translate(PUNCTUATION)).strip()
