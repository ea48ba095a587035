"""Tars and parquet: pictures read in place, under names that stay."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_cache import Slicer, sha256, siglip

from mlxvlm.cache import EmbeddingCache
from mlxvlm.cache.inputs import picture_sources
from mlxvlm.cache.jobs import Named
from mlxvlm.cache.writer import write_cache
from mlxvlm.config import TilingConfig
from mlxvlm.data.feed import Pictures
from mlxvlm.data.origins import Member, locate, read_bytes
from mlxvlm.data.sources import picture_root, read_rows
from mlxvlm.errors import DataError
from mlxvlm.images.picture import Picture


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 20 + seed % 3, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def pack(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def talk(answer: str = "Red.") -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two tars of every sort of sample."""
    long = "a" * 150 + "/" + "b" * 120 + ".png"
    pack(
        tmp_path / "wds" / "part-000.tar",
        {
            "000000.png": png(0),
            "000000.txt": b"A red square.",
            "000001.PNG": png(1),
            "000001.json": json.dumps({"image": "coco/1.png", "conversations": talk()}).encode(),
            "._000001.png": b"a Mac's",
            "./in/000002.png": png(2),
            "in/000002.json": json.dumps({"caption": "A dog.", "sha256": "?"}).encode(),
            "000003.json": json.dumps({"text": "no picture"}).encode(),
            long: png(3),
        },
    )
    two = {"images": ["x", "y"], "messages": [{"role": "user", "content": "<image><image>Same?"}]}
    two["messages"].append({"role": "assistant", "content": "No."})  # type: ignore[union-attr]
    pack(
        tmp_path / "wds" / "sub" / "part-001.tar",
        {
            "0.left.png": png(4),
            "0.right.png": png(0),  # once more
            "0.json": json.dumps(two).encode(),
            "1.png": b"no picture",
            "1.txt": b"\xff\xfe\xfd",
        },
        format=tarfile.PAX_FORMAT,
    )
    return tmp_path / "wds"


def member(named: Named) -> Member:
    assert isinstance(named.origin, Member)
    return named.origin


def test_members_of_a_folder_of_tars(shards):
    sources, bad = picture_sources(shards)
    found = {s.name: s.origin for s in sources}
    first, second = "part-000.tar", "sub/part-001.tar"
    assert list(found) == [
        f"{first}/000000.png",
        f"{first}/000001.PNG",
        "coco/1.png",
        f"{first}/in/000002.png",
        f"{first}/{'a' * 150}/{'b' * 120}.png",
        f"{second}/0.left.png",
        f"{second}/0.right.png",
        "x",
        "y",
        f"{second}/1.png",
    ]
    for name, seed in ((f"{first}/000000.png", 0), ("coco/1.png", 1), ("x", 4), ("y", 0)):
        assert isinstance(found[name], Member) and read_bytes(found[name])[0] == png(seed)
    assert [where for where, _ in bad] == ["part-000.tar/000003", "part-001.tar/1"]
    assert locate(shards, f"{first}/in/000002.png") == found[f"{first}/in/000002.png"]
    assert locate(shards, f"{first}/no.png") == shards / first / "no.png"


def test_rows_of_tars(shards):
    rows = dict(read_rows(shards))
    assert rows["part-000.tar/000000"].images == ["part-000.tar/000000.png"]
    assert rows["part-000.tar/000000"].messages[1]["content"] == "A red square."
    assert rows["part-000.tar/000001"].messages[1]["content"] == "Red."
    assert rows["part-000.tar/in/000002"].messages[1]["content"] == "A dog."
    assert rows["part-001.tar/0"].images == [
        "sub/part-001.tar/0.left.png",
        "sub/part-001.tar/0.right.png",
    ]
    assert isinstance(rows["part-001.tar/1"], DataError)
    bare = str(rows["part-000.tar/" + "a" * 150 + "/" + "b" * 120])
    assert "no text beside the picture; rows have it under one of 'messages'" in bare


