"""Prefixes on disk: what a decoder read in one run, it need not read again in the next.

    DIR/<model>/<segment>.safetensors

A prefix is a chain of segments, each with the keys and values of its own tokens alone and the name
of the one before, so that a turn writes what is new, and conversations about one picture share it.
Layers that keep something else (windows, recurrent state) are in each segment as they stood at its
end. <model> is a digest of configuration and weights; a segment's name is one of all tokens,
pictures and settings up to its end. Files are written beside, synced and renamed: a reader sees
each whole or not at all, and its checksums tell a damaged one, which is deleted as if it had never
been. Several processes may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from .durable import PARTIAL, publish, sync_path
from .errors import CacheError
from .fingerprint import fingerprint
from .language.kv import KVSettings, State, cut, is_free, pack, unpack
from .prefixes import Place, agreement

if TYPE_CHECKING:
    from .model import VLM

FORMAT = 1
LIMIT = 10 * 10**9
# Shorter ones are read again more quickly than a file is opened and synced.
SHORTEST = 16
STALE_SECONDS = 3600
_MODEL = re.compile(r"[0-9a-f]{16}")
_SEGMENT = re.compile(r"[0-9a-f]{32}\.safetensors")


@dataclass
class Segment:
    """A file: tokens [start, end) of the prefix whose tokens [end] and places these are."""

    key: str
    parent: str
    start: int
    tokens: np.ndarray
    places: list[Place]
    kv: KVSettings

    def __len__(self) -> int:
        return len(self.tokens)


class PromptCache:
    """The prefixes of one model in a folder of at most `limit` bytes, those used last.

    problem: why the last prefix could not be written, or "".
    """

    def __init__(self, folder: str | Path, limit: int = LIMIT):
        self.folder = Path(folder)
        self.limit = limit
        self.problem = ""
        self._home = self.folder
        self._segments: dict[str, Segment] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"{folder} cannot be a folder of prompts: {error}.") from None

    def bind(self, vlm: VLM) -> None:
        """Turns to the prefixes of a model as it is now."""
        from .language.load import mlx_lm_version

        about = [FORMAT, mlx_lm_version(), vlm.config.to_dict(), fingerprint(vlm)]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self._home = self.folder / digest[:16]
        self._segments = {}
        self._tidy()
        heads = {path.stem: _head(path) for path in _files(self._home)}
        while True:  # parents before children, as often as there are links
            ready = [
                (key, head)
                for key, head in heads.items()
                if head and (not head["parent"] or head["parent"] in self._segments)
            ]
            if not ready:
                return
            for key, head in ready:
                self._add(key, head)
                del heads[key]

    def take(
        self, tokens: np.ndarray, places: list[Place], kv: KVSettings, most: int, least: int
    ) -> tuple[list[Any], int] | None:
        """As `Prefixes.take`; None unless more than `least` tokens are known."""
        while True:
            agreed = [
                (min(agreement(segment, tokens, places), most), len(segment), key)
                for key, segment in self._segments.items()
                if segment.kv == kv
            ]
            # Of those that agree as far, the shortest: less is read from the disk.
            for shared, length, key in sorted(agreed, key=lambda found: (-found[0], found[1])):
                if shared <= least:
                    return None
                caches = self._load(key)
                if caches is None:
                    break  # it is gone, and what hung on it: look again
                found = caches if shared == length else cut(caches, length, shared)
                if found is not None:
                    return found, shared
            else:
                return None

    def put(
        self,
        tokens: np.ndarray,
        places: list[Place],
        kv: KVSettings,
        caches: list[Any],
        ends: Sequence[int] = (),
    ) -> None:
        """Writes what is new of a state after `tokens`, cut at `ends` where it can be."""
        parent = max(
            (s for s in self._segments.values() if s.kv == kv and _begins(s, tokens, places)),
            key=len,
            default=None,
        )
        start, before = (len(parent), parent.key) if parent else (0, "")
        stops = [end for end in ends if is_free(caches) and end - start >= SHORTEST]
        stops = [end for end in sorted(stops) if len(tokens) - end >= SHORTEST]
        if len(tokens) - start < SHORTEST:
            self._touch(before)
            return
        try:
            for end in [*stops, len(tokens)]:
                before = self._write(before, start, tokens[:end], places, kv, caches)
                start = end
            self._evict()
            self.problem = ""
        except OSError as error:
            self.problem = f"the prompt could not be kept in {self.folder}: {error}."

    # Inside

    def _write(
        self,
        parent: str,
        start: int,
        tokens: np.ndarray,
        places: list[Place],
        kv: KVSettings,
        caches: list[Any],
    ) -> str:
        places = [place for place in places if place[0] < len(tokens)]
        head = {
            "parent": parent,
            "start": start,
            "end": len(tokens),
            "tokens": tokens[start:].tolist(),
            "places": [place for place in places if place[0] >= start],
            "kv": asdict(kv),
        }
        key = _name(head)
        state = pack(caches, start, len(tokens))
        mx.eval(list(state.arrays.values()))
        head |= {"layers": state.layers, "crc32": _sums(state.arrays)}
        head["check"] = _check(head)
        self._home.mkdir(exist_ok=True)
        path = self._home / f"{key}.safetensors"
        partial = path.with_name(f"{key}.{os.getpid()}{PARTIAL}.safetensors")
        try:
            mx.save_safetensors(str(partial), state.arrays, {"prefix": json.dumps(head)})
            sync_path(partial)
            publish(partial, path)
        except RuntimeError as error:  # MLX's word for a failed write
            partial.unlink(missing_ok=True)
            raise OSError(str(error)) from None
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        self._add(key, head)
        return key

    def _add(self, key: str, head: dict[str, Any]) -> None:
        before = self._segments.get(head["parent"])
        tokens = np.array(head["tokens"], np.int32)
        places: list[Place] = [(start, content) for start, content in head["places"]]
        if before is not None:
            tokens = np.concatenate([before.tokens, tokens])
            places = [*before.places, *places]
        kv = KVSettings(**head["kv"])
        self._segments[key] = Segment(key, head["parent"], head["start"], tokens, places, kv)

    def _chain(self, key: str) -> list[str]:
        keys: list[str] = []
        while key:
            keys.insert(0, key)
            key = self._segments[key].parent
        return keys

    def _load(self, key: str) -> list[Any] | None:
        """The caches after a segment; None where a file is gone or damaged, which is forgotten."""
        states = []
        for link in self._chain(key):
            path = self._home / f"{link}.safetensors"
            state = _read(path)
            if state is None:
                path.unlink(missing_ok=True)
                self._forget(link)
                return None
            states.append(state)
        self._touch(key)
        return unpack(states, len(self._segments[key]))

    def _forget(self, key: str) -> None:
        gone = [other for other in self._segments if key in self._chain(other)]
        for other in gone:
            del self._segments[other]

    def _touch(self, key: str) -> None:
        for link in self._chain(key):
            try:
                os.utime(self._home / f"{link}.safetensors")
            except OSError:
                pass  # another process may have dropped it

    def _evict(self) -> None:
        """Deletes what was used longest ago, of any model, until the rest is within the limit."""
        found = []
        for home in self.folder.iterdir():
            if not _MODEL.fullmatch(home.name):
                continue
            for path in _files(home):
                try:
                    about = path.stat()
                except OSError:
                    continue
                # A chain is touched as one; its last segments go before its first.
                length = len(self._segments.get(path.stem, ()))
                found.append((int(about.st_mtime), -length, about.st_size, path))
        total = sum(size for *_, size, _ in found)
        for *_, size, path in sorted(found):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size
            if path.parent == self._home:
                self._forget(path.stem)

    def _tidy(self) -> None:
        """Removes what a killed process left half-written."""
        for partial in self.folder.glob(f"*/*{PARTIAL}.safetensors"):
            try:
                if time.time() - partial.stat().st_mtime > STALE_SECONDS:
                    partial.unlink()
            except OSError:
                pass


def _files(home: Path) -> list[Path]:
    try:
        return [home / name for name in os.listdir(home) if _SEGMENT.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _head(path: Path) -> dict[str, Any] | None:
    """What a segment says of itself; None for a file that is none."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > os.fstat(file.fileno()).st_size:
                return None
            header = json.loads(file.read(size))
        head = json.loads(header["__metadata__"]["prefix"])
        sound = head.pop("check") == _check(head) and _name(head) == path.stem
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return head if sound else None


def _name(head: dict[str, Any]) -> str:
    """A segment's name, by what it holds."""
    about = [head[name] for name in ("parent", "start", "end", "tokens", "places", "kv")]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def _check(head: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(head, sort_keys=True).encode())


def _read(path: Path) -> State | None:
    head = _head(path)
    if head is None:
        return None
    try:
        arrays: Any = mx.load(str(path))
        if _sums(arrays) != head["crc32"]:
            return None
    except (RuntimeError, OSError, ValueError, KeyError):
        return None
    return State(head["layers"], arrays)


def _sums(arrays: dict[str, mx.array]) -> dict[str, int]:
    return {name: zlib.crc32(_bytes(array)) for name, array in arrays.items()}


def _bytes(array: mx.array) -> Any:
    flat = mx.contiguous(array).reshape(-1).view(mx.uint8)
    return np.array(flat).data


def _begins(segment: Segment, tokens: np.ndarray, places: list[Place]) -> bool:
    return agreement(segment, tokens, places) == len(segment) <= len(tokens)
