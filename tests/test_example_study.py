"""The studies: their rows are what they say, runs go on where they were, tables add up."""

import dataclasses
import json
import math
import random
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples.shapes import encoder, study, study_report, study_run  # noqa: E402
from examples.shapes import study_data as data  # noqa: E402
from examples.shapes import study_variants as variants  # noqa: E402
from examples.shapes.tokenizer import build, learn  # noqa: E402
from mlxvlm.config import VisionConfig  # noqa: E402
from mlxvlm.train.stages import stage_config  # noqa: E402
from mlxvlm.vision.siglip import SiglipVision  # noqa: E402

SCENES = [scene for _, scene in zip(range(80), data.scenes("train"), strict=False)]


# Rows


def test_a_direct_answer_is_the_end_of_the_restated_one():
    seen = set()
    for scene in SCENES:
        for restated, direct in zip(
            data.questions(scene, "x"), data.questions(scene, "x", False), strict=True
        ):
            assert direct.question == restated.question
            said = direct.answer.removesuffix(".").lower()
            assert said in restated.answer.lower() and len(direct.answer) < len(restated.answer)
            assert {mark.turn for mark in direct.marks} <= {0}
            seen.add(restated.kind)
    assert seen == set(data.KINDS)


def test_the_smaller_world_is_small_and_its_examination_is_of_another_split():
    asked = data.exam(20)
    counts = {kind: sum(qa.kind == kind for _, qa in asked) for kind in data.KINDS}
    assert set(counts.values()) == {20}
    scenes = [scene for scene, _ in asked] + [scene for scene, _ in data.chats(5)]
    assert not {scene.seed for scene in scenes} & {scene.seed for scene in SCENES}
    assert all(len(s.items) <= data.MOST for s in (*scenes, *SCENES))


def test_shares_of_the_data_are_nested_and_larger_ones_go_on(tmp_path):
    images = {}
    for percent in (25, 50, 100, 300):
        data.write(tmp_path, data.Rows(percent=percent), 16)
        file = tmp_path / f"restated-{percent}" / "pretrain.jsonl"
        images[percent] = {json.loads(line)["image"] for line in file.read_text().splitlines()}
    assert [len(images[percent]) for percent in (25, 50, 100, 300)] == [4, 8, 16, 48]
    assert images[25] < images[50] < images[100] < images[300]


