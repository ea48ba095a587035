"""Pictures that rows name by an http(s) address, fetched once where that is asked for.

What is fetched stays in a folder of the user's cache (MLXVLM_CACHE, by default ~/.cache/mlxvlm),
by the sha256 of the address, written beside and renamed. Nothing else of a row ever reaches the
network.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ..errors import PictureError
from ..images.fetch import fetch

AT_ONCE = 16

_failed: dict[str, str] = {}
_lock = threading.Lock()


def is_url(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def fetch_all(names: Iterable[str]) -> None:
    """`local` for every address among names, several at once; one that fails fails again there."""

    def fetch_one(url: str) -> None:
        with suppress(PictureError):
            local(url)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(fetch_one, dict.fromkeys(name for name in names if is_url(name))))


def local(url: str) -> Path:
    """The file that holds what `url` does, fetched if it is not there. PictureError.

    An address that failed is not asked again in this process. Safe in threads.
    """
    path = _folder() / hashlib.sha256(url.encode()).hexdigest()
    if path.is_file():
        return path
    with _lock:
        reason = _failed.get(url)
    if reason is not None:
        raise PictureError(reason)
    try:
        data = fetch(url)
    except PictureError as error:
        with _lock:
            _failed[url] = str(error)
        raise
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)
    return path


def _folder() -> Path:
    home = os.environ.get("MLXVLM_CACHE") or Path.home() / ".cache" / "mlxvlm"
    return Path(home) / "pictures"
