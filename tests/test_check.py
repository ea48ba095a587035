"""`mlxvlm data check` finds what training finds; and sources of every sort train together."""

import json
import re
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_vlm import picture, tiny_vlm
from typer.testing import CliRunner

from mlxvlm.cache import EmbeddingCache
from mlxvlm.cache.inputs import picture_sources
from mlxvlm.cache.writer import write_cache
from mlxvlm.cli.main import app
from mlxvlm.data.batching import Batching, MicroBatch
from mlxvlm.data.check import Tiler, check, histogram
from mlxvlm.data.feed import Feed
from mlxvlm.data.gather import Reading, shelf_of
from mlxvlm.errors import DataError, UsageError
from mlxvlm.train.loop import Trainer
from mlxvlm.train.stages import stage_config
from mlxvlm.weights.load import load, load_prompting
from mlxvlm.weights.save import save

WORDS = " ".join(f"w{n}" for n in range(12))


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model; rows with everything that can be wrong; two clean sources; a cache."""
    folder = tmp_path_factory.mktemp("check")
    save(tiny_vlm(), folder / "model")
    images = folder / "images"
    images.mkdir()
    for number in range(6):
        Image.fromarray(picture(number)).save(images / f"{number}.png")
    (images / "torn.png").write_bytes((images / "0.png").read_bytes()[:900])
    good = [
        {"image": f"{n % 6}.png", "messages": talk(f"what is {n}?", "it is red")} for n in range(24)
    ]
    bad = [
        good[0],  # a duplicate
        {"image": "no.png", "text": "missing"},
        {"image": "torn.png", "text": "torn"},
        {"image": "1.png", "text": "long " * 200},
        {"image": "1.png", "text": f"{WORDS} " * 6},
        {"image": "1.png", "messages": [{"role": "user", "content": "and?"}]},
        {"images": ["1.png"], "conversations": [{"from": "human", "value": "<image><image>"}]},
        {"messages": "x"},
    ]
    _write(folder / "bad.jsonl", [*good, *bad], "{broken\n")
    _write(folder / "good.jsonl", good)
    _write(folder / "text.jsonl", [{"messages": talk(f"say {n}", "yes")} for n in range(10)])
    sources = [(path.name, path) for path in sorted(images.iterdir())]
    write_cache(load(folder / "model").encoder, sources, folder / "cache", codec="float32")
    return folder


def _png(place, number):
    return place / "images" / f"{number}.png"


def _write(path, rows, more=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + more)


def config_of(place, out, **flags):
    given = {
        "model": str(place / "model"),
        "data": [str(place / "bad.jsonl")],
        "images": str(place / "images"),
        "out": str(out),
        "batch_size": 2,
        "max_seq_length": 600,
        "length_multiple": 16,
    }
    return stage_config("pretrain", {**given, **flags})


def checked(config, **options):
    choices, tokenizer = load_prompting(config.model)
    reading = Reading(tokenizer, choices, config.max_seq_length, seed=config.seed)
    shelves = [
        shelf_of(
            source,
            Tiler(choices.tiling),  # type: ignore[arg-type]
            EmbeddingCache.open(source.cache) if source.cache else None,
            choices.tiling,
        )
        for source in config.all_sources
    ]
    return check(config.all_sources, config.mixture, shelves, reading, **options)


FLAGS = [
    {},
    {"filter": "repetition,lengths,duplicates", "response_format": "short"},
    {"cache": "cache"},
    {"cache": "cache", "filter": "duplicates"},
    {"max_seq_length": 60},
]


@pytest.mark.parametrize("flags", FLAGS)
def test_it_never_disagrees_with_training(place, tmp_path, flags):
    if "cache" in flags:
        flags = flags | {"cache": str(place / "cache")}
    config = config_of(place, tmp_path, epochs=1, **flags)
    trainer = Trainer(config)
    summary = trainer.run()
    report = checked(config)
    assert report.gathered.skipped == trainer.read[0][0].skipped
    feed = Feed(report.gathered.samples, report.gathered.pictures, Batching(config.batch_size))
    assert feed.digest() == trainer.feed.digest()
    assert sorted(report.seen.bad) == sorted(summary["failed_pictures"])
    if "cache" not in flags:
        assert [name for name, _ in report.seen.bad] == ["torn.png"] and report.seen.rows == 1
    written = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    lost = [one for one in written if one not in written[: len(report.gathered.skipped)]]
    written = written[: len(report.gathered.skipped)]
    torn = [] if "cache" in flags else ["bad.jsonl:27"]
    assert [one["where"] for one in lost] == torn
    assert [
        (one["where"], one["reason"], one["kind"]) for one in written
    ] == report.gathered.skipped
    assert {one["source"] for one in written} == {"bad"}


def test_every_reason_has_its_kind(place, tmp_path):
    report = checked(config_of(place, tmp_path))
    assert report.gathered.counts() == {
        "malformed": 2,
        "picture": 1,
        "number of images": 1,
        "too long": 1,
        "nothing supervised": 1,
    }
    first = [one.kind for one in report.gathered.examples()]
    assert first[-1] == "malformed" and len(set(first[:-1])) == 5
    assert report.would_filter == {"duplicate": 1, "repetition": 1, "abnormal length": 1}
    wanted = {"filter": "repetition,lengths,duplicates"}
    filtered = checked(config_of(place, tmp_path, **wanted))
    assert filtered.would_filter == {}
    assert filtered.gathered.counts() == {
        "malformed": 2,
        "repetition": 2,  # one of them was too long before
        "duplicate": 1,
        "picture": 1,
        "number of images": 1,
        "nothing supervised": 1,
    }


def test_what_is_learnt_is_shown(place, tmp_path):
    config = config_of(place, tmp_path, data=[str(place / "good.jsonl")])
    report = checked(config, samples=1)
    (shown,) = report.rendered
    learnt = [text for text, is_learnt in shown.spans if is_learnt]
    assert learnt == ["it is red<|eot_id|>"]
    whole = "".join(text for text, _ in shown.spans)
    assert ".png: 16 tokens>" in whole and "what is " in whole
    assert report.seen.pictures == report.seen.opened == report.seen.views == 6
    assert report.seen.sizes.tolist() == [[40, 40]] * 6 and report.clean
    fast = checked(config_of(place, tmp_path), fast=True)
    assert not fast.seen.bad and fast.seen.opened == 7  # the torn one's header is whole


def test_histograms():
    assert histogram(np.array([3, 3, 4])) == [(3, 3, 2), (4, 4, 1)]
    found = histogram(np.array([0, 5, 99, 100]))
    assert found[0] == (0, 9, 2) and found[-1] == (100, 109, 1) and len(found) == 11
    assert histogram(np.zeros(0, np.int64)) == []


def run(*args):
    return CliRunner().invoke(app, ["data", "check", *map(str, args)])


def test_the_command(place):
    flags = ("--images", place / "images", "-m", place / "model")
    result = run(place / "bad.jsonl", *flags, "--max-seq-length", 600)
    assert result.exit_code == 0, result.output
    for part in ("33 rows, 27 usable", "2 malformed", "torn.png", "{+it is red<|eot_id|>+}", "###"):
        assert part in result.stdout
    result = run(place / "bad.jsonl", *flags, "--strict", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and not report["clean"]
    assert report["pictures"]["bad"][0]["name"] == "torn.png"
    assert report["totals"]["visual"] == 16 * report["rows"]
    result = run(place / "good.jsonl", place / "text.jsonl", *flags[:2], "--strict")
    assert result.exit_code == 0 and "the small model" in result.stdout
    assert "one 24, several 0, none 10" in result.stdout
    assert run(place / "no.jsonl").exit_code == 1
    result = run()
    assert result.exit_code == 2 and "DATA is missing" in result.output


def test_of_a_long_row_the_ends_are_shown(place, tmp_path):
    turns = [
        {"role": "user", "content": "say"},
        {"role": "assistant", "content": "first " + "long " * 3000 + "last"},
    ]
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"messages": turns}) + "\n")
    shown = run(data).stdout
    assert "{+first long" in shown and "long last" in shown
    assert re.search(r" \[\.\.\. 14,0\d\d characters \.\.\.\] ", shown) and len(shown) < 3000
    (whole,) = json.loads(run(data, "--json").stdout)["samples"]
    assert sum(len(text) for text, _ in whole["spans"]) > 15000


def test_a_recipe_is_checked_with_its_sources(place, tmp_path):
    (tmp_path / "r.toml").write_text(
        f'model = "{place}/model"\nimages = "{place}/images"\nmax_seq_length = 600\n'
        f'[[sources]]\ndata = "{place}/good.jsonl"\nrepeat = 2\n'
        f'[[sources]]\ndata = "{place}/text.jsonl"\n[mixture]\nratio = {{single = 8, text = 1}}\n'
    )
    report = json.loads(run("--config", tmp_path / "r.toml", "--json").stdout)
    assert [(one["usable"], one["used"]) for one in report["sources"]] == [(24, 48), (10, 6)]


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_sources_with_a_cache_and_without_train_as_one(place, tmp_path):
    """Two folders that give one name to different pictures; text alone; in one batch."""
    other = tmp_path / "other"
    other.mkdir()
    for number in range(6):
        Image.fromarray(picture(50 + number)).save(other / f"{number}.png")
    cache = str(place / "cache")
    sources = config_of(place, "x", data=[str(place / n) for n in ("good.jsonl", "text.jsonl")])
    first, text = sources.all_sources
    second = replace(first, name="second", images=str(other))
    found = []
    for name, kept in (
        ("a", [first, second, text]),
        ("b", [replace(first, cache=cache), second, text]),
    ):
        config = config_of(place, tmp_path / name, data=None, sources=kept, iters=4, batch_size=8)
        Trainer(config).run()
        found.append(losses(tmp_path / name))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    same = replace(second, images=first.images)
    config = config_of(
        place, tmp_path / "c", data=None, sources=[first, same, text], iters=4, batch_size=8
    )
    Trainer(config).run()
    assert losses(tmp_path / "c") != found[0]


def test_a_mixture_resumes_bit_for_bit(place, tmp_path):
    data = [str(place / name) for name in ("good.jsonl", "text.jsonl")]
    flags = {"data": data, "augment": "jpeg", "iters": 6, "save_every": 2}
    Trainer(config_of(place, tmp_path / "whole", **flags)).run()

    def stop(kind, values):
        if kind == "checkpoint" and values["step"] == 4:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="plug"):
        Trainer(config_of(place, tmp_path / "cut", **flags), stop).run()
    Trainer(config_of(place, tmp_path / "cut", **flags, resume=True)).run()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    Trainer(config_of(place, tmp_path / "plain", **flags | {"augment": ""})).run()
    assert losses(tmp_path / "plain") != losses(tmp_path / "whole")


def test_augmentation_is_for_training_without_a_cache(place, tmp_path):
    good = [str(place / "good.jsonl")]
    with pytest.raises(UsageError, match="has their features already"):
        config_of(place, tmp_path, data=good, augment="jpeg", cache=str(place / "cache"))
    config = config_of(place, tmp_path, data=good, val_data=good[0], augment="jpeg")
    trainer = Trainer(config)
    assert trainer.val is not None

    def seen(feed, epoch):
        return [view.tobytes() for p in feed.fetch(MicroBatch([[0]]), epoch)[1] for view in p.views]

    first = seen(trainer.feed, 0)
    plain = seen(trainer.feed, None)
    assert first == seen(Trainer(config).feed, 0) != plain
    assert first != seen(trainer.feed, 1)
    assert seen(trainer.val, None) == plain
    (_, found) = next(iter(trainer.val.once()))
    assert {view.tobytes() for p in found for view in p.views} <= {
        view.tobytes() for n in range(6) for view in trainer.encoder.look([_png(place, n)])[0].views
    }


def test_url_pictures_are_fetched_only_if_asked(place, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXVLM_CACHE", str(tmp_path / "home"))
    asked = []

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(place / "images")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    names = [f"{base}/{n}.png" for n in (0, 1, 0, 9)]
    _write(tmp_path / "web.jsonl", [{"image": name, "text": "red"} for name in names])
    try:
        config = config_of(place, tmp_path / "out", data=[str(tmp_path / "web.jsonl")], images="")
        with pytest.raises(DataError, match="none is fetched unasked: --allow-urls"):
            Trainer(config)
        assert not asked
        trainer = Trainer(replace(config, allow_urls=True, iters=2))
        trainer.run()
    finally:
        server.shutdown()
        server.server_close()
    sources, bad = picture_sources(tmp_path / "web.jsonl", allow_urls=True)
    assert [name for name, *_ in sources] == names[:2] and [where for where, _ in bad] == [
        "web.jsonl:4"
    ]
    with pytest.raises(DataError, match="4 rows are bad.*--allow-urls"):
        picture_sources(tmp_path / "web.jsonl")
    (left,) = trainer.read[0][0].skipped
    assert left.where == "web.jsonl:4" and left.kind == "picture" and "404" in left.reason
    assert len(set(asked)) == len([path for path in asked if "9.png" not in path]) + 1 == 3
    Trainer(replace(config, allow_urls=True, iters=2, out=str(tmp_path / "again")))  # off line now
