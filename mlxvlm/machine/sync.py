"""Folders that macOS may copy to iCloud, and take off the disk again."""

from __future__ import annotations

import sys
from pathlib import Path

SYNCED = ("Library/Mobile Documents", "Desktop", "Documents")


def warning(folder: Path) -> str | None:
    """What to tell someone who puts something large into a synced folder of a Mac."""
    if sys.platform != "darwin":
        return None
    home = Path.home().resolve()
    for name in SYNCED:
        if folder.resolve().is_relative_to(home / name):
            return (
                f"{folder} is in ~/{name}, which iCloud may copy, and take off this disk while it "
                "is read: name a folder elsewhere, such as ~/Library/Caches/mlxvlm."
            )
    return None