def test_with_a_learnt_tokenizer_targets_keep_the_words_that_it_has_whole():
    tokenizer = learn(data.texts(60), 300)
    known = data.whole_words(tokenizer)
    assert known("triangle") and not known("pink") and data.whole_words(build())("pink")
    rows = [row for scene in SCENES for row in data.pretrain_rows(scene, "x.png")]
    kept = [data.keep_words(row, known) for row in rows]
    named = {w for r in kept for marks in r["targets"].values() for m in marks for w in m["words"]}
    assert named and all(known(word) for word in named)
    assert [row["messages"] for row in kept] == [row["messages"] for row in rows]
    text = "What color is the triangle?"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_coarser_grid_names_what_its_parts_hold():
    for scene in SCENES:
        row = next(iter(data.pretrain_rows(scene, "x.png")))
        fine = {mark["token"]: mark["words"] for mark in row["targets"]["align"]}
        coarse = data.coarser(row, 4)["targets"]["align"]
        parts = {divmod(token, 8)[0] // 2 * 4 + token % 8 // 2 for token in fine}
        assert [mark["token"] for mark in coarse] != [] and {m["token"] for m in coarse} == parts
        for mark in coarse:
            row4, column4 = divmod(mark["token"], 4)
            four = [16 * row4 + 2 * column4 + k for k in (0, 1, 8, 9)]
            inside = [fine[token] for token in four if token in fine]
            assert mark["words"] in inside
            assert "nothing" not in mark["words"] or all("nothing" in w for w in inside)
        assert data.coarser(row, 8) == row


# Variants


def test_every_variant_writes_recipes_that_the_trainer_takes(tmp_path):
    for variant in variants.ALL:
        for stage in variant.stages:
            fields = variants.recipe(variant, stage, 2)
            file = tmp_path / f"{variant.name}-{stage}.toml"
            file.write_text(study_run.toml(fields))
            assert tomllib.loads(file.read_text()) == fields
            name = "lora" if "lora:" in fields["train"] else stage
            config = stage_config(name, {"model": "m", "data": ["d"], "out": "o"}, str(file))
            assert (config.seed, set(config.targets)) == (2, set(variant.targets))
            assert config.batch_size == (4 if config.share_prefix else 12)


def test_all_variants_differ_and_every_one_is_in_a_table():
    bare = [dataclasses.replace(v, name="", label="") for v in variants.ALL]
    assert all(a != b for i, a in enumerate(bare) for b in bare[:i])
    named = {name for names in variants.STUDIES.values() for name in names}
    assert named == set(variants.NAMES) and len(variants.NAMES) == len(variants.ALL)


def test_a_variants_commands_name_what_differs():
    commands = {v.name: study_run.build_command(v, 1, "base") for v in variants.ALL}
    at = commands["concat2-mlp"]
    assert at[at.index("--projector") + 1 : at.index("--projector") + 4] == [
        "mlp",
        "--pool",
        "concat2",
    ]
    assert commands["full"] == commands["int8"] != commands["attention"]
    caches = {v.name: study.cache_of(v) for v in variants.ALL}
    assert (caches["int8"], caches["attention-mean2"]) == ("cache-int8", "cache-float32-mean2")
    flags = study_run.stage_flags(variants.NAMES["sft-25"], "sft", "m", "o")
    assert flags["data"] == ["data/restated-25/sft.jsonl"]
    flags = study_run.stage_flags(variants.NAMES["plain-300"], "pretrain", "m", "o")
    assert flags["data"] == ["data/direct-bpe-300/pretrain.jsonl"]


# Runs


def result(name: str, seed: int, right: int, asked: int = 10) -> dict:
    measured = {kind: [right, asked] for kind in (*data.KINDS, "chats")}
    stage = {"step_cpu_s": 0.1, "peak_memory_mb": 50.0, "right": measured}
    return {
        "variant": name,
        "seed": seed,
        **dict.fromkeys(variants.NAMES[name].stages, stage),
        "tokens_a_picture": 64,
        "parameters": {"projector": 1000, "language": 2000},
    }


def test_a_study_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    started = []

    def pretend(out, arguments, log=None):
        name, seed = arguments[2], int(arguments[4])
        started.append((name, seed))
        if (name, seed) == ("mlp", 0) and started.count(("mlp", 0)) == 1:
            return 1
        file = out / "runs" / f"{name}-{seed}" / "result.json"
        file.write_text(json.dumps(result(name, seed, 5)))
        return 0

    monkeypatch.setattr(study, "command", pretend)
    chosen = [variants.NAMES[name] for name in ("mlp", "direct")]
    # A run without a result was interrupted: it begins anew.
    left = tmp_path / "runs" / "direct-1" / "half"
    left.mkdir(parents=True)
    assert study.run(tmp_path, [0, 1], chosen, 5) == ["mlp-0"]
    assert started == [("mlp", 0), ("direct", 0), ("mlp", 1), ("direct", 1)]
    assert not left.exists() and "failed" in capsys.readouterr().out
    assert study.run(tmp_path, [0, 1], chosen, 5) == []
    assert started[4:] == [("mlp", 0)]
    assert study.run(tmp_path, [0, 1, 2], chosen, 5, until=0.0) == [] and len(started) == 5


def test_runs_from_the_encoder_to_the_report(tmp_path, monkeypatch, capsys):
    """Three short runs for real: the recipe, and what starts from its parts."""
    vision = VisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        image_size=96, patch_size=12,
    )  # fmt: skip
    encoder.save(SiglipVision(vision), vision, tmp_path / "encoder")
    chosen = [
        dataclasses.replace(variants.NAMES[name], recipe=variants.NAMES[name].recipe | {"iters": 4})
        for name in (variants.FIRST, "lora", "sft-25")
    ]
    monkeypatch.setattr(study_run, "CHATS", 2)
    monkeypatch.setattr(study_report, "BLIND_EACH", 2)
    monkeypatch.setattr(study_report, "BLIND_SCENES", 20)
    out = tmp_path / "study"
    study.prepare(out, tmp_path / "encoder", [0], chosen, 24)
    monkeypatch.chdir(out)
    for variant in chosen:
        (out / "runs" / f"{variant.name}-0").mkdir(parents=True)
        found = study_run.one(variant, 0, 2)
        assert found["tokens_a_picture"] == 64
        for stage in variant.stages:
            ran = found[stage]
            assert ran["steps"] == (1 if variant.steps < 1 else 4)
            assert ran["rows_skipped"] == 0 and (ran["step_cpu_s"] > 0 or ran["steps"] == 1)
            asked = {kind: asked for kind, (_, asked) in ran["right"].items()}
            assert asked == dict.fromkeys(data.KINDS, 2) | {"chats": 2 * (stage == "sft")}
        assert str(tmp_path) not in json.dumps(found)
        (out / "runs" / f"{variant.name}-0" / "result.json").write_text(json.dumps(found))
        if variant.name == "lora":
            assert any("--adapter-path" in line for line in found["commands"])
    capsys.readouterr()
    study_report.write(out, tmp_path / "plot.png", tmp_path / "all.json")
    told = capsys.readouterr().out
    assert "| the projector, LoRA | 1 |" in told and "| sft on 25% of them" in told
    assert len(json.loads((tmp_path / "all.json").read_text())) == 3
    assert np.asarray(Image.open(tmp_path / "plot.png")).std() > 1


