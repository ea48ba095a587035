"""examples/grounding: what is asked, how it is measured, and every stage at toy length."""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from examples.grounding import evaluate, run, scenes
from examples.shapes import language
from examples.shapes.tokenizer import build
from mlxvlm.boxes import parse
from mlxvlm.cli.main import app


def test_answers_are_boxes_and_points_as_the_package_reads_them():
    for seed in range(20):
        for thing in scenes.make(seed).things:
            (_, box), (_, point), (_, named), _ = scenes.questions(thing)
            (found,), left_out = parse(box)
            assert [found.x0, found.y0, found.x1, found.y1] == scenes.corners(thing)
            assert found.label == named == scenes.name(thing) and not left_out
            (found,), _ = parse(point)
            assert found.is_point and evaluate.inside(point, scenes.exactly(thing))
            assert evaluate.overlap(box, scenes.exactly(thing)) > 0.6


def test_overlap_and_the_guesser():
    assert evaluate.overlap("red star: [100,100,200,200]", (150, 100, 250, 200)) == pytest.approx(
        1 / 3
    )
    assert (
        evaluate.overlap("[480,280]", (100, 100, 200, 200))
        == 0
        == evaluate.overlap("", (0, 0, 9, 9))
    )
    assert not evaluate.inside("red star", (0, 0, 1000, 1000))
    blind = evaluate.blind(60)
    assert 0.02 < blind["mean IoU"] < 0.3


def test_each_visual_token_is_told_what_it_shows():
    """By colour: a tile's and the whole's cells of a thing are about where it is drawn."""
    scene = scenes.make(5)
    shown = scenes.visible(scene)
    assert len(shown) == 5 * scenes.CELLS**2
    pixels = np.asarray(scenes.picture(scene), np.int32)
    assert pixels.shape == (192, 192, 3)
    for thing in scene.things:
        whole = [thing.color in words for words in shown[-(scenes.CELLS**2) :]]
        ys, xs = np.where(np.array(whole).reshape(scenes.CELLS, scenes.CELLS))
        drawn = np.argwhere(np.abs(pixels - np.array(thing.rgb)).sum(-1) < 12) / 192 * scenes.CELLS
        assert len(ys) and abs(drawn[:, 0].mean() - ys.mean() - 0.5) < 0.7
        assert abs(drawn[:, 1].mean() - xs.mean() - 0.5) < 0.7


def test_every_stage_runs_at_toy_length(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for stage, words in run.commands(tmp_path, tiny=True).items():
        if stage == "build":
            language.save(tmp_path / "language", 0, build(scenes.WORDS), **run.SIZES)
        if words[0] == "mlxvlm":
            done = CliRunner().invoke(app, words[1:])
            assert done.exit_code == 0, done.output
        else:
            monkeypatch.setattr(sys, "argv", words)
            importlib.import_module(words[0]).main()
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    assert raw["tiling"]["type"] == "cover" and raw["projector"]["type"] == "c_abstractor"
    said = capsys.readouterr().out
    assert "mean IoU" in said and "before" in said
