"""What a validation looks at, and what it says of what it could not look at."""

# ruff: noqa: F811 (a fixture of test_train's)

import json

import pytest
from test_train import _flags, place  # noqa: F401

from mlxvlm.train import loop
from mlxvlm.train.loop import Trainer
from mlxvlm.train.stages import stage_config


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_documents_are_validated_on_and_only_those_with_a_question_answer(
    place, tmp_path, monkeypatch
):
    """Without BOS nothing at all stands before a document that begins with text."""
    text, image = {"type": "text", "text": "a text"}, {"type": "image", "image": "0.png"}
    rows = [{"content": [text, image, text]}, {"content": [image, text]}, {"content": [text]}]
    real = loop.load

    def load(*arguments, **options):
        vlm = real(*arguments, **options)
        vlm.tokenizer.bos_token_id = None
        return vlm

    monkeypatch.setattr(loop, "load", load)
    shown = []
    flags = {"val_data": write(tmp_path / "documents.jsonl", rows), "iters": 1, "val_samples": 3}
    config = stage_config("sft", _flags(place, tmp_path / "run") | flags)
    trainer = Trainer(config, lambda kind, values: shown.append((kind, values)))
    trainer.run()
    assert [v["wanted"] for kind, v in shown if kind == "sample"] == ["a text"]
    assert len(trainer.val.samples) == 3 and trainer.best.step == 1


@pytest.mark.parametrize("flag", ["val_data", "val_split"])
def test_a_torn_picture_of_a_validation_is_told(place, tmp_path, flag):
    """Among others its row is left out; alone, it is no loss of 0 that nothing could beat."""
    (tmp_path / "torn.png").write_bytes(b"\x89PNG torn")
    torn = {"image": str(tmp_path / "torn.png"), "text": "a"}
    rows = [json.loads(line) for line in (place / "data" / "train.jsonl").open()]
    flags = {"iters": 1, "val_samples": 0}
    if flag == "val_data":
        flags["val_data"] = write(tmp_path / "val.jsonl", [torn])
    else:
        # The only picture with one row: other families are too large for one in a hundred.
        flags |= {"data": write(tmp_path / "rows.jsonl", [*rows, torn]), "val_split": 0.01}
    trainer = Trainer(stage_config("pretrain", _flags(place, tmp_path / "run") | flags))
    summary = trainer.run()
    assert len(trainer.val.samples) == 1 and summary["best"] is None
    assert [name for name, _ in summary["failed_pictures"]] == [torn["image"]]
    (line,) = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    wanted = ("val", "val.jsonl:1") if flag == "val_data" else ("rows", "rows.jsonl:13")
    assert (json.loads(line)["source"], json.loads(line)["where"]) == wanted
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["val_loss"] is None
