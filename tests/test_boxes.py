"""boxes.py: what is a box in an answer, what is not, and that nothing makes it stumble."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.boxes import Box, parse

STAR = Box("red star", 105, 200, 310, 422)
CIRCLE = Box("blue circle", 5, 6, 700, 800)


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("red star: [105, 200, 310, 422]", [STAR]),
        ("red star:[105,200,310,422].", [STAR]),
        ("red star: [[105, 200, 310, 422]]", [STAR]),
        ("It has a red star: [105, 200, 310, 422]", [Box("It has a red star", 105, 200, 310, 422)]),
        ("Yes. red star: [105, 200, 310, 422]", [STAR]),
        ("red star[[105, 200, 310, 422]]", [STAR]),
        ("red star(105,200),(310,422)", [STAR]),
        ("The red star is at [105, 200, 310, 422].", [Box("", 105, 200, 310, 422)]),
        ("[105, 200, 310, 422]", [Box("", 105, 200, 310, 422)]),
        ("red star: [105,200,310,422], blue circle: [5,6,700,800]", [STAR, CIRCLE]),
        ("red star: [105,200,310,422] and blue circle: [5,6,700,800]", [STAR, CIRCLE]),
        ("- **red star**: [105,200,310,422]\n- **blue circle:** [5,6,700,800]", [STAR, CIRCLE]),
        ("1. red star: [105,200,310,422]\n2. blue circle: [5,6,700,800]", [STAR, CIRCLE]),
        ("s: [[1, 2, 3, 4], [5, 6, 7, 8]]", [Box("s", 1, 2, 3, 4), Box("s", 5, 6, 7, 8)]),
        ("s: [1, 2, 3, 4] and [5, 6, 7, 8]", [Box("s", 1, 2, 3, 4), Box("s", 5, 6, 7, 8)]),
        ("s: [1, 2, 3, 4]\nIt is at [5, 6, 7, 8]", [Box("s", 1, 2, 3, 4), Box("", 5, 6, 7, 8)]),
        ("\u7ea2\u661f\uff1a[1, 2, 3, 4]", [Box("\u7ea2\u661f", 1, 2, 3, 4)]),
        ("s: [1.5, 2, 3, 4.25]", [Box("s", 1.5, 2, 3, 4.25)]),
        ("s: [0, 0, 1000, 1000]", [Box("s", 0, 0, 1000, 1000)]),
        ("tip: [500, 20]", [Box("tip", 500, 20, 500, 20)]),
        ("tip: <point>[[500, 20]]</point>", [Box("tip", 500, 20, 500, 20)]),
        ("[1, 2, 3] and (4, 5) and [6]: no box", []),
        ("Write it between <box> and </box>.", []),
        ("x[0] = {1, 2}", []),
        ("", []),
    ],
)
def test_plain_text(text, boxes):
    assert parse(text) == (boxes, [])


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("<ref>red star</ref><box>[[105, 200, 310, 422]]</box>", [STAR]),
        ("<ref>red star</ref><box>(105,200),(310,422)</box>", [STAR]),
        ("<ref>red star</ref> is at <box>(105,200),(310,422)</box>", [STAR]),
        (
            "<|object_ref_start|>red star<|object_ref_end|>"
            "<|box_start|>(105,200),(310,422)<|box_end|>",
            [STAR],
        ),
        (
            "<ref>s</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>, <ref>t</ref><box>[[9,9,10,10]]",
            [Box("s", 1, 2, 3, 4), Box("s", 5, 6, 7, 8), Box("t", 9, 9, 10, 10)],
        ),
        (
            "<ref>s</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box> on the <box>(9,9),(10,10)",
            [Box("s", 1, 2, 3, 4), Box("s", 5, 6, 7, 8), Box("", 9, 9, 10, 10)],
        ),
        ("<box>(500,20)</box>", [Box("", 500, 20, 500, 20)]),
        ("<box>(1,2,3,4)</box>", [Box("", 1, 2, 3, 4)]),
        ('{"bbox_2d": [105, 200, 310, 422], "label": "red star"}', [STAR]),
        (
            '```json\n[\n\t{"label": "red star", "bbox_2d": [105, 200, 310, 422]},\n'
            '\t{"point_2d": [500, 20], "label": "tip"}\n]\n```',
            [STAR, Box("tip", 500, 20, 500, 20)],
        ),
        ('[{"label": "red star", "bbox_2d": [105, 200, 310, 422]', [STAR]),  # cut short
        ('{"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]]}', [Box("", 1, 2, 3, 4), Box("", 5, 6, 7, 8)]),
        ('{"size": [105, 200, 310, 422]} {"bbox": {"x": 1}} {"label": "x"}', None),
    ],
)
def test_forms_of_the_families(text, boxes):
    found, left_out = parse(text)
    if boxes is None:  # bare numbers in other JSON are as good as in a sentence
        boxes = [Box("", 105, 200, 310, 422)]
    assert [(b.x0, b.y0, b.x1, b.y1) for b in found] == [(b.x0, b.y0, b.x1, b.y1) for b in boxes]
    if "size" not in text:
        assert found == boxes
    assert left_out == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[300, 2, 200, 4]", "right of the first"),
        ("[1, 50, 20, 50]", "below"),
        ("[7, 7, 7, 7]", "right of the first"),
        ("[1, 2, 3, 1001]", "between 0 and 1000"),
        ("[-1, 2, 3, 4]", "between 0 and 1000"),
        ("[" + "9" * 5000 + ", 2]", "between 0 and 1000"),
        ("[0.1, 0.25, 0.5, 1.0]", "not fractions of 1"),
        ("[.1, .25]", "not fractions of 1"),
        ("<box>[[1, 2, 3]]</box>", "four numbers"),
        ("<box>[[10, 20</box>", "four numbers"),
        ('{"bbox_2d": [1, 2, "3", 4]}', "four numbers"),
        ('{"bbox_2d": [1, null]}', "four numbers"),
    ],
)
def test_what_cannot_be_a_box_is_left_out_with_its_reason(text, why):
    boxes, left_out = parse(f"{text}\ns: [1, 2, 3, 4]")
    assert boxes == [Box("s", 1, 2, 3, 4)]
    assert len(left_out) == 1 and why in left_out[0] and len(left_out[0]) < 160


def test_an_answer_that_is_cut_short_gives_its_whole_boxes():
    text = "<ref>s</ref><box>[[10, 20, 30, 40]]</box><ref>t</ref><box>[[50, 60"
    boxes, left_out = parse(text)
    assert boxes == [Box("s", 10, 20, 30, 40)] and len(left_out) == 1
    assert parse("s: [10, 20, 30, 40], t: [50, 60")[0] == [Box("s", 10, 20, 30, 40)]


def test_pixels_of_a_picture():
    assert Box("", 100, 500, 200, 1000).pixels(2000, 300) == (200, 150, 400, 300)
    assert Box("", 1, 2, 1, 2).is_point and not Box("", 1, 2, 1, 3).is_point


PIECES = ["<ref>", "</ref>", "<box>", "</box>", "[", "]", "(", ")", "{", "}", '"bbox_2d": ', ":"]
PIECES += [
    "1, 2, 3, 4",
    "500",
    "9" * 400,
    ", ",
    " ",
    "\n",
    "a red star",
    "NaN",
    "<|box_start|>",
    "-",
]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3)).map("".join))
def test_any_text_is_read(text):
    boxes, left_out = parse(text)
    for box in boxes:
        assert 0 <= box.x0 <= box.x1 <= 1000 and 0 <= box.y0 <= box.y1 <= 1000
        assert "\n" not in box.label
    assert all("\n" not in reason for reason in left_out)


@pytest.mark.parametrize("piece", ["[", "[1,", "<box>", "<ref>", "{", "(1,2),", " ", "a: ", "[1 "])
def test_long_texts_take_no_longer_than_they_are(piece):
    import time

    started = time.process_time()
    parse(piece * 20_000 + "[1, 2, 3, 4]")
    assert time.process_time() - started < 2
