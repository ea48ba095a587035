"""From a path or a hub id to a local folder. Nothing here runs a repository's code."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxvlm.amount import amount
from mlxvlm.errors import HubError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# xtuner_config.py is read as text.
ALLOW = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "xtuner_config.py"]
# The only folders of a repository that hold parts of a model begin so: XTuner's.
PARTS = ("llm", "projector", "visual_encoder")


def _other_folders() -> list[str]:
    """Patterns of all files that lie in a folder which does not begin as PARTS do."""
    stems = {name[:end] for name in PARTS for end in range(len(name))}
    after = {s: "".join(sorted({n[len(s)] for n in PARTS if n.startswith(s)})) for s in stems}
    longer = sorted(f"{stem}[!{after[stem]}]*/*" for stem in stems)
    return ["*/*/*", *longer, *sorted(f"{stem}/*" for stem in stems if stem)]


# Other formats of the same weights, and files of tools, lie in folders of their own.
IGNORE = [*_other_folders(), "consolidated*", "adapters.safetensors"]
# One of these is in every model's repository.
CONFIGS = ("config.json", "projector/config.json")
# What a download must leave free on the disk.
SPARE = 1 << 30


@dataclass
class Download:
    """What is about to be fetched: told to `report` before the first byte."""

    repo: str
    files: int
    bytes: int
    free: int
    folder: Path

    def __str__(self) -> str:
        return (
            f"{self.repo}: downloading {self.files} files, {amount(self.bytes)} "
            f"({amount(self.free)} free on the disk of {self.folder})"
        )


def resolve(
    path_or_id: str | Path,
    revision: str | None = None,
    report: Callable[[Download], Any] | None = None,
) -> Path:
    """The folder of a checkpoint: a local one as it is, a hub id through huggingface_hub's cache.

    revision: a branch, tag or commit of the hub. report: called before a download with what it
    will fetch. With HF_HUB_OFFLINE=1, or no network, the cache alone answers.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        if revision is not None:
            raise HubError(
                f"{path} is a local folder, so it has no revision {revision!r}: leave it out."
            )
        return path
    if path.exists():
        raise HubError(f"{path} is a file; give the folder that holds config.json.")
    name = str(path_or_id)
    if isinstance(path_or_id, Path) or not HUB_ID.fullmatch(name):
        raise HubError(
            f"{name!r} is neither an existing folder nor a hub id such as "
            "'google/siglip-so400m-patch14-384'."
        )
    return _from_hub(name, revision, report)


def resolve_outline(
    path_or_id: str | Path, revision: str | None = None
) -> tuple[Path, dict[str, dict[str, Any]] | None]:
    """As `resolve`, but of a hub model that is not here only the small files are fetched.

    Then the second value holds the headers of its tensors' files: file -> header, as safetensors
    has it; where the tensors are here it is None.
    """
    if Path(path_or_id).expanduser().exists() or not HUB_ID.fullmatch(str(path_or_id)):
        return resolve(path_or_id, revision), None
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo = str(path_or_id)
    options: dict[str, Any] = {"allow_patterns": ALLOW, "ignore_patterns": IGNORE}
    try:
        cached = huggingface_hub.snapshot_download(
            repo, revision=revision, local_files_only=True, **options
        )
        if any(Path(cached).rglob("*.safetensors")):
            return Path(cached), None
    except (LocalEntryNotFoundError, OSError, ValueError):
        pass
    folder = _from_hub(repo, revision, None, tensors=False)
    try:
        found = huggingface_hub.get_safetensors_metadata(repo, revision=revision)
    except Exception as error:
        known = isinstance(error, (ValueError, OSError)) or _is_network(error)
        if not known and "safetensors" not in str(error).lower():
            raise
        raise HubError(
            f"the headers of {repo}'s tensors cannot be had ({_line(error)}): download the model "
            "first, or give the path of a folder that has it."
        ) from None
    return folder, {
        name: {
            "__metadata__": dict(file.metadata or {}),
            **{key: {"shape": t.shape, "dtype": t.dtype} for key, t in file.tensors.items()},
        }
        for name, file in found.files_metadata.items()
    }


def _from_hub(
    repo: str,
    revision: str | None,
    report: Callable[[Download], Any] | None,
    tensors: bool = True,
) -> Path:
    import huggingface_hub

    def snapshot(**options: Any) -> Any:
        return huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            **{"allow_patterns": ALLOW, "ignore_patterns": IGNORE} | options,
        )

    def select(names: list[str]) -> list[str] | None:
        if not any(name.endswith(".safetensors") for name in names):
            folder = repo.split("/")[-1]
            raise HubError(
                f"{repo} has no .safetensors files. Weights in other formats (pickles such as .bin "
                "and .pt can run code when opened) are never loaded: choose another repository, or "
                f"fetch it (hf download {repo} --local-dir {folder}) and give that folder, "
                "to be shown the command that converts it."
            )
        return None if tensors else [name for name in names if not name.endswith(".safetensors")]

    return fetch(repo, revision, snapshot, select, report, needs=CONFIGS)


