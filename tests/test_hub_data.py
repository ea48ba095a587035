"""Data sets of the hub, with huggingface_hub stood in for."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

from mlxvlm.data.hub import CONVERTED, choose, is_hub_data, local_data
from mlxvlm.data.sources import read_rows
from mlxvlm.errors import HubError

FILES = [
    "README.md",
    "ai2d/train-00000-of-00002.parquet",
    "ai2d/train-00001-of-00002-0123456789abcdef.parquet",
    "ai2d/test-00000-of-00001.parquet",
    "chart/train-00000-of-00001.parquet",
]


def test_what_is_named_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "here").mkdir(parents=True)
    yes = ("owner/name", "owner/name/part", "owner/name:test", "owner/name@v1.0:test", "o/n.x/a/b")
    no = ("owner", "./owner/name", "/owner/name", "../x/y", "owner/rows.json", "a/b.parquet")
    no += ("owner/here", "a/*.tar", "train.jsonl", "")
    assert all(map(is_hub_data, yes)) and not any(map(is_hub_data, no))
    assert local_data("a/rows.jsonl") == "a/rows.jsonl"


@pytest.mark.parametrize(
    "part, split, found",
    [
        ("ai2d", None, FILES[1:3]),
        ("ai2d", "test", FILES[3:4]),
        ("chart", "train", FILES[4:]),
        (None, "test", FILES[3:4]),
        ("other", None, []),
    ],
)
def test_files_of_a_part_and_split(part, split, found):
    assert choose(FILES, "o/n", part, split) == found


def test_files_that_are_not_one_thing():
    with pytest.raises(HubError, match="2 parts: name one, such as o/n/ai2d, o/n/chart"):
        choose(FILES, "o/n", None, None)
    with pytest.raises(HubError, match="no split 'dev'; it has test, train"):
        choose(FILES, "o/n", "ai2d", "dev")
    converted = [
        "default/train/0000.parquet",
        "default/train/0001.parquet",
        "default/test/0.parquet",
    ]
    assert choose(converted, "o/n", None, None) == converted[:2]
    assert choose(["data/all.parquet"], "o/n", None, None) == ["data/all.parquet"]
    assert choose(["README.md"], "o/n", None, None) == []


class Hub:
    """snapshot_download of repositories by branch: {branch: files}."""

    def __init__(self, branches, folder):
        self.branches, self.folder, self.calls = branches, folder, []
        self.online = True
        self.cached = {}

    def __call__(self, repo, **options):
        self.calls.append((repo, options))
        branch = options.get("revision")
        assert options["repo_type"] == "dataset"
        if options.get("local_files_only") or not self.online:
            if not options.get("local_files_only"):
                raise hub_errors.OfflineModeIsEnabled("offline")
            if branch not in self.cached:
                raise hub_errors.LocalEntryNotFoundError("no")
            return str(self.cached[branch])
        if branch not in self.branches:
            error = hub_errors.RevisionNotFoundError.__new__(hub_errors.RevisionNotFoundError)
            raise error
        files = self.branches[branch]
        if options.get("dry_run"):
            known = [n for n in files if n.endswith(".parquet")]
            return [SimpleNamespace(filename=n, file_size=9, will_download=True) for n in known]
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        for name in options["allow_patterns"]:
            path = self.folder / str(branch or "main").replace("/", "-") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"prompt": [name], "completion": ["A"]}), path)
        self.cached[branch] = self.folder / str(branch or "main").replace("/", "-")
        return str(self.cached[branch])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub({None: FILES}, tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    return hub


def questions(data):
    return [row.messages[0]["content"] for _, row in read_rows(data)]


def test_only_its_files_are_fetched_and_read(hub):
    told = []
    train = local_data("o/n/ai2d", told.append)
    test = local_data("o/n/ai2d:test")
    assert questions(train) == FILES[1:3] and questions(test) == FILES[3:4]
    assert (told[0].repo, told[0].files) == ("o/n", 2)
    assert [options["allow_patterns"] for _, options in hub.calls][1] == FILES[1:3]
    hub.online = False
    assert local_data("o/n/ai2d") == train
    with pytest.raises(HubError, match="cannot be reached.*o/n.* not in the local cache"):
        local_data("o/n/chart")


def test_the_hubs_own_conversion(hub):
    hub.branches = {None: ["rows.json"], CONVERTED: ["default/train/0000.parquet"]}
    assert questions(local_data("o/n")) == ["default/train/0000.parquet"]
    hub.branches = {None: ["rows.json"]}
    with pytest.raises(HubError, match=r"no .parquet files: download"):
        local_data("o/n")
    with pytest.raises(HubError, match="no revision 'v3'"):
        local_data("o/n@v3")


def test_without_a_network(hub):
    hub.online = False
    with pytest.raises(HubError, match="o/n is not in the local cache. Go online once"):
        local_data("o/n")
