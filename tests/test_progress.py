"""What a run shows: a live line on a terminal, lines elsewhere, and a picture of its losses."""

import json
import sys

import pytest

from mlxvlm.cli.progress import Progress, brief, step_line
from mlxvlm.train import plot

STEP = {
    "step": 7,
    "steps": 1200,
    "loss": 2.5,
    "ground_loss": 0.125,
    "lr": 1e-4,
    "tokens": 1000,
    "supervised_tokens": 100,
    "seconds": 0.5,
    "peak_memory_gb": 3.21,
    "left_s": 7200.0,
}


def test_the_line_has_loss_speeds_memory_and_time_left():
    line = step_line(STEP)
    for part in ("7/1,200", "loss 2.5000", "ground 0.125", "2,000 tok/s (200 supervised)"):
        assert part in line
    assert "3.2 GB" in line and "2.0 h left" in line
    assert "not finite" in step_line(STEP | {"loss": None})


def test_without_a_terminal_there_are_whole_lines_now_and_then(capsys):
    progress = Progress()
    for step in range(1, 21):
        progress.training("step", STEP | {"step": step, "due": step % 10 == 0})
    progress.training("step", STEP | {"step": 21, "due": False, "skipped": "spike"})
    progress.end()
    err = capsys.readouterr().err
    assert err.count("\n") == 3 and "\r" not in err
    assert "step 10/" in err and "step 20/" in err and "step 21  skipped" in err


def test_a_terminal_has_one_line_that_other_lines_do_not_break(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    progress = Progress()
    for step in range(1, 4):
        progress.training("step", STEP | {"step": step, "due": True})
    progress.training("eval", {"step": 3, "val_loss": 1.25, "best": True})
    progress.training("step", STEP | {"step": 4, "due": True})
    progress.training("done", {"failed_pictures": []})
    progress.end()
    err = capsys.readouterr().err
    lines = [line.split("\r")[-1] for line in err.split("\n")]
    assert lines[0].startswith("step 3  validation loss 1.2500  the best so far")
    assert lines[1].startswith("step 4/1,200") and lines[2:] == [""]
    assert max(len(part) for line in err.split("\n") for part in line.split("\r")) < 60
    assert len(lines[1]) < 40


def test_long_texts_are_shown_by_their_ends():
    assert brief("What\nis this?") == '"What is this?"'
    assert brief("x" * 100 + " colour?") == json.dumps("..." + ("x" * 100 + " colour?")[-60:])


def metrics(tmp_path):
    lines = [{"step": n, "loss": 3 / n} for n in range(1, 40)]
    lines[9] |= {"loss": None, "skipped": "not finite"}
    lines[19]["val_loss"] = 0.4
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_losses_are_drawn_where_matplotlib_is(tmp_path):
    pytest.importorskip("matplotlib")
    path = plot.draw(metrics(tmp_path))
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    assert plot.draw(tmp_path / "metrics.jsonl") is None


def test_without_matplotlib_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot.draw(metrics(tmp_path)) is None
    assert not (tmp_path / "loss.png").exists()


def test_smoothing_starts_at_the_first_loss():
    assert plot._smooth([(1, 4.0)])[0] == pytest.approx(4.0)
    assert plot._smooth([(n, 2.0) for n in range(50)])[-1] == pytest.approx(2.0)
