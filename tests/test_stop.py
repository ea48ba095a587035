"""stop.py: an answer ends before a stop string, however its pieces fall."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxvlm.errors import ConfigError
from mlxvlm.stop import StopStrings

texts = st.text("abc", max_size=12)


def shown(stops, pieces):
    stop = StopStrings(stops)
    out = []
    for piece in pieces:
        out.append(stop.add(piece))
        if stop.found:
            break
    return "".join(out) + stop.finish(), stop.found


def first_stop(stops, text):
    """The plain meaning: the shortest beginning of the text that ends in a stop string."""
    for end in range(len(text) + 1):
        ended = [s for s in stops if text[:end].endswith(s)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


@given(st.lists(texts.filter(bool), max_size=3), st.lists(texts, max_size=8))
def test_pieces_give_what_the_whole_text_means(stops, pieces):
    text = "".join(pieces)
    assert shown(stops, list(text)) == first_stop(stops, text)
    # In larger pieces, more than one stop string may be there at once: the one that ends first.
    assert shown(stops, pieces) == first_stop(stops, text)


def test_only_what_may_become_a_stop_string_is_held_back():
    stop = StopStrings(["END", "\n\n"])
    assert [stop.add(p) for p in ("a ", "E", "N", "O", "\n", "b", "\n", "\nno")] == [
        *("a ", "", "", "ENO", "", "\nb", "", "")
    ]
    assert stop.found and stop.add("more") == "" and stop.finish() == ""


def test_what_cannot_be_a_stop_string():
    for bad in ("", ["a", ""], [3]):
        with pytest.raises(ConfigError, match="stop"):
            StopStrings(bad)
