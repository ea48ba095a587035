"""Prompts with completions, The Cauldron's questions, and interleaved documents."""

import json

import numpy as np
import pytest
from tiny_vlm import CONTROL, IMAGE, picture, tiny_config, tiny_tokenizer, tiny_vlm

from mlxvlm.config import PromptConfig
from mlxvlm.data.parquet import read_parquet
from mlxvlm.data.records import parse_record
from mlxvlm.data.samples import prepare
from mlxvlm.data.sources import read_rows
from mlxvlm.errors import DataError, PromptError
from mlxvlm.images.picture import Cut
from mlxvlm.prompts import document, normalize_messages, render

PART = {"type": "image"}
END = 256 + CONTROL.index("<|end_of_text|>")


def text(words):
    return {"type": "text", "text": words}


def turn(role, content):
    return {"role": role, "content": content}


CHATS = [
    ({"prompt": "Hi", "completion": "Yo"}, [], ["Hi", "Yo"]),
    ({"image": "a", "prompt": "Hi", "completion": "Yo"}, ["a"], ["Hi", "Yo"]),
    (
        {"images": ["a"], "prompt": "<image>\nHi", "completion": "Yo"},
        ["a"],
        [[PART, text("Hi")], "Yo"],
    ),
    (
        {
            "image": "a",
            "prompt": [turn("user", [PART, text("Hi")])],
            "completion": [turn("assistant", "Yo")],
        },
        ["a"],
        [[PART, text("Hi")], "Yo"],
    ),
    (
        {"images": ["a"], "texts": [{"user": "Q", "assistant": "A", "source": "s"}]},
        ["a"],
        ["Q", "A"],
    ),
]


@pytest.mark.parametrize("row, images, contents", CHATS)
def test_chats(row, images, contents):
    record = parse_record(row, "x")
    assert record.images == images
    assert [message["content"] for message in record.messages] == contents
    assert [message["role"] for message in record.messages] == ["user", "assistant"]


A, B = text("One. "), text("Two.")
DOCUMENTS = [
    (
        {"content": [A, {**PART, "image": "a"}, B, {**PART, "image": "b"}]},
        ["a", "b"],
        [A, PART, B, PART],
    ),
    ({"images": ["a"], "content": [PART, B]}, ["a"], [PART, B]),
    ({"content": [A]}, [], [A]),
    (
        {"images": ["a", None, "b", None], "texts": [None, "One. ", None, "Two."]},
        ["a", "b"],
        [PART, A, PART, B],
    ),
    ({"images": ["a"], "texts": ["One. ", None, "Two."]}, ["a"], [A, PART, B]),
    ({"images": [], "texts": ["One. ", "Two."]}, [], [A, B]),
    (
        {
            "text_list": ["One.", "Two."],
            "image_info": [
                {"image_name": "b", "matched_text_index": 1},
                {"image_name": "a", "matched_text_index": 0},
                {"image_name": "c", "matched_text_index": 1},
            ],
        },
        ["a", "b", "c"],
        [PART, A, PART, PART, B],
    ),
]


@pytest.mark.parametrize("row, images, parts", DOCUMENTS)
def test_documents(row, images, parts):
    before = json.dumps(row)
    record = parse_record(row, "x")
    assert json.dumps(row) == before
    placed, found = normalize_messages(record.messages, record.images)
    assert found == images and [message["role"] for message in placed] == ["document"]
    assert placed[0]["content"] == parts


BAD = [
    ({"prompt": "Hi"}, "two strings, or two lists"),
    ({"prompt": [turn("user", "a"), turn("assistant", "b")], "completion": []}, "would be learnt"),
    ({"texts": []}, "not empty"),
    ({"texts": [{"user": "a"}, "b"]}, r"texts\[1\] must be an object"),
    ({"texts": ["a"], "images": ["x"]}, "has a text and an image"),
    ({"texts": ["a", None], "images": ["x", "y", "z"]}, r"1 places .* has 3 images"),
    ({"texts": [None], "images": ["x"]}, "must have text"),
    ({"content": []}, "not empty"),
    ({"content": [text(""), {**PART, "image": "a"}]}, "must have text"),
    ({"content": [PART, text("a")]}, "1 place for images, but 0 images"),
    ({"content": [{**PART, "image": 3}, text("a")]}, "file name"),
    ({"text_list": ["a"], "image_info": [{"image_name": "x"}]}, "matched_text_index below 1"),
    ({"text_list": ["a"], "image_info": 5}, "must be a list"),
]


