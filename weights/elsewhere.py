"""Parts that a checkpoint's folder leaves out: found where it says, or where the user does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mlxvlm.errors import ConfigError, HubError

Part = Literal["language", "vision"]
NAMES = {"language": "language model", "vision": "vision tower"}


@dataclass
class Elsewhere:
    """resolve: from a hub id or a path to a folder. language, vision: what the user names.

    Whoever has found them asks `check` whether all that was named was wanted.
    """

    resolve: Callable[[str], Path]
    language: str | None = None
    vision: str | None = None
    used: set[Part] = field(default_factory=set)

    def find(self, part: Part, named: object, folder: Path) -> Path:
        """The folder of a part of the checkpoint in `folder`; named: what that says it is."""
        if own := self.named(part):
            self.used.add(part)
            return self.resolve(own)
        way_out = (
            f"Name it: --{part} FOLDER_OR_REPO, in chat, fuse and convert; what mlxvlm convert "
            "writes is whole, for the other commands."
        )
        if not isinstance(named, str) or not named:
            raise ConfigError(
                f"{folder} holds no {NAMES[part]}, and does not say which one it belongs to. "
                + way_out
            )
        try:
            return self.resolve(named)
        except HubError as error:
            raise HubError(
                f"{folder} holds no {NAMES[part]}, and the one that it names cannot be had: "
                f"{error} {way_out}"
            ) from None

    def named(self, part: Part) -> str | None:
        return self.language if part == "language" else self.vision

    def check(self, folder: Path) -> None:
        for part in ("language", "vision"):
            if self.named(part) and part not in self.used:
                raise ConfigError(
                    f"{folder} holds a {NAMES[part]} of its own: leave --{part} out. (mlxvlm build "
                    "joins a tower and a language model anew.)"
                )
