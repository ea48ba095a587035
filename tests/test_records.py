"""Rows of data in every form, and the files they come in."""

import json
import random

import pytest

from mlxvlm.data.json_list import read_list
from mlxvlm.data.records import Record, parse_record
from mlxvlm.data.sources import find_rows, list_pictures, read_records, read_rows
from mlxvlm.errors import DataError
from mlxvlm.prompts import normalize_messages

PART = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def chat(*values):
    roles = ["human", "gpt"] * len(values)
    return [{"from": role, "value": v} for role, v in zip(roles, values, strict=False)]


def turns(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": c} for role, c in zip(roles, contents, strict=False)]


# row -> (images, contents of the messages)
ROWS = [
    ({"image": "a.jpg", "messages": turns("Hi", "Yo")}, ["a.jpg"], ["Hi", "Yo"]),
    ({"images": ["a", "b"], "messages": turns("Hi", "Yo")}, ["a", "b"], ["Hi", "Yo"]),
    ({"messages": turns("Hi", "Yo")}, [], ["Hi", "Yo"]),
    ({"images": [], "image": None, "messages": turns("Hi", "Yo")}, [], ["Hi", "Yo"]),
    (
        {"image": ["a"], "messages": turns([PART, text("Hi")], "Yo")},
        ["a"],
        [[PART, text("Hi")], "Yo"],
    ),
    # Placeholders in the strings of messages count only if they are as many as the images.
    ({"image": "a", "messages": turns("<image>\nHi", "Yo")}, ["a"], [[PART, text("Hi")], "Yo"]),
    ({"messages": turns("<image> is a tag", "Yo")}, [], ["<image> is a tag", "Yo"]),
    (
        {"image": "a", "messages": turns("<image> and <image>", "Yo")},
        ["a"],
        ["<image> and <image>", "Yo"],
    ),
    ({"image": "a", "messages": turns("Hi", "<image>")}, ["a"], ["Hi", "<image>"]),
    # LLaVA
    ({"image": "a", "conversations": chat("<image>\nHi", "Yo")}, ["a"], [[PART, text("Hi")], "Yo"]),
    ({"image": "a", "conversations": chat("Hi\n<image>", "Yo")}, ["a"], [[text("Hi"), PART], "Yo"]),
    ({"image": "a", "conversations": chat("<image>", "Yo")}, ["a"], [[PART], "Yo"]),
    ({"image": "a", "conversations": chat("Hi", "Yo")}, ["a"], ["Hi", "Yo"]),
    ({"conversations": chat("Hi", "Yo")}, [], ["Hi", "Yo"]),
    (
        {"images": ["a", "b"], "conversations": chat("<image>\n<image>\nHi", "Yo")},
        ["a", "b"],
        [[PART, PART, text("Hi")], "Yo"],
    ),
    (
        {"images": ["a", "b"], "conversations": chat("is <image> like <image>?", "Yo")},
        ["a", "b"],
        [[text("is "), PART, text(" like "), PART, text("?")], "Yo"],
    ),
    (
        {"images": ["a", "b"], "conversations": chat("<image>x", "Yo", "y\n<image>", "z")},
        ["a", "b"],
        [[PART, text("x")], "Yo", [text("y"), PART], "z"],
    ),
    (
        {"image": "a", "conversations": chat("Hi <image>", "<image>")},
        ["a"],
        [[text("Hi"), PART], "<image>"],
    ),
    # parts that name their own file
    (
        {"images": ["a"], "messages": turns([{**PART, "image": "own"}, PART, text("Hi")], "Yo")},
        ["own", "a"],
        [[PART, PART, text("Hi")], [text("Yo")]],
    ),
    # captions
    ({"image": "a", "text": "A cat."}, ["a"], [[PART], "A cat."]),
    ({"images": ["a", "b"], "text": "<image>"}, ["a", "b"], [[PART, PART], "<image>"]),
]


@pytest.mark.parametrize("row, images, contents", ROWS)
def test_rows(row, images, contents):
    before = json.dumps(row)
    record = parse_record(row, "x.jsonl:1")
    assert record.images == images
    assert [message["content"] for message in record.messages] == contents
    roles = ["user", "assistant"] * len(contents)
    assert [message["role"] for message in record.messages] == roles[: len(contents)]
    assert json.dumps(row) == before
    # and every record is one that prompts take
    _, placed = normalize_messages(record.messages, record.images)
    assert placed == images


def test_roles_of_llava_and_ours_are_both_taken():
    for roles in (("system", "human", "gpt"), ("system", "user", "assistant")):
        rows = [{"from": role, "value": role} for role in roles]
        messages = parse_record({"conversations": rows}, "x").messages
        assert [message["role"] for message in messages] == ["system", "user", "assistant"]


def test_id_and_targets_pass_through():
    targets = {"words": [{"turn": 1, "end": 3, "words": {"red": 1.0}}]}
    row = {"id": 7, "image": "a", "text": "red", "targets": targets}
    record = parse_record(row, "x")
    assert record == Record(["a"], record.messages, "7", targets)
    assert record.targets is targets
    assert parse_record({"image": "a", "text": "red"}, "x").id is None


BAD = [
    ([], "JSON object, not a list"),
    ({}, "exactly one of .* has none"),
    ({"image": "a"}, "has none"),
    ({"text": "x", "messages": turns("a"), "image": "a"}, "has messages and text"),
    ({"image": "a", "images": ["b"], "text": "x"}, "not both"),
    ({"image": 3, "text": "x"}, "'image' must be a file name"),
    ({"images": ["a", ""], "text": "x"}, "'images' must be a file name"),
    ({"text": "x"}, "needs a picture under 'image'"),
    ({"image": "a", "text": " "}, "not empty"),
    ({"image": "a", "text": ["x"]}, "caption"),
    ({"messages": "x"}, "'messages' must be a list"),
    ({"messages": []}, "at least one user message"),
    ({"messages": ["x"]}, "message 0"),
    ({"messages": turns(None)}, "content of message 0"),
    ({"messages": turns([{"type": "video"}])}, "video"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "user begins"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "'tool'"),
    ({"image": "a", "messages": turns([PART, PART], "x")}, "2 places for images.*1 image "),
    ({"images": ["a", "b"], "messages": turns([PART], "x")}, "1 place for images.*2 images"),
    ({"messages": turns("x", [PART])}, "only a user message"),
    ({"conversations": {}}, "'conversations' must be a list"),
    ({"conversations": [{"from": "human"}]}, "turn 0"),
    ({"conversations": [{"from": "bot", "value": "x"}]}, "'bot'"),
    ({"conversations": chat("<image>", "x")}, "1 <image> placeholder.*0 images"),
    ({"image": "a", "conversations": chat("<image><image>", "x")}, "2 <image> .*1 image"),
    ({"messages": turns([{**PART, "image": 3}], "x")}, "'images' must be a file name"),
    ({"messages": turns("a\ud83d", "x")}, "message 0 holds a broken character at position 1"),
    ({"image": "a", "text": "x", "targets": []}, "'targets' must be an object"),
]


@pytest.mark.parametrize("row, error", BAD)
def test_bad_rows_name_their_place_and_the_rule(row, error):
    with pytest.raises(DataError, match=rf"^data\.jsonl:12: .*{error}"):
        parse_record(row, "data.jsonl:12")


GOOD = {"image": "a.jpg", "text": "A cat."}


def test_lines_with_bad_ones_among_them(tmp_path):
    lines = [
        json.dumps(GOOD).encode(),
        b"",
        b"{nonsense",
        b'"text"',
        b'{"image": "\xff"}',
        b"[" * 100_000,
        b"{}",
        '{"image": "b", "text": "\u00e9"}'.encode(),
    ]
    (tmp_path / "d.jsonl").write_bytes("\ufeff".encode() + b"\r\n".join(lines))
    rows = list(read_rows(tmp_path / "d.jsonl"))
    good = [(where, row.messages[1]["content"]) for where, row in rows if isinstance(row, Record)]
    assert good == [("d.jsonl:1", "A cat."), ("d.jsonl:8", "é")]
    bad = {where: str(row) for where, row in rows if isinstance(row, DataError)}
    assert list(bad) == [f"d.jsonl:{n}" for n in (3, 4, 5, 6, 7)]
    for where, words in zip(bad, ("not JSON", "JSON object", "UTF-8", "JSON", "none"), strict=True):
        assert bad[where].startswith(f"{where}: ") and words in bad[where]
    raw = list(read_records(tmp_path / "d.jsonl"))
    assert raw[0] == ("d.jsonl:1", GOOD) and raw[5] == ("d.jsonl:7", {})


def test_a_list(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([GOOD, 3, GOOD]))
    rows = list(read_records(tmp_path / "d.json"))
    assert [where for where, _ in rows] == ["d.json[0]", "d.json[1]", "d.json[2]"]
    assert rows[0][1] == rows[2][1] == GOOD
    assert isinstance(rows[1][1], DataError)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
def test_a_list_is_read_in_pieces(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("mlxvlm.data.json_list.CHUNK", chunk)
    rows = [
        {"a": "é\U0001f600\\n]},"},
        12,
        1.5e10,
        "x,]",
        None,
        [],
        [{"b": [{}]}],
        {"c": "d" * 200},
    ]
    for text in (json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False)):
        for space in ("", " \n\t\r "):
            path = tmp_path / "d.json"
            path.write_bytes(("\ufeff" + space + text + space).encode())
            assert list(read_list(path)) == rows
    for text in ("[]", " [ ] "):
        path.write_text(text)
        assert list(read_list(path)) == []
    for text in (
        "[1",
        "[1,",
        "[1,]",
        "[1 2]",
        "[1] 2",
        "[1]]",
        "[",
        '[{"a": 1}, {"a":',
        "[,]",
        "[é]",
    ):
        path.write_text(text)
        with pytest.raises(ValueError):
            list(read_list(path))
        with pytest.raises(DataError, match="is not JSON: "):
            list(read_records(path))
    path.write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match="is not JSON: "):
        list(read_records(path))


