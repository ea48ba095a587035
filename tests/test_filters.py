"""Rows that filters leave out, the formats of answers, and JPEG in training."""

import numpy as np
import pytest
from PIL import Image
from tiny_vlm import picture

from mlxvlm.data.augment import jpeg, through_jpeg
from mlxvlm.data.filters import lengths, repeated, screen, why_repetitive
from mlxvlm.data.records import parse_record
from mlxvlm.data.response_formats import FORMATS, ask_for
from mlxvlm.data.samples import Sample
from mlxvlm.errors import DataError, PictureError
from mlxvlm.images.picture import Picture

WORDS = " ".join(f"w{n}" for n in range(40))


def test_shares_of_what_repeats():
    assert repeated(WORDS) == repeated("a few words") == repeated("") == 0
    twice = repeated(f"{WORDS} {WORDS}")
    often = repeated(" ".join([WORDS] * 9))
    # 71 stretches of 80 words: 40 begin in the first half and 9 of those reach into the second
    assert twice == pytest.approx(31 / 71) and often > 0.85
    assert repeated("好" * 60) > 0.9  # a character is a word where there are no spaces


@pytest.mark.parametrize(
    "text, says",
    [
        (WORDS, ""),
        ("\n".join(f"| {n} | {n * 7} |" for n in range(50)), ""),  # a table
        ("-" * 200, ""),
        (f"{WORDS} {WORDS} {WORDS}", "stretches of 10 words"),
        ("It is 0." + "0" * 60, "'0' 60 times"),
        ("\n".join(["yes", "no"] * 5), "8 of its 10 lines"),
        ("yes\nyes", ""),
    ],
)
def test_what_is_repetitive(text, says):
    assert says in why_repetitive(text) and bool(says) == bool(why_repetitive(text))


def row(text, *images, question="Q"):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    return parse_record({"images": list(images), "messages": turns}, "x")


def screened(rows, filters, digest=lambda name: name):
    found = screen(((str(at), one) for at, one in enumerate(rows)), filters, digest)
    return {where: one for where, one in found if isinstance(one, DataError)}


def test_only_answers_are_judged_by_repetition():
    rows = [row("fine", question=f"{WORDS} " * 5), row(f"{WORDS} " * 5), row("fine")]
    bad = screened(rows, ["repetition"])
    assert list(bad) == ["1"] and bad["1"].kind == "repetition"
    assert not screened(rows, [])
    document = parse_record({"content": [{"type": "text", "text": f"{WORDS} " * 5}]}, "x")
    assert screened([document], ["repetition"])


def test_duplicates_have_the_same_text_and_pictures():
    contents = {"a": "1", "copy-of-a": "1", "b": "2"}
    asked = []

    def digest(name):
        asked.append(name)
        if name not in contents:
            raise PictureError("gone")
        return contents[name]

    rows = [row("x", "a"), row("y", "a"), row("x", "b"), row("x", "copy-of-a"), row("x", "a")]
    rows += [row("x"), row("x"), row("x", "gone"), row("x", "a", "b"), row("x", "b", "a")]
    bad = screened(rows, ["duplicates"], digest)
    assert list(bad) == ["3", "4", "6"]
    assert "as 0" in str(bad["3"]) and "as 0" in str(bad["4"]) and "as 5" in str(bad["6"])
    assert {error.kind for error in bad.values()} == {"duplicate"}
    asked.clear()
    screened([row("x", "a"), row("y", "b"), row("z", "a")], ["duplicates"], digest)
    assert not asked  # no picture is read where texts differ


def sample(count):
    return Sample(np.zeros(count + 1, np.int32), np.arange(count + 1) > 0, [], where=str(count))


def test_lengths_far_out():
    usual = [sample(20 + n) for n in range(30)]
    out = [bad for _, bad in lengths([*usual, sample(1), sample(2000)]) if bad]
    assert [one.where for one in out] == ["1", "2000"]
    assert {one.kind for one in out} == {"abnormal length"} and "2,000 supervised" in out[1].reason
    assert not [bad for _, bad in lengths([sample(3)] * 30 + [sample(20)]) if bad]
    assert not [bad for _, bad in lengths([sample(3), sample(900)]) if bad]  # too few to tell
    assert list(lengths([])) == []


def user(content):
    return {"role": "user", "content": content}


SHORT = FORMATS["short"]


@pytest.mark.parametrize(
    "before, after",
    [
        ("What?", f"What?\n{SHORT}"),
        ("What?\n", f"What?\n{SHORT}"),
        (f"What?\n{SHORT}", f"What?\n{SHORT}"),
        ("", SHORT),
        (
            [{"type": "text", "text": "What?"}, {"type": "image"}],
            [{"type": "text", "text": f"What?\n{SHORT}"}, {"type": "image"}],
        ),
        ([{"type": "image"}], [{"type": "image"}, {"type": "text", "text": SHORT}]),
    ],
)
def test_formats_are_asked_for_once(before, after):
    answer = {"role": "assistant", "content": "Red."}
    messages = [user(before), answer, user("And?"), answer]
    asked = ask_for(messages, "short")
    assert asked == [user(after), answer, user(f"And?\n{SHORT}"), answer]
    assert messages[0] == user(before) and ask_for(asked, "short") == asked
    document = [{"role": "document", "content": []}]
    assert ask_for(document, "short") == document


def test_jpeg_is_a_function_of_its_key():
    smooth = np.asarray(Image.fromarray(picture(0, 8)).resize((64, 64)))
    many = Picture([smooth] * 12, grid=(3, 4))
    one = jpeg(many, (0, 1, "x:1", 0))
    assert np.array_equal(one.views, jpeg(many, (0, 1, "x:1", 0)).views)
    for key in ((1, 1, "x:1", 0), (0, 2, "x:1", 0), (0, 1, "x:2", 0), (0, 1, "x:1", 1)):
        other = jpeg(many, key).views
        assert not np.array_equal(one.views, other)
    assert len({view.tobytes() for view in one.views}) > 3  # each tile has a quality of its own
    known = {through_jpeg(smooth, quality).tobytes() for quality in range(75, 101)}
    assert {view.tobytes() for view in one.views} <= known
    assert one.grid == (3, 4) and many.views[0] is smooth
