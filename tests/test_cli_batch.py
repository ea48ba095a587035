"""`mlxvlm chat --batch`: a line for each row, bad rows for themselves, and on where it stopped."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from tiny_vlm import picture, tiny_vlm
from typer.testing import CliRunner

import mlxvlm
import mlxvlm.batch
from mlxvlm.cli.main import app
from mlxvlm.weights.save import save

ROWS = [
    {"prompt": "What is this?", "image": "a.png", "id": "first"},
    {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
    {
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "X"},
        ],
    },
    {"prompt": "And this?", "images": ["missing.png"]},
    {"content": [{"type": "text", "text": "A document."}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    save(tiny_vlm(), folder / "model")
    Image.fromarray(picture(1)).save(folder / "a.png")
    lines = [json.dumps(row) for row in ROWS]
    (folder / "in.jsonl").write_text("\n".join([*lines[:4], "", "{no json", lines[4]]) + "\n")
    return folder


@pytest.fixture
def run(folder, monkeypatch, tmp_path):
    """Runs elsewhere than where the pictures lie: names are relative to the file of questions."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        flags = ["--batch", str(folder / "in.jsonl"), "-m", str(folder / "model")]
        return CliRunner().invoke(app, ["chat", *flags, "--max-tokens", "9", *args])

    return run


def read(path) -> dict[int, dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["row"] for line in lines}) == len(lines)
    return {line["row"]: line for line in lines}


def test_each_row_has_its_answer_or_its_error(run, folder, tmp_path):
    done = run("--out", "out.jsonl", "--batch-size", "2")
    assert (done.exit_code, done.stdout) == (0, ""), done.output
    found = read(tmp_path / "out.jsonl")
    assert set(found) == {1, 2, 3, 4, 6, 7}
    vlm = mlxvlm.load(folder / "model")
    for row, text, images in (
        (1, "What is this?", ["a.png"]),
        (2, "Why?", []),
        (3, "What?", ["a.png"]),
    ):
        ask = [{"role": "user", "content": text}]
        alone = vlm.generate(ask, [folder / name for name in images], max_tokens=9)
        assert found[row]["text"] == alone.text and found[row]["input"] == ROWS[row - 1]
        assert found[row]["finish_reason"] == alone.finish_reason
    assert "missing.png" in found[4]["error"] and "in.jsonl:6" in found[6]["error"]
    assert "no question" in found[7]["error"]
    assert '3 of 6 rows answered, 3 could not be (see their "error")' in done.stderr


def test_it_goes_on_where_it_was_stopped(run, folder, tmp_path, monkeypatch):
    whole = run("--out", "whole.jsonl")
    assert whole.exit_code == 0
    real = mlxvlm.batch.batch

    def broken(*args, **options):
        for i, found in enumerate(real(*args, **options)):
            if i == 2:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(mlxvlm.batch, "batch", broken)
    stopped = run("--out", "out.jsonl", "--batch-size", "1")
    assert stopped.exit_code == 130 and "goes on" in stopped.stderr
    out = tmp_path / "out.jsonl"
    assert len([line for line in read(out).values() if "text" in line]) == 2
    # As when it is killed in the midst of a line.
    out.write_text(out.read_text() + '{"row": 3, "input": {"ima')
    asked = []
    monkeypatch.setattr(
        mlxvlm.batch,
        "batch",
        lambda vlm, asks, **o: real(vlm, (asked.append(a) or a for a in asks), **o),
    )
    again = run("--out", "out.jsonl")
    assert again.exit_code == 0 and "(2 of 6 rows have answers already)" in again.stderr
    assert len(asked) == 2  # the third row, and the one whose picture is missing still
    wanted = read(tmp_path / "whole.jsonl")
    found = read(out)
    assert {row: line.get("text") for row, line in found.items()} == {
        row: line.get("text") for row, line in wanted.items()
    }


def test_answers_to_other_questions_are_not_mixed_with_these(run, folder, tmp_path):
    assert run("--out", "out.jsonl").exit_code == 0
    kept = (tmp_path / "out.jsonl").read_text()
    (tmp_path / "out.jsonl").write_text(kept.replace("What is this?", "What is that?"))
    done = run("--out", "out.jsonl")
    assert done.exit_code == 2 and "answers to other questions" in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "--out answers.jsonl"),
        (["--out", "o.jsonl", "-p", "Why?"], "--batch and --prompt do not go together"),
        (["--out", "o.jsonl", "--kv-bits", "8"], "--batch and --kv-bits"),
    ],
)
def test_flags_that_do_not_go_with_it(run, args, said):
    done = run(*args)
    assert done.exit_code == 2 and said in done.stderr


def test_its_flags_alone(folder):
    for flags in (["--out", "x.jsonl"], ["--batch-size", "3"]):
        done = CliRunner().invoke(app, ["chat", "-p", "Why?", "-m", str(folder / "model"), *flags])
        assert done.exit_code == 2 and "go with --batch" in done.stderr
    flags = ["--batch", str(folder / "none.jsonl"), "--out", "x.jsonl"]
    done = CliRunner().invoke(app, ["chat", *flags])
    assert done.exit_code == 2 and "is no file" in done.stderr
