"""Boxes and points that an answer names, read out of its text.

Coordinates are thousandths of the upright picture's width and height, (0, 0) its top left corner,
x before y, as the families that ground their answers write them (Qwen-VL, InternVL, Qwen3-VL, and
MM1.5 and Ferret but for the last thousandth):

    red star: [105, 200, 310, 422]                                plain text; [x, y] is a point
    <ref>red star</ref><box>[[105, 200, 310, 422]]</box>          InternVL
    <ref>red star</ref><box>(105,200),(310,422)</box>             Qwen-VL
    <|object_ref_start|>red star<|object_ref_end|><|box_start|>(105,200),(310,422)<|box_end|>
    {"bbox_2d": [105, 200, 310, 422], "label": "red star"}        Qwen3-VL; or "point_2d": [x, y]
    red star[[105, 200, 310, 422]]                                where decoding left out the tags

A label is the <ref>, the JSON's "label", the words before a colon, or the words that touch the
bracket. Boxes that follow one another with nothing but commas between share it.

No other scale is guessed. Numbers that are all at most 1 are fractions of the picture (LLaVA-1.5,
of its padded square): left out, with the reason. Pixels cannot be told from thousandths, so those
of a model that answers in pixels (Qwen2.5-VL) come out in the wrong place. Molmo's
<point x="..."> are percents, and are not read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

SCALE = 1000
LONGEST_LABEL = 60

NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
LIST = rf"\[\s*{NUMBER}(?:\s*,\s*{NUMBER})+\s*\]"
PAIR = rf"\(\s*{NUMBER}\s*,\s*{NUMBER}\s*\)"
CORNERS = rf"{PAIR}\s*,?\s*{PAIR}"
FOUR = rf"\(\s*{NUMBER}(?:\s*,\s*{NUMBER}){{3}}\s*\)"
# What may stand in a text, and what may stand between tags, where nothing else is meant.
FOUND = re.compile(
    r"<ref>(?P<ref>[^<]*)</ref>|<\|object_ref_start\|>(?P<object_ref>[^<]*)<\|object_ref_end\|>"
    r"|(?P<tagged>(?:<box>|<point>|<\|box_start\|>|<\|point_start\|>)(?P<body>[^<]*)"
    r"(?:</box>|</point>|<\|box_end\|>|<\|point_end\|>)?)"
    rf"|(?P<json>\{{[^{{}}]*\}})|(?P<list>{LIST})|(?P<corners>{CORNERS})"
)
IN_TAGS = re.compile(f"{LIST}|{CORNERS}|{FOUR}|{PAIR}")
JSON_KEYS = ("bbox_2d", "bbox", "box", "point_2d", "point")
JSON_KEY = re.compile(rf'"(?:{"|".join(JSON_KEYS)})"?\s*:$')
MARKS = "\"'`*_"  # what Markdown and quotation put around a label


@dataclass(frozen=True)
class Box:
    """A place in a picture, in thousandths of its width (x) and height (y).

    (x0, y0) is the top left corner and (x1, y1) the bottom right one; of a point they are the same.
    label: what the answer calls it; empty where it does not say.
    """

    label: str
    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def is_point(self) -> bool:
        return (self.x0, self.y0) == (self.x1, self.y1)

    def pixels(self, width: int, height: int) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) in pixels of a picture of that size."""
        across, down = width / SCALE, height / SCALE
        return self.x0 * across, self.y0 * down, self.x1 * across, self.y1 * down


def parse(text: str) -> tuple[list[Box], list[str]]:
    """The boxes that a text names, in its order, and why others were left out, a line each.

    Never raises. Lists of other than two or four numbers are boxes only between tags.
    """
    boxes: list[Box] = []
    left_out: list[str] = []
    label, place, read_to = "", 0, 0
    after_ref = False
    while found := FOUND.search(text, place):
        place = found.end()
        ref = found["ref"] if found["ref"] is not None else found["object_ref"]
        if ref is not None:
            label, after_ref, read_to = _tidy(ref), True, place
            continue
        if found["json"]:
            named, places = _from_json(found["json"])
            if not places:  # a brace of another kind, with who knows what in it
                place = found.start() + 1
                continue
        else:
            between, named = text[read_to : found.start()], None
            if found["tagged"]:
                places = IN_TAGS.findall(found["body"]) or [found["tagged"]]
                if not re.search(r"\d", found["body"]):  # the tag itself is spoken of
                    continue
            else:
                places = [found[0]]
                if len(_numbers(found[0])) not in (2, 4):
                    continue
            goes_on = read_to and not re.sub(r"[\s,;\[\]]|\band\b", "", between)
            if not (after_ref or goes_on):
                named = _label_before(between)
        label = label if named is None else named
        for written in places:
            box = _box(label, written)
            if isinstance(box, Box):
                boxes.append(box)
            else:
                left_out.append(box)
        after_ref, read_to = False, place
    return boxes, left_out


def _box(label: str, written: str) -> Box | str:
    """A box, or why it is none."""
    short = " ".join(written.split())
    short = short if len(short) <= LONGEST_LABEL else short[: LONGEST_LABEL - 1] + "…"
    numbers = _numbers(written)
    if len(numbers) not in (2, 4) or not IN_TAGS.fullmatch(written):
        return f"{short}: a box has four numbers and a point two"
    if not all(0 <= number <= SCALE for number in numbers):
        return f"{short}: coordinates lie between 0 and {SCALE}"
    if max(numbers) <= 1:
        return f"{short}: coordinates are thousandths (0 to {SCALE}), not fractions of 1"
    x0, y0, x1, y1 = (numbers * 2)[:4]
    if len(numbers) == 4 and not (x0 < x1 and y0 < y1):
        return f"{short}: the second corner must lie right of the first and below it"
    return Box(label, x0, y0, x1, y1)


def _numbers(written: str) -> list[float]:
    # float and not int, which refuses more than 4300 digits; a whole one is shown as such.
    numbers = [float(number) for number in re.findall(NUMBER, written)]
    return [int(n) if n.is_integer() else n for n in numbers]


def _from_json(written: str) -> tuple[str, list[str]]:
    """(label, coordinates as written) of an object that holds boxes or points."""
    try:
        fields: Any = json.loads(written, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return "", []
    lists = [json.dumps(fields[key]) for key in JSON_KEYS if isinstance(fields.get(key), list)]
    places = [place for one in lists for place in IN_TAGS.findall(one) or [one]]
    label = fields.get("label")
    return _tidy(label) if isinstance(label, str) else "", places


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no coordinate")


def _label_before(between: str) -> str:
    """The label that ends the text before a box; empty where its last words are none."""
    head = between.rstrip(f"[ \t\r\n{MARKS}")
    touches = head == between.rstrip(f"[{MARKS}") and head[-1:].isalnum()
    if JSON_KEY.search(head):  # an object that was cut short
        labels = re.findall(r'"label"\s*:\s*"([^"]*)"', head.rpartition("{")[2])
        return _tidy(labels[-1]) if labels else ""
    if not touches and not head.endswith((":", "\uff1a")):
        return ""
    words = re.split(r"[.;!?]\s|[\n<>{}()\[\]]", head.rstrip(": \uff1a"))[-1]
    label = _tidy(re.sub(r"^[\s,;]*(?:and\s+)?(?:[-*•]\s+|\d+[.)]\s+)?", "", words))
    return label if len(label) <= LONGEST_LABEL else ""


def _tidy(label: str) -> str:
    """One line, without the marks that Markdown puts around words."""
    return " ".join(label.split()).strip(f"{MARKS} ")
