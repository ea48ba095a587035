"""A JSON list read an element at a time: LLaVA's is a gigabyte of text, and five as objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK = 1 << 20
_SPACE = " \t\n\r"
_AFTER = (",", "]", *_SPACE)


def read_list(path: Path) -> Iterator[Any]:
    """The elements in order. ValueError (or RecursionError) where the file is not JSON.

    TypeError: it is JSON of another kind, or at least begins like it.
    """
    decode = json.JSONDecoder().raw_decode
    with path.open(encoding="utf-8-sig") as file:
        text = _Text(file)
        first = text.next()
        if first != "[":
            json.loads(text.rest())  # says what is wrong, if it is not JSON at all
            raise TypeError({"{": "dict", '"': "str"}.get(first, "number"))
        text.at += 1
        if text.next() != "]":
            while True:
                yield text.take(decode)
                mark = text.next()
                text.at += 1
                if mark == "]":
                    break
                if mark != ",":
                    raise ValueError(f"char {text.past + text.at - 1}: ',' or ']' is missing")
                text.next()
        else:
            text.at += 1
        if text.next():
            raise ValueError(f"char {text.past + text.at}: something follows the list")


class _Text:
    """Text that arrives in pieces. at: where in `held` reading is; past: characters dropped."""

    def __init__(self, file: Any):
        self.file = file
        self.held = ""
        self.at = self.past = 0
        self.ended = False

    def next(self) -> str:
        """The next character that is no space, which `at` is then on; empty at the end."""
        while True:
            while self.at < len(self.held) and self.held[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.held):
                return self.held[self.at]
            if not self.more(CHUNK):
                return ""

    def more(self, count: int) -> bool:
        """Takes in a further piece, and drops what is behind; whether there was one."""
        piece = self.file.read(count)
        self.past += self.at
        self.held, self.at = self.held[self.at :] + piece, 0
        self.ended = not piece
        return not self.ended

    def take(self, decode: Any) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, end = decode(self.held, self.at)
            except json.JSONDecodeError as error:
                if self.ended:
                    raise ValueError(f"char {self.past + error.pos}: {error.msg}") from None
                # Perhaps it goes on in the next piece. Twice as much each time, so that a long
                # value is not begun again too often.
                self.more(max(CHUNK, len(self.held)))
                continue
            # Half a number is a number too: it is whole if something else follows.
            if self.held[end : end + 1] in _AFTER or self.ended:
                self.at = end
                return value
            self.more(CHUNK)

    def rest(self) -> str:
        return self.held[self.at :] + self.file.read()