@pytest.mark.parametrize(
    "content, error",
    [("{}", "JSON list"), ('{"a": 1}\n{"a": 2}', "jsonl"), ("", "not JSON"), ("[" * 99999, "JSON")],
)
def test_a_file_that_is_no_list(tmp_path, content, error):
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(DataError, match=error):
        list(read_records(tmp_path / "d.json"))


@pytest.mark.parametrize(
    "names, found",
    [
        (["train.jsonl", "train.json", "valid.jsonl"], "train.jsonl"),
        (["train.json", "valid.jsonl"], "train.json"),
        (["chat.json", "a.jpg"], "chat.json"),
        (["a.json", "b.jsonl"], None),
        (["a.jpg"], None),
    ],
)
def test_the_file_of_a_folder(tmp_path, names, found):
    for name in names:
        (tmp_path / name).write_text("[]")
    if found is None:
        with pytest.raises(DataError, match="train.jsonl"):
            find_rows(tmp_path)
    else:
        assert find_rows(tmp_path) == tmp_path / found


def test_paths_that_are_none(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_records(tmp_path / "no.jsonl")
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(DataError, match="json, .jsonl"):
        read_records(tmp_path / "x.csv")
    with pytest.raises(DataError, match="not a folder"):
        list_pictures(tmp_path / "x.csv")


def test_pictures_of_a_folder(tmp_path):
    names = ["b.JPG", "a.png", "sub/c.webp", "sub/.hidden.png", ".git/d.png", "e.txt", "f.tif"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "g.png").mkdir()
    found = [str(path.relative_to(tmp_path)) for path in list_pictures(tmp_path)]
    assert found == ["a.png", "b.JPG", "f.tif", "sub/c.webp"]


ODD = [None, "", "a", "<image>", 0, -1, True, 3.5, [], {}, ["a"], [None], {"bytes": "x"}, "\ud800"]
FORMS = [
    {"image": "a", "messages": turns("q", "x")},
    {"image": "a", "conversations": chat("q", "x")},
    {"image": "a", "text": "c"},
    {"image": "a", "prompt": "p", "completion": "c"},
    {"prompt": turns("q"), "completion": turns("q", "x")[1:]},
    {"images": ["a"], "texts": [{"user": "q", "assistant": "b"}]},
    {"images": ["a", None], "texts": [None, "t"]},
    {"content": [{**PART, "image": "a"}, text("b")]},
    {"text_list": ["a", "b"], "image_info": [{"image_name": "x", "matched_text_index": 1}]},
]


def test_whatever_a_row_holds_it_is_a_record_or_a_data_error():
    rng, seen = random.Random(0), set()

    def changed(value):
        if rng.random() < 0.2:
            return rng.choice(ODD)
        if isinstance(value, dict):
            return {key: changed(inner) for key, inner in value.items()}
        return [changed(inner) for inner in value] if isinstance(value, list) else value

    for number in range(4000):
        try:
            seen.add(type(parse_record(changed(FORMS[number % len(FORMS)]), "x")))
        except DataError:
            seen.add(DataError)
    assert seen == {Record, DataError}


def test_rows_of_an_imagefolder():
    """metadata.jsonl as Hugging Face datasets has it."""
    wanted = parse_record({"image": "a.jpg", "text": "A cat."}, "x")
    for row in (
        {"file_name": "a.jpg", "text": "A cat."},
        {"file_name": "a.jpg", "caption": "A cat."},
        {"image": "a.jpg", "caption": "A cat.", "file_name": "elsewhere.jpg"},
    ):
        assert parse_record(row, "x") == wanted
    # What a row is made of elsewhere is not its caption too.
    both = {"image": "a.jpg", "caption": "A cat.", "text": "A dog."}
    assert parse_record(both, "x").messages[1]["content"] == "A dog."