def test_a_cache_from_tars_serves_rows_without_them(tmp_path, shards):
    sources, _ = picture_sources(shards)
    encoder = Slicer()
    summary = write_cache(encoder, sources, tmp_path / "cache", batch_size=2, shard_pictures=4)
    assert (sum(encoder.batches), summary.duplicates) == (5, 4)
    assert [name for name, _ in summary.failures] == ["sub/part-001.tar/1.png"]
    again = write_cache(Slicer(), sources, tmp_path / "cache")
    assert (again.known, again.encoded, len(again.failures)) == (9, 0, 1)
    rows = [row for _, row in read_rows(shards) if not isinstance(row, DataError)]
    expected = Slicer().encode(Slicer().look([png(1)]))[0].views[0]
    shutil.rmtree(shards)
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        pictures = Pictures(None, tmp_path, cache)
        for row in rows:
            assert all(pictures.cut(name).views for name in row.images)
        np.testing.assert_array_equal(cache["part-000.tar/000001.PNG"].views[0], expected)
        assert cache["coco/1.png"].sha256 == cache["part-000.tar/000001.PNG"].sha256


def test_one_tar_names_what_its_folder_does(tmp_path, shards):
    whole = [s.name for s in picture_sources(shards)[0] if s.name.startswith("part-000.tar")]
    alone = [s.name for s in picture_sources(shards / "part-000.tar")[0] if s.name != "coco/1.png"]
    several = picture_sources([shards / "part-000.tar", shards / "sub" / "part-001.tar"])[0]
    pattern = picture_sources(shards / "part-*.tar")[0]
    assert alone == whole
    assert [s.name for s in several][:2] == [s.name for s in pattern][:2] == whole[:2]
    shutil.copytree(shards, tmp_path / "other")
    with pytest.raises(DataError, match="have one name"):
        picture_sources([shards / "part-000.tar", tmp_path / "other" / "part-000.tar"])


def test_training_reads_pictures_out_of_tars(shards, tmp_path):
    encoder = siglip(tiling=TilingConfig("dynamic", 32))
    root = picture_root(shards, tmp_path)  # --images is for rows that name files
    pictures = Pictures(encoder, root)
    name = "part-000.tar/in/000002.png"
    found = pictures.get(name)
    assert isinstance(found, Picture) and found.size == (22, 16)
    assert pictures.cut(name).views == len(found.views) == len(encoder.look([png(2)])[0].views)
    with pytest.raises(DataError, match="does not exist"):
        pictures.cut("part-000.tar/none.png")


@pytest.mark.parametrize("cut", [600, 2000, 5000])
def test_a_tar_cut_short_gives_what_is_there(tmp_path, cut):
    members = {f"{i}.png": png(i) for i in range(6)}
    path = pack(tmp_path / "a.tar", members)
    os.truncate(path, cut)
    sources, bad = picture_sources(path)
    whole = [s.name for s in sources if member(s).offset + member(s).size <= cut]
    assert len(bad) == 1 and bad[0][0] == "a.tar" and "cut short" in bad[0][1]
    if not whole:
        return
    summary = write_cache(Slicer(), sources, tmp_path / "cache")
    assert summary.encoded == len(whole)
    assert [reason for _, reason in summary.failures] == [f"{path} ends before it does"] * (
        len(sources) - len(whole)
    )


def test_a_damaged_header_inside_a_tar_is_noticed(tmp_path):
    path = pack(tmp_path / "a.tar", {f"{i}.png": png(i) for i in range(4)})
    third = picture_sources(path)[0][2][1]
    data = bytearray(path.read_bytes())
    data[third.offset - 512 + 5] ^= 1
    path.write_bytes(data)
    sources, bad = picture_sources(path)
    assert len(sources) == 2
    assert bad == [
        ("a.tar", f"it is damaged at byte {third.offset - 512:,}: what follows is not seen.")
    ]


def test_what_is_no_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(DataError, match="names no pictures.*no tar, or is compressed"):
        picture_sources(tmp_path / "a.tar")
    pack(tmp_path / "b.tar.gz", {"a.png": png(0)})
    with pytest.raises(DataError, match="decompress it"):
        picture_sources(tmp_path / "b.tar.gz")
    with pytest.raises(DataError, match="no .tar or .parquet file matches"):
        picture_sources(tmp_path / "c-*.tar")


def test_a_tar_that_is_listed_stays_packed_and_takes_little_memory(tmp_path):
    path = pack(tmp_path / "a.tar", {f"{i:05}.png": b"x" for i in range(3000)})
    sources, _ = picture_sources(path)
    assert len(sources) == 3000 and os.listdir(tmp_path) == ["a.tar"]
    assert len({id(member(s).tar) for s in sources}) == 1


