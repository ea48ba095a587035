"""hub.py: a path or a hub id to a folder, with huggingface_hub stood in for."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from mlxvlm.errors import HubError
from mlxvlm.weights.hub import ALLOW, IGNORE, Download, resolve

REPO = "someone/model"


def file(name: str, count: int, cached: bool = False) -> SimpleNamespace:
    return SimpleNamespace(filename=name, file_size=count, will_download=not cached)


FILES = [file("config.json", 100), file("model.safetensors", 5_000_000)]


class Hub:
    """What snapshot_download does: a plan, an error, or a folder; and how it was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path):
        self.calls: list[dict[str, Any]] = []
        self.plan: list[Any] = FILES
        self.error: Callable[[dict[str, Any]], Exception | None] = lambda _: None
        self.folder = folder
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "not" / "made" / "yet"))

    def __call__(self, repo: str, **options: Any) -> Any:
        self.calls.append({"repo": repo, **options})
        if error := self.error(options):
            raise error
        return self.plan if options.get("dry_run") else str(self.folder)

    def fails(self, error: Exception, cached: bool = False) -> None:
        def raise_for(options: dict[str, Any]) -> Exception | None:
            if not options.get("local_files_only"):
                return error
            return None if cached else hub_errors.LocalEntryNotFoundError("no")

        self.error = raise_for


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    (tmp_path / "config.json").write_text("{}")
    return Hub(monkeypatch, tmp_path)


def http(kind: type[Exception]) -> Exception:
    """A hub error of its own class, without the response that its constructor wants."""
    error = kind.__new__(kind)
    error.args = ("401 Client Error",)
    return error


def test_local_folder(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(HubError, match="no revision"):
        resolve(tmp_path, revision="main")
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(HubError, match="is a file"):
        resolve(tmp_path / "x.safetensors")
    for name in ("./nowhere", "nowhere", "/a/b/c", tmp_path / "nowhere"):
        with pytest.raises(HubError, match="neither an existing folder nor a hub id"):
            resolve(name)


def test_download_is_told_before_it_starts(hub: Hub) -> None:
    told: list[Download] = []

    def report(download: Download) -> None:
        assert len(hub.calls) == 1  # the plan alone
        told.append(download)

    assert resolve(REPO, revision="v1", report=report) == hub.folder
    assert (told[0].repo, told[0].files, told[0].bytes) == (REPO, 2, 5_000_100)
    assert "2 files, 5 MB" in str(told[0])
    for call in hub.calls:
        assert call["revision"] == "v1"
        assert call["allow_patterns"] == ALLOW and call["ignore_patterns"] == IGNORE
    assert not any("bin" in pattern or "*.py" in pattern for pattern in ALLOW)


def test_what_is_fetched_of_a_repository() -> None:
    """Its own files, and of folders XTuner's alone."""
    from huggingface_hub.utils import filter_repo_objects

    wanted = {
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.model",
        "xtuner_config.py",
        "projector/config.json",
        "projector/model.safetensors",
        "llm/model.safetensors",
        "llm_adapter/adapter_model.safetensors",
        "visual_encoder/preprocessor_config.json",
        "visual_encoder_adapter/adapter_config.json",
    }
    others = {
        "modeling_llava.py",
        "pytorch_model.bin",
        "projector/modeling_projector.py",
        "projector/pytorch_model.bin",
        "onnx/config.json",
        "original/params.json",
        "language/config.json",
        "pytorch/config.json",
        "vision/config.json",
        "vit/config.json",
        "visual/config.json",
        "llm/onnx/config.json",
        "gguf/projector/config.json",
        "consolidated.safetensors",
        "adapters.safetensors",
    }
    found = filter_repo_objects(
        sorted(wanted | others), allow_patterns=ALLOW, ignore_patterns=IGNORE
    )
    assert set(found) == wanted


def test_what_is_cached_is_not_told(hub: Hub) -> None:
    hub.plan = [file("config.json", 100, True), file("model.safetensors", 10**18, True)]
    assert resolve(REPO, report=lambda _: pytest.fail("nothing is downloaded")) == hub.folder


def test_no_room(hub: Hub) -> None:
    hub.plan = [file("config.json", 1), file("model.safetensors", 10**18)]
    with pytest.raises(HubError, match=r"needs 1000000 TB, but only .* free.*HF_HOME"):
        resolve(REPO)
    assert len(hub.calls) == 1


def test_disk_full_on_the_way(hub: Hub) -> None:
    hub.fails(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(HubError, match="is full"):
        resolve(REPO)


def test_pickles_alone_are_not_downloaded(hub: Hub) -> None:
    hub.plan = [file("config.json", 1)]
    with pytest.raises(HubError, match=r"no .safetensors files.*never loaded"):
        resolve(REPO)
    assert len(hub.calls) == 1


@pytest.mark.parametrize(
    ("kind", "says"),
    (
        (
            hub_errors.GatedRepoError,
            "is gated.*https://huggingface.co/someone/model.*hf auth login",
        ),
        (hub_errors.RepositoryNotFoundError, "no folder 'someone/model' here.*private"),
        (hub_errors.RevisionNotFoundError, "no revision 'v9'"),
        (hub_errors.HfHubHTTPError, "refused someone/model: 401"),
    ),
)
def test_refusals_are_explained(hub: Hub, kind: type[Exception], says: str) -> None:
    hub.fails(http(kind))
    with pytest.raises(HubError, match=says):
        resolve(REPO, revision="v9")


def connect_error() -> Exception:
    import importlib

    client = importlib.import_module(hub_errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0])
    return client.ConnectError("Name or service not known")


@pytest.mark.parametrize("make", (connect_error, lambda: hub_errors.LocalEntryNotFoundError("no")))
def test_no_network(hub: Hub, make: Callable[[], Exception]) -> None:
    hub.fails(make())
    with pytest.raises(HubError, match="cannot be reached.*not in the local cache"):
        resolve(REPO)
    hub.fails(make(), cached=True)
    assert resolve(REPO) == hub.folder


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve(REPO) == hub.folder
    assert all(call["local_files_only"] for call in hub.calls)
    hub.fails(hub_errors.OfflineModeIsEnabled("offline"))
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set.*'v2'.*not in the local cache"):
        resolve(REPO, revision="v2")
    hub.fails(hub_errors.OfflineModeIsEnabled("offline"), cached=True)
    (hub.folder / "projector").mkdir()
    (hub.folder / "config.json").rename(hub.folder / "projector" / "config.json")
    assert resolve(REPO) == hub.folder  # XTuner's
    (hub.folder / "projector" / "config.json").unlink()  # a snapshot of other files
    with pytest.raises(HubError, match="not in the local cache"):
        resolve(REPO)


def test_a_bug_is_no_hub_error(hub: Hub) -> None:
    hub.fails(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        resolve(REPO)