# Tables


def test_intervals_are_students_t_over_runs_and_wilsons_over_questions():
    runs = [[(8, 10), (6, 10)], [(9, 10), (9, 10)], [(10, 10), (6, 10)]]
    found = study_report.share(runs)
    assert found.each == pytest.approx((0.7, 0.9, 0.8)) and found.mean == pytest.approx(0.8)
    half = 4.303 * 0.1 / math.sqrt(3)
    assert found.t == pytest.approx((0.8 - half, min(1.0, 0.8 + half)))
    # 48 of 60: scipy's and everyone's Wilson interval.
    assert found.wilson == pytest.approx((0.6822, 0.8817), abs=1e-3)
    assert study_report.share(runs[:1]).t is None


def test_students_t_holds_what_it_promises():
    rng = random.Random(0)
    inside = 0
    for _ in range(4000):
        shares = [min(1.0, max(0.0, rng.gauss(0.5, 0.05))) for _ in range(3)]
        low, high = study_report.share([[(value, 1)] for value in shares]).t or (0, 0)
        inside += low <= 0.5 <= high
    assert 0.94 < inside / 4000 < 0.96


def test_a_table_has_a_row_for_each_variant_that_has_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study_report, "BLIND_EACH", 2)
    monkeypatch.setattr(study_report, "BLIND_SCENES", 20)
    for seed, right in enumerate((7, 8, 9)):
        folder = tmp_path / "runs" / f"attention-{seed}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result("attention", seed, right)))
    # No other variant's runs are taken for its own.
    folder = tmp_path / "runs" / "attention-mean2-0"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(result("attention-mean2", 0, 1)))
    study_report.write(tmp_path)
    told = capsys.readouterr().out
    assert told.count("| **80.0** | 55.2 to 100.0 | 72.0 to 86.2 |") == 4
    assert "| two-block attention | 3 |" in told and "| mean 2 x 2 + attention | 1 |" in told
    assert "| the recipe | 3 |" in told and "What trains beside" not in told
    page = tmp_path / "page.md"
    marks = "".join(f"{s}\n<!-- {s} -->\nold\n<!-- end of {s} -->\n" for s in variants.STUDIES)
    page.write_text(marks + "the end\n")
    study_report.write(tmp_path, page=page)
    study_report.write(tmp_path, page=page)
    text = page.read_text()
    assert text.count("| two-block attention | 3 |") == 1 and text.endswith("-->\nthe end\n")
    assert "old" not in text and text.startswith("projectors\n<!-- projectors -->\n|  | runs |")