@pytest.mark.parametrize("row, error", BAD)
def test_bad_ones(row, error):
    with pytest.raises(DataError, match=error):
        parse_record(row, "x")


def sample_of(row, **changes):
    config = tiny_config(prompt=PromptConfig(image_token_id=IMAGE, **changes))
    record = parse_record(row, "x")
    samples, skipped = prepare([("x", record)], tiny_tokenizer(), config, lambda *_: Cut(1), 200)
    assert not skipped
    return samples[0]


@pytest.mark.parametrize("changes", [{}, {"image_placement": "sequence"}, {"layout": "plain"}])
def test_all_text_of_a_document_is_learnt_and_pictures_stay_in_place(changes):
    row = {"content": [text("ab"), {**PART, "image": "a"}, text("cd")]}
    sample = sample_of(row, image_suffix="", **changes)
    assert sample.tokens.tolist()[1:] == [
        *tiny_tokenizer().encode("ab")[0],
        *[IMAGE] * 16,
        *tiny_tokenizer().encode("cd")[0],
        END,
    ]
    assert sample.supervised.tolist() == [False, True, True, *[False] * 16, True, True, True]
    assert sample.prefix == 0 and sample.images == ["a"]  # text before the picture is learnt


def test_a_document_may_be_gone_on_with():
    vlm = tiny_vlm()
    document = [turn("document", [text("ab"), PART])]
    prompt = vlm.tokenize(document, [picture(0)])
    assert prompt.tokens[-1] == IMAGE and END not in prompt.tokens
    whole = vlm.tokenize(document, [picture(0)], add_generation_prompt=False)
    assert np.array_equal(whole.tokens[:-1], prompt.tokens) and whole.tokens[-1] == END
    with pytest.raises(PromptError, match="must stand alone"):
        render([*document, turn("user", [])], [16], vlm.tokenizer, vlm.config.prompt, True)


def test_documents_and_names_in_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    columns = {
        "images": [["u/a.jpg", None], [None]],
        "texts": [[None, "A text."], ["Alone."]],
        "metadata": ["x", "y"],
    }
    pq.write_table(pa.table(columns), tmp_path / "web.parquet")
    rows = [row for _, row in read_rows(tmp_path / "web.parquet")]
    assert [row.images for row in rows] == [["u/a.jpg"], []]
    assert rows[0].messages[0]["content"][1] == text("A text.")

    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "images": pa.array([[None, {"bytes": b"x", "path": None}]], pa.list_(struct)),
        "texts": [["A text.", None]],
    }
    pq.write_table(pa.table(columns), tmp_path / "own.parquet")
    (row,) = [row for _, row in read_rows(tmp_path / "own.parquet")]
    assert row.images == ["own.parquet/0.1"]
    assert [part["type"] for part in row.messages[0]["content"]] == ["text", "image"]
    pq.write_table(
        pa.table({"image": ["a.jpg"], "prompt": ["Q"], "completion": ["A"]}), tmp_path / "p.parquet"
    )
    (entry,) = read_parquet(tmp_path / "p.parquet")
    assert not entry.pictures and entry.row == {"image": "a.jpg", "prompt": "Q", "completion": "A"}


def test_a_document_that_nothing_predicts_is_left_out(monkeypatch):
    """One token, with neither BOS before it nor an end behind it."""
    monkeypatch.setattr(document, "ENDS", ())
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token_id = None
    rows = [(words, parse_record({"content": [text(words)]}, words)) for words in ("a", "ab")]
    samples, skipped = prepare(rows, tokenizer, tiny_config(), lambda *_: Cut(1), 9)
    assert [sample.where for sample in samples] == ["ab"]
    assert [(one.where, one.kind) for one in skipped] == [("a", "nothing supervised")]
