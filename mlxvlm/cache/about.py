"""cache.json: what these features are. Two caches that agree in it may share shards.

format_version   of everything in the folder
codec            how features became bytes
batch_size       how many pictures were encoded at once: the last bits of floats depend on it
shard_pictures   how many names of the input a shard accounts for
encoder          the encoder's identity: tensors, layer, dtype, preprocessing, tiling, pool
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import TilingConfig
from ..durable import write_whole
from ..errors import CacheError
from .format import SHARDS, canonical, list_shards, read_header

FORMAT_VERSION = 1
CACHE_JSON = "cache.json"


def read_about(folder: Path) -> dict[str, Any]:
    """cache.json; where it is lost or unreadable, what a sound shard repeats of it."""
    path = folder / CACHE_JSON
    about = _read_json(path)
    if about is not None:
        return check_version(about, path)
    shards = [folder / SHARDS / name for name in list_shards(folder).values()]
    for shard in shards:
        try:
            header = read_header(shard)
        except CacheError:
            continue
        return check_version(header.about, shard)
    if path.exists() or shards:
        raise CacheError(
            f"{path} cannot be read, and there is no sound shard to rebuild it from: delete "
            f"{folder} and make the cache again."
        )
    raise CacheError(
        f"{folder} holds no embedding cache: make one with "
        "`mlxvlm cache-embeddings DATA --out DIR`."
    )


def tiling_of(about: dict[str, Any]) -> TilingConfig | None:
    """The tiling of the encoder that made a cache, as far as its features depend on it."""
    mark = "tiling."
    fields = {k.removeprefix(mark): v for k, v in about["encoder"].items() if k.startswith(mark)}
    return TilingConfig(**fields) if fields else None


def is_cache_json(folder: Path) -> bool:
    """Whether cache.json is there and readable."""
    return _read_json(folder / CACHE_JSON) is not None


def check_version(about: dict[str, Any], path: Path) -> dict[str, Any]:
    version = about.get("format_version")
    if version != FORMAT_VERSION:
        raise CacheError(
            f"format_version must be {FORMAT_VERSION}, but {path} says {version!r}: "
            "use the mlxvlm release that wrote it, or make the cache again in another folder."
        )
    return about


def write_about(folder: Path, about: dict[str, Any]) -> None:
    write_whole(folder / CACHE_JSON, (json.dumps(about, indent=2, sort_keys=True) + "\n").encode())


def differences(
    a: dict[str, Any], b: dict[str, Any], where_a: str = "in the cache", where_b: str = "here"
) -> list[str]:
    """`field (1 in the cache, 2 here)` for every field in which two descriptions differ."""
    a, b = _flat(a), _flat(b)
    return [
        f"{key} ({canonical(a.get(key))} {where_a}, {canonical(b.get(key))} {where_b})"
        for key in sorted(set(a) | set(b))
        if a.get(key) != b.get(key)
    ]


def plain(value: Any) -> Any:
    """A value as JSON would give it back."""
    return json.loads(json.dumps(value))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None  # ValueError: not JSON, or not UTF-8
    return about if isinstance(about, dict) and "format_version" in about else None


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            out.update(_flat(item, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = item
    return out