# Parquet


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """As Hugging Face datasets write it: structs of bytes and path, small row groups."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    images = [{"bytes": png(i), "path": f"{i}.png" if i else None} for i in range(7)]
    images[3] = None
    texts = [talk(str(i)) for i in range(7)]
    texts[3] = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    columns = {
        "id": pa.array([str(i) for i in range(7)]),
        "image": pa.array(images, struct),
        "conversations": pa.array(texts, pa.list_(turn)),
    }
    path = tmp_path / "hub" / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def test_a_table_of_pictures(tmp_path, table):
    sources, bad = picture_sources(tmp_path / "hub")
    name = "data/train-00000-of-00001.parquet"
    assert bad == []
    assert [s.name for s in sources] == [
        f"{name}/0",
        *[n for i in (1, 2, 4, 5, 6) for n in (f"{name}/{i}", f"{i}.png")],
    ]
    for source, seed in zip(sources, (0, 1, 1, 2, 2, 4, 4, 5, 5, 6, 6), strict=True):
        assert read_bytes(source.origin)[0] == png(seed)
    assert read_bytes(locate(tmp_path / "hub", f"{name}/5"))[0] == png(5)
    summary = write_cache(Slicer(), sources, tmp_path / "cache", batch_size=2, shard_pictures=5)
    assert (summary.encoded, summary.duplicates) == (6, 5)
    with EmbeddingCache.open(tmp_path / "cache") as cache:
        assert cache["4.png"].sha256 == cache[f"{name}/4"].sha256
    rows = [row for _, row in read_rows(tmp_path / "hub")]
    assert [row.images for row in rows][2:4] == [[f"{name}/2"], []]
    assert rows[6].messages[1]["content"] == "6"


def test_lists_of_pictures_and_plain_bytes(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turn = pa.struct([(name, pa.string()) for name in ("user", "assistant", "source")])
    columns = {
        "images": pa.array(
            [[{"bytes": png(0), "path": None}, {"bytes": png(1), "path": None}], []],
            pa.list_(struct),
        ),
        "texts": pa.array(
            [[{"user": "Which?", "assistant": "Both.", "source": "s"}]] * 2, pa.list_(turn)
        ),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    sources, bad = picture_sources(tmp_path / "a.parquet")
    assert [s.name for s in sources] == ["a.parquet/0.0", "a.parquet/0.1"] and bad == []
    assert [read_bytes(s.origin)[0] for s in sources] == [png(0), png(1)]
    rows = [row for _, row in read_rows(tmp_path / "a.parquet")]
    assert [len(row.images) for row in rows] == [2, 0]
    assert rows[0].messages[-1]["content"] == "Both."

    plain = pa.table({"jpg": pa.array([png(2), None, b""]), "caption": ["a", "b", "c"]})
    pq.write_table(plain, tmp_path / "b.parquet")
    sources, bad = picture_sources(tmp_path / "b.parquet")
    assert [s.name for s in sources] == ["b.parquet/0", "b.parquet/2"]
    assert [where for where, _ in bad] == ["b.parquet[1]"]  # a caption of nothing
    summary = write_cache(Slicer(), sources, tmp_path / "cache")
    assert summary.failures == [("b.parquet/2", "there are no bytes in its cell")]


def test_pictures_beside_a_table(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (tmp_path / "0.png").write_bytes(png(0))
    images = pa.array([{"bytes": None, "path": "0.png"}], struct)
    pq.write_table(pa.table({"image": images, "text": ["A square."]}), tmp_path / "a.parquet")
    sources, _ = picture_sources(tmp_path / "a.parquet")
    assert {s.name: s.origin for s in sources}["a.parquet/0"] == str(tmp_path / "0.png")
    assert sha256(tmp_path / "0.png") in {
        c for c in EmbeddingCache(_cached(sources, tmp_path / "cache"))
    }


def _cached(sources: Any, folder: Path) -> Path:
    write_cache(Slicer(), sources, folder)
    return folder


def test_a_damaged_table_costs_itself(tmp_path, table):
    shutil.copy(table, table.with_name("b.parquet"))
    os.truncate(table, 500)
    sources, bad = picture_sources(table.parent)
    assert len(sources) == 11 and [where for where, _ in bad] == [table.name]


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install 'mlxvlm\[parquet\]'"):
        picture_sources(tmp_path / "a.parquet")
