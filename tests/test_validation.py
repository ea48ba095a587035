"""What a validation looks at, and what it says of what it could not look at."""

# ruff: noqa: F811 (a fixture of test_train's)

import json

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
