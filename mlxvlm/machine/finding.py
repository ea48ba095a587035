"""What `mlxvlm doctor` says of one thing."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, WRONG, UNCHECKED = LEVELS = ("ok", "note", "wrong", "not checked")


@dataclass
class Finding:
    """level: "ok"; "note": it works, and could do better; "wrong": something will fail, or give
    wrong numbers; "not checked". remedy: what to do about it, empty where there is nothing to do;
    further lines of it are commands.
    """

    area: str
    name: str
    level: str
    says: str
    remedy: str = ""
