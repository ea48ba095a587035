"""Marks between a picture's views, by which a language model can tell where each of them lies.

    separators    [1,1] "," [1,2] "\\n" [2,1] "," [2,2] ":" [whole]
    index         "(0,1,1)" [1,1] "(0,1,2)" [1,2] ... "(0,0,0)" [whole]

MM1.5's sub-image position indicators (McKinzie et al. 2024), which it found to matter little; its
row separator is a token of its own, here it is a newline, which every vocabulary has.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..images.picture import Cut

# Of one picture: its visual tokens; or each stretch of them, after the text before it.
Shown = int | Sequence[tuple[str, int]]


def marks(style: str, cut: Cut, number: int) -> list[str]:
    """The text before each view of a picture whose whole, if there is one, comes last.

    number: which of the prompt's pictures it is, from 0.
    """
    rows, columns = cut.grid
    places = [(row, column) for row in range(rows) for column in range(columns)]
    if style == "index":
        found = [f"({number},{row + 1},{column + 1})" for row, column in places]
        whole = f"({number},0,0)"
    else:
        found = [("," if column else "\n") if row or column else "" for row, column in places]
        whole = ":"
    if cut.views == 1:  # not cut: the whole alone
        return [whole if style == "index" else ""]
    return [*found, whole][: cut.views]
