"""Data sets of the hub: their parquet files, in huggingface_hub's cache.

    owner/name            the training split
    owner/name/part       of one of its parts, as they lie in folders
    owner/name:test       another split
    owner/name@revision   a branch, tag or commit

Where a repository has no parquet, the hub's own conversion is taken (branch refs/convert/parquet).
Nothing else of it is fetched, and none of its code is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import HubError

NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(?P<part>[\w.-]+(?:/[\w.-]+)*))?"
    r"(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.-]+))?"
)
FILES = (".json", ".jsonl", ".tar", ".parquet")
CONVERTED = "refs/convert/parquet"
SPLIT = "train"


def is_hub_data(name: str) -> bool:
    """Whether `name` is a data set of the hub, and no file or folder of this machine."""
    return bool(
        NAME.fullmatch(name) and not name.lower().endswith(FILES) and not Path(name).exists()
    )


def local_data(name: str, report: Callable[[Any], Any] | None = None) -> str:
    """Where the rows that `name` stands for lie here: itself, or what was fetched from the hub.

    report: called with a `Download` before anything is fetched. HubError.
    """
    if not is_hub_data(name):
        return name
    match = NAME.fullmatch(name)
    assert match is not None
    repo, part, revision, split = match.group("repo", "part", "revision", "split")
    refused: HubError | None = None
    for branch in [revision] if revision else [None, CONVERTED]:
        try:
            if found := _fetch(repo, branch, part, split, report):
                return found
        except HubError as error:
            # Without a network only one of the branches may be there.
            if branch != CONVERTED:
                refused = error
    raise refused or HubError(
        f"the data set {repo} has no .parquet files{f' in {part}' if part else ''}: download what "
        "it has and name that."
    )


def choose(names: list[str], repo: str, part: str | None, split: str | None) -> list[str]:
    """The files of one part and split, of all of a repository; none where it has no parquet."""
    files = [PurePosixPath(name) for name in names if name.endswith(".parquet")]
    if part:
        files = [f for f in files if f"/{f.parent}/".find(f"/{part}/") >= 0]
    if not files:
        return []
    wanted = [f for f in files if _split_of(f) == (split or SPLIT)]
    if not wanted and split:
        known = ", ".join(sorted({_split_of(f) for f in files}))
        raise HubError(f"{repo} has no split {split!r}; it has {known}.")
    wanted = wanted or files
    folders = sorted({str(f.parent) for f in wanted})
    if len(folders) > 1:
        few = ", ".join(f"{repo}/{folder}" for folder in folders[:5])
        raise HubError(f"{repo} has {len(folders)} parts: name one, such as {few}.")
    return sorted(map(str, wanted))


def _fetch(
    repo: str, revision: str | None, part: str | None, split: str | None, report: Any
) -> str | None:
    """A file, or a pattern of files; None where there is no parquet on this branch."""
    import huggingface_hub

    from ..weights.hub import fetch

    def snapshot(**options: Any) -> Any:
        patterns = options.pop("allow_patterns", ["*.parquet"])
        return huggingface_hub.snapshot_download(
            repo, repo_type="dataset", revision=revision, allow_patterns=patterns, **options
        )

    chosen: list[str] = []

    def select(names: list[str]) -> list[str]:
        chosen[:] = choose(names, repo, part, split)
        return chosen

    folder = fetch(repo, revision, snapshot, select, report, page=f"datasets/{repo}")
    return str(folder / _pattern(chosen)) if chosen else None


def _pattern(files: list[str]) -> str:
    """One file, or what matches these and no other split's beside them."""
    if len(files) == 1:
        return files[0]
    first = PurePosixPath(files[0])
    head = re.match(r"[^\d]*", first.name)
    return str(first.parent / f"{head[0] if head else ''}*.parquet")


def _split_of(file: PurePosixPath) -> str:
    """train-00000-of-00010.parquet, train.parquet, default/train/0000.parquet: "train"."""
    stem = re.sub(r"-\d+(-of-\d+)?(-[0-9a-f]{16})?$", "", file.stem)
    return file.parent.name if stem.isdigit() else stem
