"""Ids to text, one at a time, as they are generated.

A character may be spread over several tokens (an emoji is up to four byte tokens). Text comes out
as soon as its last byte is there and never earlier, so no half character is ever shown.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SENTENCEPIECE = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class Detokenizer:
    """`add(id)` gives the text that the id completes (perhaps ""), `finish()` what is left over.

    Byte-level and sentencepiece decoders are followed byte by byte; any other decoder by decoding
    a short window again and giving what is new. Control tokens give no text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._steps = _decoder_steps(tokenizer.backend)
        kinds = {step["type"] for step in self._steps}
        self._byte_level = kinds == {"ByteLevel"}
        self._by_bytes = self._byte_level or (bool(kinds) and kinds <= SENTENCEPIECE)
        self.reset()

    def reset(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = not self._byte_level and _strips_first_space(self._steps)
        self._window: list[int] = []
        self._given = 0

    def add(self, token_id: int) -> str:
        if not self._by_bytes:
            return self._add_to_window(int(token_id))
        data = self._token_bytes(int(token_id))
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """The rest: U+FFFD for a character whose bytes never all came."""
        if self._by_bytes:
            return self._utf8.decode(b"", final=True)
        rest = self._tokenizer.decode(self._window)[self._given :]
        self._window, self._given = [], 0
        return rest

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self._tokenizer.special_ids:
            return b""
        token = self._tokenizer.backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._tokenizer.added:
            return token.encode()
        if self._byte_level:
            return b"".join(
                bytes([BYTE_OF[c]]) if c in BYTE_OF else c.encode("utf-8") for c in token
            )
        byte = BYTE_TOKEN.fullmatch(token)
        if byte and any(step["type"] == "ByteFallback" for step in self._steps):
            return bytes([int(byte[1], 16)])
        for step in self._steps:
            if step["type"] == "Metaspace":
                token = token.replace(step.get("replacement", "▁"), " ")
            elif step["type"] == "Replace" and "String" in step["pattern"]:
                token = token.replace(step["pattern"]["String"], step["content"])
        return token.encode("utf-8")

    def _add_to_window(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        new = text[self._given :]
        if not new or (new.endswith("\ufffd") and len(self._window) < 16):
            return ""
        # Keep the last token as context: decoders join neighbours (spaces, word pieces).
        self._window = self._window[-1:]
        self._given = len(self._tokenizer.decode(self._window))
        return new


def _decoder_steps(backend: Any) -> list[dict[str, Any]]:
    """The decoder's steps, flat; empty where there is none."""
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return _flatten(state)


def _flatten(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    return [leaf for inner in step["decoders"] for leaf in _flatten(inner)]


def _strips_first_space(steps: list[dict[str, Any]]) -> bool:
    for step in steps:
        if step["type"] == "Strip" and step.get("content") == " " and step.get("start", 0):
            return True
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return True
    return False


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary, reversed.

    Printable Latin-1 stands for itself; the other bytes take the characters from U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    table = {chr(byte): byte for byte in plain}
    table.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return table


BYTE_OF = _byte_alphabet()