def fetch(
    repo: str,
    revision: str | None,
    snapshot: Callable[..., Any],
    select: Callable[[list[str]], list[str] | None],
    report: Callable[[Download], Any] | None = None,
    page: str | None = None,
    needs: tuple[str, ...] = (),
) -> Path:
    """The folder of a repository in huggingface_hub's cache, fetched first if that is needed.

    snapshot: huggingface_hub.snapshot_download, but for its further options. select: of the names
    of the files that there are, those to fetch (none: nothing is), or None for all. page: its path
    on huggingface.co. needs: files, without one of which what is cached counts for nothing.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def cached(why: str) -> Path:
        return _cached(repo, revision, snapshot, select, needs, why)

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if offline or constants.HF_HUB_OFFLINE:
        return cached("HF_HUB_OFFLINE is set")
    try:
        plan = snapshot(dry_run=True)
        chosen = select([file.filename for file in plan])
        if chosen is not None:
            plan = [file for file in plan if file.filename in set(chosen)]
        _check_room(repo, plan, Path(constants.HF_HUB_CACHE), report)
        if chosen == []:
            return Path(constants.HF_HUB_CACHE)
        return Path(snapshot() if chosen is None else snapshot(allow_patterns=chosen))
    except GatedRepoError:
        raise HubError(
            f"{repo} is gated: its owner asks you to accept terms first. Open "
            f"https://huggingface.co/{page or repo}, accept them, make a token at "
            "https://huggingface.co/settings/tokens, run `hf auth login`, and try again."
        ) from None
    except RevisionNotFoundError:
        raise HubError(
            f"{repo} has no revision {revision!r}; leave it out for the newest."
        ) from None
    except RepositoryNotFoundError:
        raise HubError(
            f"there is no folder {repo!r} here, and the hub has no such repository, or it is "
            "private: check the spelling, or run `hf auth login` with an account that may read it."
        ) from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        return cached(f"the hub cannot be reached ({_line(error)})")
    except HfHubHTTPError as error:
        raise HubError(f"the hub refused {repo}: {_line(error)}") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise HubError(
                f"the disk of {constants.HF_HUB_CACHE} is full. Free some space and try again: "
                "what was downloaded is kept. HF_HOME names another folder."
            ) from None
        if error.errno is not None and error.filename:  # a disk's error, not the network's
            raise
        return cached(f"the hub cannot be reached ({_line(error)})")
    except Exception as error:
        # The hub's HTTP library has errors of its own, which are neither OSError nor public names.
        if not _is_network(error):
            raise
        return cached(f"the hub cannot be reached ({_line(error)})")


def _check_room(
    repo: str, plan: list[Any], cache: Path, report: Callable[[Download], Any] | None
) -> None:
    """Before a download: is there room for it?"""
    todo = [file for file in plan if file.will_download]
    if not todo:
        return
    disk = cache
    while not disk.exists() and disk != disk.parent:
        disk = disk.parent
    needed = sum(file.file_size or 0 for file in todo)
    download = Download(repo, len(todo), needed, shutil.disk_usage(disk).free, cache)
    if needed + SPARE > download.free:
        raise HubError(
            f"{repo} needs {amount(needed)}, but only {amount(download.free)} are free on the "
            f"disk of {cache}. Free some, or set HF_HOME to a folder on a larger disk."
        )
    if report is not None:
        report(download)


def _cached(
    repo: str,
    revision: str | None,
    snapshot: Callable[..., Any],
    select: Callable[[list[str]], list[str] | None],
    needs: tuple[str, ...],
    why: str,
) -> Path:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot(local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        folder = None
    whole = folder is not None and (
        any((folder / name).is_file() for name in needs)
        if needs
        else select([p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()])
    )
    if folder is None or not whole:
        at = "" if revision is None else f" at revision {revision!r}"
        raise HubError(
            f"{why}, and {repo}{at} is not in the local cache. Go online once, or give the path of "
            "a folder that has it."
        )
    return folder


def _is_network(error: Exception) -> bool:
    kinds = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    return any(kind.startswith(("httpx", "requests.", "urllib3.", "httpcore")) for kind in kinds)


def _line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
