"""Where models come from and where they go: the disk, and the hub."""

from __future__ import annotations

import os
import shutil
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from ..amount import amount
from .finding import NOTE, OK, WRONG, Finding
from .sync import warning as synced

DISK, HUB = "Disk", "Hub"
# A download must leave a GiB free (`weights.hub`); the second is a small model and its features.
LEAST_FREE, FEW_FREE = 2**30, 10 * 10**9
# Seconds that the hub has to answer.
PATIENCE = 3.0


def disks(folders: dict[str, Path]) -> list[Finding]:
    """Room where models, and where caches and results go; folders: name -> one that may not be
    there yet."""
    return [_disk(name, folder) for name, folder in folders.items()]


def _disk(name: str, folder: Path) -> Finding:
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    says = f"{amount(free)} free for {folder}"
    if not os.access(there, os.W_OK):
        remedy = f"{there} cannot be written to: change its owner, or name another folder"
        return Finding(DISK, name, WRONG, says, f"{remedy}{_how(name)}.")
    if free < LEAST_FREE:
        remedy = f"Free some of that disk, or name a folder on another{_how(name)}."
        return Finding(DISK, name, WRONG, says, remedy)
    if warning := synced(there):
        return Finding(DISK, name, NOTE, says, f"{warning[0].upper()}{warning[1:]}")
    if free < FEW_FREE:
        remedy = "Enough for a small model alone: free some, or name a folder on another disk"
        return Finding(DISK, name, NOTE, says, f"{remedy}{_how(name)}.")
    return Finding(DISK, name, OK, says)


def _how(name: str) -> str:
    return " (HF_HOME)" if name == "models" else ""


class Hub:
    """Asks the hub for a sign of life, in a thread of its own from the start on: looking up a name
    may take longer than anyone waits."""

    def __init__(self) -> None:
        from huggingface_hub import constants

        self.home, self.endpoint = constants.HF_HOME, constants.ENDPOINT
        self.offline = constants.HF_HUB_OFFLINE
        self.answer = ""
        self.started = time.monotonic()
        self.thread = threading.Thread(target=self._ask, daemon=True)
        if not self.offline:
            self.thread.start()

    def _ask(self) -> None:
        request = urllib.request.Request(self.endpoint, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE):
                pass
        except urllib.error.HTTPError:
            pass  # it answered, if not with a page
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            self.answer = getattr(reason, "strerror", None) or str(reason)
            return
        self.answer = "reached"

    def findings(self) -> list[Finding]:
        """What can be had of the hub; waits for its answer."""
        from huggingface_hub import get_token

        home = "HF_HOME" if "HF_HOME" in os.environ else "HF_HOME is not set: the default"
        found = [Finding(HUB, "folder", OK, f"{self.home} ({home})"), self._reach()]
        if get_token():
            found.append(Finding(HUB, "account", OK, "a token is there, for gated models"))
        else:
            says = "no token: open models alone, which is enough for most"
            remedy = "For gated models, such as Llama's:\nhf auth login"
            found.append(Finding(HUB, "account", OK, says, remedy))
        return found

    def _reach(self) -> Finding:
        if self.offline:
            says = "not asked, since HF_HUB_OFFLINE is set: models that are here work"
            return Finding(HUB, "reach", OK, says, "To download others, unset it.")
        self.thread.join(max(0.0, PATIENCE - (time.monotonic() - self.started)))
        if self.answer == "reached":
            return Finding(HUB, "reach", OK, f"{self.endpoint} answers")
        why = self.answer or f"no answer in {PATIENCE:g} s"
        says = f"offline ({why}): models that are here work"
        return Finding(HUB, "reach", NOTE, says, "Go online to download others.")
