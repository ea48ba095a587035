"""The drawn world: what it asks is right, what it marks is marked, and its recipe runs."""

import functools
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mlxvlm  # noqa: E402
from examples.shapes import (  # noqa: E402
    camera,
    data,
    drawing,
    encoder,
    evaluate,
    exam,
    paraphrases,
    phrases,
    qa,
    questions,
    run,
    textures,
    wording,
    world,
)
from examples.shapes.camera import as_drawn, shoot  # noqa: E402
from examples.shapes.qa import in_one_word  # noqa: E402
from examples.shapes.tokenizer import CONTROLS, build, tokenizer_config  # noqa: E402
from examples.shapes.wording import loosely  # noqa: E402

SCENES = [world.make_scene(seed) for seed in range(240)]
DRAWN = [scene for scene in SCENES if scene.kind != "texture"]
TOKENIZER = build()
STEP = phrases.COORDINATES.step
ACROSS = world.SIZE // world.PATCH
PATCHES = ACROSS**2


def encode(text: str) -> list[str]:
    return TOKENIZER.encode(text, add_special_tokens=False).tokens


@functools.cache
def everything(scene: world.Scene) -> list[qa.QA]:
    """Every kind's question, twice, and a practice set."""
    found = [questions.ask_one(kind, scene, salt) for kind in questions.ASKERS for salt in "ab"]
    return [asked for asked in found if asked is not None] + questions.ask_many(scene, 8)


def first(kind: str, things: int | None = None, bars: int | None = None) -> world.Scene:
    """The first scene of a kind with so many things and no print, or with so many bars."""
    return next(
        s
        for s in SCENES
        if s.kind == kind
        and (things is None or (len(s.things) == things and not s.prints))
        and (bars is None or len(s.bars) == bars)
    )


# What a picture shows, read from its pixels.


@functools.cache
def ink(scene: world.Scene) -> dict[world.Thing | world.Print, tuple[float, float, float, float]]:
    """x0, y0, x1, y1 of each item in pixels of the small picture: where the picture is another
    without the item."""
    times = 2
    clean = replace(scene, look=world.Look())
    whole = np.asarray(drawing.draw(clean, times)).astype(int)
    found = {}
    for item in scene.items:
        rest = replace(
            clean,
            things=tuple(thing for thing in scene.things if thing is not item),
            prints=tuple(each for each in scene.prints if each is not item),
        )
        without = np.full_like(whole, scene.paper)
        if rest.items:
            without = np.asarray(drawing.draw(rest, times)).astype(int)
        ys, xs = np.nonzero(abs(whole - without).max(axis=-1) > 8)
        edges = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        x0, y0, x1, y1 = (int(edge) / times for edge in edges)
        found[item] = (x0, y0, x1, y1)
    return found


def middle(scene: world.Scene, item: world.Thing | world.Print) -> tuple[float, float]:
    x0, y0, x1, y1 = ink(scene)[item]
    return (x0 + x1) / 2, (y0 + y1) / 2


def ninth(scene: world.Scene, item: world.Thing | world.Print) -> tuple[int, int]:
    """Row and column in which the middle of an item's ink lies."""
    x, y = middle(scene, item)
    return int(3 * y / world.SIZE), int(3 * x / world.SIZE)


def called(item: world.Thing | world.Print) -> str:
    if isinstance(item, world.Print):
        return f"the {'number' if item.text[0] in '0123456789' else 'word'} {item.text}"
    return f"a {item.size} {item.color} {item.shape}"


def place(row: int, column: int) -> str:
    names = [
        ["top left", "top centre", "top right"],
        ["middle left", "centre", "middle right"],
        ["bottom left", "bottom centre", "bottom right"],
    ]
    return names[row][column]


# The world


def test_a_scene_is_a_function_of_its_seed():
    # Another process hashes strings differently; nothing may depend on that.
    seeds = [*range(16), first("texture").seed]
    assert {world.make_scene(seed).kind for seed in seeds} == set(world.SHARES)
    code = (
        "import hashlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "from examples.shapes import camera, data, drawing, encoder, world\n"
        "digest = hashlib.sha256()\n"
        "for seed in map(int, sys.argv[2:]):\n"
        "    scene = world.make_scene(seed)\n"
        "    digest.update(drawing.draw(scene).tobytes())\n"
        "    digest.update(encoder.labels(scene).tobytes())\n"
        "    for rows in (data.pretrain_rows, data.chat_rows, data.describe_rows):\n"
        "        digest.update(repr(rows(camera.shoot(scene), 'x')).encode())\n"
        "print(digest.hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, str(ROOT), *map(str, seeds)],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_scenes_hold_what_the_world_says():
    kinds = Counter(scene.kind for scene in SCENES)
    for kind, share in world.SHARES.items():
        assert kinds[kind] / len(SCENES) == pytest.approx(share, abs=0.08)
    assert {len(s.things) for s in SCENES if s.kind == "shapes"} == {1, 2, 3, 4, 5}
    assert {len(s.prints) for s in SCENES if s.kind == "shapes"} == {0, 1}
    assert {len(s.prints) for s in SCENES if s.kind == "printed"} == {1, 2, 3}
    assert {len(s.bars) for s in SCENES if s.kind == "bars"} == {2, 3, 4, 5}
    for scene in SCENES:
        ninths = [(item.row, item.column) for item in scene.items]
        assert ninths == sorted(set(ninths))
        for values in (
            [bar.color for bar in scene.bars],
            [each.color for each in scene.prints],
            [each.text for each in scene.prints],
        ):
            assert len(set(values)) == len(values)


def test_pictures_show_each_item_where_and_as_it_is():
    for scene in DRAWN:
        for item, (x0, y0, x1, y1) in ink(scene).items():
            # A print's box holds its glyphs' side bearings too.
            room = 1 if isinstance(item, world.Thing) else 4
            left, top, right, bottom = drawing.box(item)
            assert -1 <= x0 - left <= room and -1 <= right - x1 <= room, item
            assert -1 <= y0 - top <= room and -1 <= bottom - y1 <= room, item
            assert ninth(scene, item) == (item.row, item.column)
            assert x1 - x0 > 3 and y1 - y0 > 7, f"{item} cannot be seen"
    for scene in DRAWN[:60]:
        pixels = np.asarray(drawing.draw(replace(scene, look=world.Look()))).astype(int)
        assert pixels.shape == (96, 96, 3)
        for thing in scene.things:
            assert abs(pixels[round(thing.y), round(thing.x)] - thing.rgb).max() <= 2
        for each in scene.prints:
            # Strokes are thin: their darkest pixels have the ink's colour.
            x0, y0, x1, y1 = (round(v) for v in drawing.box(each))
            inside = pixels[max(y0, 0) : y1, max(x0, 0) : x1].reshape(-1, 3)
            assert abs(inside - each.rgb).max(axis=1).min() < 60
        for bar in scene.bars:
            column = pixels[:, round(bar.left + bar.width / 2)]
            rows = np.flatnonzero((abs(column - bar.rgb) <= 2).all(axis=1))
            assert (drawing.BASE - rows[0]) / drawing.UNIT == pytest.approx(bar.height, abs=0.2)


def test_items_stand_apart():
    for scene in SCENES:
        boxes = list(ink(scene).values()) if scene.items else []
        for i, a in enumerate(boxes):
            for b in boxes[i + 1 :]:
                gap = max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3])
                assert gap >= 0, scene.seed


def test_a_look_changes_the_picture_and_not_what_it_shows():
    scene = replace(first("shapes", things=3), look=world.Look())
    clean = np.asarray(drawing.draw(scene)).astype(int)
    for look in (
        world.Look("lined"),
        world.Look("squared"),
        world.Look("shaded"),
        world.Look(grain=8.0),
        world.Look(light=0.85),
        world.Look(jpeg=40),
    ):
        other = np.asarray(drawing.draw(replace(scene, look=look))).astype(int)
        assert 0 < abs(other - clean).mean() < 45, look
    assert len({scene.look.pattern for scene in DRAWN}) == len(set(world.PATTERNS))


def test_the_pictures_beside_the_recipe_are_scenes():
    from PIL import Image

    for name, seed in drawing.SAMPLES.items():
        scene = world.make_scene(seed)
        assert seed >= world.SPLITS["heldout"]
        with Image.open(ROOT / "examples" / "shapes" / "pictures" / f"{name}.png") as image:
            drawn = drawing.draw(scene, 4)
            # Another FreeType or libjpeg may set a pixel of an edge otherwise.
            there = np.asarray(image.convert("RGB")).astype(int)
            assert there.shape == np.asarray(drawn).shape
            assert abs(there - np.asarray(drawn)).mean() < 1
        # A picture of any size looks the same to the encoder, but for its edges.
        small = np.asarray(drawing.draw(scene)).astype(int)
        again = np.asarray(drawn.resize((96, 96), Image.Resampling.BICUBIC)).astype(int)
        assert abs(again - small).mean() < 6


@pytest.mark.parametrize("sort", textures.SORTS, ids=lambda sort: sort.__name__)
@pytest.mark.parametrize("side", [96, 192])
def test_each_sort_of_texture_fills_the_picture(sort, side):
    pictures = [sort(np.random.default_rng(seed), side) for seed in (0, 0, 1)]
    assert {(image.size, image.mode) for image in pictures} == {((side, side), "RGB")}
    again, other = (np.asarray(image) for image in pictures[1:])
    assert pictures[0].tobytes() == again.tobytes()
    for quarter in (again[: side // 2], again[side // 2 :], again[:, : side // 2]):
        assert quarter.std() > 2
    assert (again != other).mean() > 0.02


def test_pictures_with_nothing_drawn_are_of_all_sorts():
    names = []

    def counted(sort):
        return lambda rng, side: (names.append(sort.__name__), sort(rng, side))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textures, "SORTS", tuple(counted(sort) for sort in textures.SORTS))
        pictures = [textures.picture(seed, 24) for seed in range(300)]
    shares = [names.count(sort.__name__) / 300 for sort in textures.SORTS]
    assert np.allclose(shares, textures.SHARES, atol=0.08) and sum(textures.SHARES) == 1
    grey = [np.ptp(np.asarray(image, int), axis=2).max() < 2 for image in pictures]
    assert 0.05 < np.mean(grey) < 0.25


def test_some_training_pictures_show_nothing():
    kinds = [scene.kind for scene in data.scenes("train", 1500)]
    expected = world.SHARES["texture"] + data.NOTHING
    assert 0.7 * expected < kinds.count("texture") / 1500 < 1.6 * expected


def test_splits_share_no_seed():
    spans = [range(start, start + world.SPAN) for start in sorted(world.SPLITS.values())]
    assert all(a.stop <= b.start for a, b in zip(spans, spans[1:], strict=False))
    for split, start in world.SPLITS.items():
        assert next(world.seeds(split)) == start
    with pytest.raises(ValueError):
        world.seeds("train", world.SPAN)


def test_parts_of_the_training_split_share_no_seed(monkeypatch):
    """Those that write rows, pre-train the encoder and feed the guesser."""
    starts = []

    def spy(split: str, start: int = 0):
        starts.append((split, start))
        return world.seeds(split, start)

    for module in (data, encoder, exam):
        monkeypatch.setattr(module, "seeds", spy)
    chat = [scene.seed for scene in data.scenes("train", 100)]
    exam.blind_guesses(1)
    next(encoder.fresh_scenes(1))
    assert [split for split, _ in starts] == ["train"] * 3
    (_, rows), (_, guesser), (_, tower) = starts
    # 24,000 scenes of rows, 15,000 of the guesser, and each step of the tower with its own batch.
    per_scene = (chat[-1] - chat[0]) / 100
    assert rows + 24_000 * per_scene < tower < tower + 100_000_000 < guesser
    assert guesser + exam.BLIND_SCENES < world.SPAN


def test_no_held_out_picture_was_trained_on():
    """Nor is one of its drawn arrangements: positions and colours are drawn anew each time."""

    def sight(scene: world.Scene) -> tuple:
        return scene.paper, scene.things, scene.prints, scene.bars

    trained = {sight(s) for s in data.scenes("train", 2000) if s.kind != "texture"}
    held = {sight(scene) for scene, _ in exam.take("heldout", 40)}
    assert len(held) > 40 and not trained & held


def test_patches_name_what_covers_them():
    scene = first("shapes", things=3)
    found = drawing.patch_items(scene)
    side = world.SIZE // world.PATCH
    assert len(found) == PATCHES == side**2
    for thing in scene.things:
        assert found[int(thing.y) // world.PATCH * side + int(thing.x) // world.PATCH] is thing
    for i, item in enumerate(found):
        x, y = i % side * world.PATCH, i // side * world.PATCH
        touched = [
            each
            for each, (x0, y0, x1, y1) in ink(scene).items()
            if x0 < x + world.PATCH and x < x1 and y0 < y + world.PATCH and y < y1
        ]
        assert item is None or item in touched
    printed = next(s for s in SCENES if s.kind == "printed")
    assert set(drawing.patch_items(printed)) == {None, *printed.prints}
    chart = first("bars", bars=5)
    assert set(drawing.patch_items(chart)) - {None} == set(chart.bars)
    assert set(drawing.patch_items(first("texture"))) == {None}


# Questions: a second reading of question and picture must find the same answer.

SIDE = r"left of|right of|above|below"
EITHER = r"left or right of|right or left of|above or below|below or above"


def described(phrase: str, scene: world.Scene) -> list[world.Thing]:
    """The things that a phrase such as "big red star" or "blue shape" names."""
    said = {word.removesuffix("es") if word == "crosses" else word for word in phrase.split()}
    said |= {word.removesuffix("s") for word in said if word != "cross"}
    wanted = [said & set(words) for words in (world.SIZES, world.COLORS, world.SHAPES)]
    assert all(len(words) <= 1 for words in wanted), phrase
    return [
        thing
        for thing in scene.things
        if all(
            not words or value in words
            for words, value in zip(wanted, (thing.size, thing.color, thing.shape), strict=True)
        )
    ]


def only(found: list) -> Any:
    assert len(found) == 1, f"{len(found)} things fit"
    return found[0]


def beyond(side: str, scene: world.Scene, a: Any, b: Any) -> float:
    """How far the middle of a's ink lies on that side of b's, in pixels."""
    (ax, ay), (bx, by) = middle(scene, a), middle(scene, b)
    return {"left of": bx - ax, "right of": ax - bx, "above": by - ay, "below": ay - by}[side]


def solve_relation(text: str, scene: world.Scene) -> str:
    asked = rf"(?:is|does|do you see) the (.+?) (?:stand )?({SIDE}|{EITHER}) the (.+)"
    found = re.fullmatch(asked, text)
    assert found, text
    a, b = only(described(found[1], scene)), only(described(found[3], scene))
    across = "left" in found[2] or "right" in found[2]
    thirds = ("left", "centre", "right") if across else ("top", "middle", "bottom")
    said = " ".join(
        f"The {name} is in the {thirds[ninth(scene, thing)[across]]}."
        for name, thing in ((found[1], a), (found[3], b))
    )
    if " or " not in found[2]:
        far = beyond(found[2], scene, a, b)
        assert abs(far) > 5, f"{text}: too close to tell"
        ask = re.search(r"left|right|above|below", found[2])
        assert ask
        other = {"left": "right", "right": "left", "above": "below", "below": "above"}
        told = ask[0] if far > 0 else other[ask[0]]
        told += " of" if told in ("left", "right") else ""
        return f"{said} The {found[1]} is {told} the {found[3]}"
    sides = re.findall(r"left|right|above|below", found[2])
    sides = [f"{side} of" if side in ("left", "right") else side for side in sides]
    far = beyond(sides[0], scene, a, b)
    assert abs(far) > 5, f"{text}: too close to tell"
    return f"{said} The {found[1]} is {sides[0] if far > 0 else sides[1]} the {found[3]}"


def solve_next(text: str, scene: world.Scene) -> str:
    opening = r"(?:what is|which object is|what do you see|what stands)"
    found = re.fullmatch(rf"{opening} ({SIDE}) the (.+)", text)
    assert found, text
    thing = only(described(found[2], scene))
    far = {item: beyond(found[1], scene, item, thing) for item in scene.items if item is not thing}
    # Half way between "on this side" and "on the other" stands nothing.
    assert not any(3 < along < 5 for along in far.values())
    beside = [item for item, along in far.items() if along > 3]
    said = f"The {found[2]} is in the {place(*ninth(scene, thing))}. {found[1].capitalize()} it"
    if not beside:
        return f"{said} is nothing"
    return f"{said}, in the {place(*ninth(scene, only(beside)))}, is {called(only(beside))}"


def solve_at(words: list[str], scene: world.Scene) -> str:
    row = next((i for i, word in enumerate(("top", "", "bottom")) if word in words), 1)
    column = next((i for i, word in enumerate(("left", "", "right")) if word in words), 1)
    held = [item for item in scene.items if ninth(scene, item) == (row, column)]
    return called(only(held)) if held else "nothing"


def solve_bars(kind: str, words: list[str], scene: world.Scene) -> str:
    if kind == "bars_count":
        return world.NUMBERS[len(scene.bars)]
    if kind == "bar_value":
        bars = [bar for bar in scene.bars if bar.color in words]
        return f"at {world.NUMBERS[only(bars).height]}" if bars else "not there"
    heights = sorted(bar.height for bar in scene.bars)
    limit = heights[-1] if "tallest" in words else heights[0]
    return only([bar for bar in scene.bars if bar.height == limit]).color


def solve_printed(kind: str, words: list[str], scene: world.Scene) -> str:
    """The text asked for by what it is, or by its ink."""
    if kind == "text":
        found = [each for each in scene.prints if each.color in words]
        return f"says {only(found).text}" if found else "is not there"
    found = [each for each in scene.prints if each.text.isdigit() == (kind == "number")]
    return only(found).text if found else "not there"


def solve_describe(scene: world.Scene) -> str:
    if scene.bars:
        bars = sorted(scene.bars, key=lambda bar: bar.left)
        return ", ".join(f"{bar.color} {world.NUMBERS[bar.height]}" for bar in bars)
    parts = sorted((ninth(scene, item), called(item)) for item in scene.items)
    return ". ".join(f"{place(*where).capitalize()}: {what}" for where, what in parts)


def solve(kind: str, question: str, scene: world.Scene) -> str:
    """The end of the answer, from the picture and the question's text alone."""
    text = question.lower().rstrip("?.")
    words = re.findall(r"[a-z]+", text)
    if kind == "outside":
        return phrases.OUTSIDE.rstrip(".")
    if kind == "describe":
        return solve_describe(scene)
    if kind == "relation":
        return solve_relation(text, scene)
    if kind == "next":
        return solve_next(text, scene)
    if kind == "at":
        return solve_at(words, scene)
    if kind.startswith("bar"):
        return solve_bars(kind, words, scene)
    if kind in ("number", "word", "text"):
        return solve_printed(kind, words, scene)
    if kind == "type":
        return "Yes" if scene.bars else "No"
    if kind == "where" and ("number" in words or "word" in words):
        found = [each for each in scene.prints if each.text.isdigit() == ("number" in words)]
        return "in the " + place(*ninth(scene, only(found)))
    if kind == "largest":
        area = {}
        for thing in scene.things:
            x0, y0, x1, y1 = ink(scene)[thing]
            area[thing] = (x1 - x0) * (y1 - y0)
        ranks = sorted(scene.things, key=lambda thing: area[thing])
        ranks = ranks if "smallest" in words else ranks[::-1]
        ratio = area[ranks[0]] / area[ranks[1]]
        assert max(ratio, 1 / ratio) > 1.01, f"{question}: too alike in scene {scene.seed}"
        return f"a {ranks[0].color} {ranks[0].shape}"
    size = kind == "size"
    things = described(" ".join(w for w in words if not (size and w in world.SIZES)), scene)
    if kind.startswith("count"):
        places = [place(*where) for where in sorted(ninth(scene, thing) for thing in things)]
        return f": {', '.join(places) or 'nothing'}. The number is {world.NUMBERS[len(things)]}"
    if kind == "yesno":
        return "Yes" if things else "No"
    if not things:
        return "not there"
    thing = only(things)
    return {
        "shape": f"a {thing.shape}",
        "color": thing.color,
        "size": thing.size,
        "where": "in the " + place(*ninth(scene, thing)),
        "where_cs": "in the " + place(*ninth(scene, thing)),
    }[kind]


def test_each_answer_follows_from_the_picture():
    checked = Counter()
    for scene in SCENES:
        for asked in everything(scene):
            if asked.kind == "box":
                continue
            wanted = solve(asked.kind, asked.question, scene) + "."
            told = (
                asked.answer.replace(":", " :") if asked.kind.startswith("count") else asked.answer
            )
            assert (" " + told).endswith(" " + wanted), (scene.seed, asked)
            checked[asked.kind] += 1
    assert set(checked) == set(questions.ASKERS) - {"box"}
    assert min(checked.values()) > 20, checked


def test_boxes_are_those_of_the_ink():
    checked = 0
    for scene in SCENES:
        for asked in everything(scene):
            if asked.kind != "box":
                continue
            name = re.sub(r"[^a-z ]", "", asked.question.lower()).split(" the ")[-1]
            name = name.replace("box of the ", "")
            thing = only(described(name, scene))
            found = re.fullmatch(r"The (.+) is at \[(\d+), (\d+), (\d+), (\d+)\]\.", asked.answer)
            assert found and found[1] == name, asked
            for said, seen in zip(found.groups()[1:], ink(scene)[thing], strict=True):
                assert int(said) in phrases.COORDINATES
                assert abs(int(said) - 1000 * seen / world.SIZE) <= STEP, (scene.seed, asked)
            checked += 1
    assert checked > 100


def test_boxes_are_asked_of_scenes_that_lie_as_drawn():
    shots = [shoot(scene) for scene in SCENES]
    assert any(shot.map is not None for shot in shots)
    for shot in shots:
        found = data.boxes(shot, 2)
        assert len(found) <= 2 and all("box" in qa.ask for qa in found)
        if shot.map is not None or shot.scene.kind not in ("shapes", "texture"):
            assert not found
    assert len(data.boxes(as_drawn(first("shapes")), 1)) == 1


def test_coordinates_are_the_nearest_step_and_stay_below_a_thousand():
    assert [phrases.coordinate(v) for v in (0, 0.009, 0.011, 0.5, 0.98)] == [0, 0, 20, 500, 980]
    assert phrases.coordinate(1.0) == 980 and phrases.coordinate(-0.01) == 0


def test_nothing_is_said_of_a_picture_with_nothing_drawn():
    textures = [scene for scene in SCENES if scene.kind == "texture"]
    asked = [each for scene in textures for each in everything(scene)]
    assert len(textures) > 3 and len({each.ask for each in asked}) > 50
    assert {(each.kind, each.answer, each.marks) for each in asked} == {
        ("outside", phrases.OUTSIDE, ())
    }
    # They are the questions that other scenes get, in their words.
    asks = {each.ask for scene in DRAWN for each in everything(scene)}
    assert len(asks & {each.ask for each in asked}) > 50
    assert all(exam.exam(scene) == [] for scene in textures)


def test_one_question_is_asked_once():
    for scene in SCENES:
        asked = questions.ask_many(scene, 8)
        assert len(asked) == len({each.ask for each in asked}) >= 4


def test_descriptions_name_everything_in_order():
    scene = first("shapes", things=2)
    answer = questions.ask_one("describe", scene).answer
    assert answer == " ".join(
        f"{t.place.capitalize()}: a {t.size} {t.color} {t.shape}." for t in scene.things
    )
    chart = first("bars")
    answer = questions.ask_one("describe", chart).answer
    assert answer.startswith("A bar chart: ")
    assert re.findall(r"(\w+) (\w+)[,.]", answer) == [
        (bar.color, world.NUMBERS[bar.height]) for bar in chart.bars
    ]
    both = next(s for s in SCENES if s.things and s.prints)
    answer = questions.ask_one("describe", both).answer
    assert answer.count(":") == len(both.items) and called(both.prints[0]) in answer


def test_some_answers_say_that_there_is_none():
    answers = Counter()
    for scene in DRAWN:
        for asked in (*exam.exam(scene), *exam.exam(scene, salt="other")):
            none = asked.answer.endswith(("not there.", "nothing.", "zero.", "No."))
            answers[asked.kind, none] += 1
    always = "count_all size largest bars_count bar_extreme describe relation".split()  # there
    for kind in questions.SCORED:
        share = answers[kind, True] / (answers[kind, True] + answers[kind, False])
        if kind in always:
            assert share == 0, kind
        else:
            assert 0.04 < share < 0.7, (kind, share)


def test_questions_come_in_several_phrasings():
    for kind, templates in phrases.ASKS.items():
        least = 2 if kind == "relation_or" else 3
        assert len(set(templates)) == len(templates) >= least, kind
        signs = [re.sub(r"[^|^]", "", template) for template in templates]
        expected = {"relation": "||", "relation_or": "||", "describe": "^"}.get(kind, "|")
        assert set(signs) == {expected}
    text = [asked.question for scene in SCENES for asked in everything(scene)]
    assert not any(sign in question for question in text for sign in "|^{}")
    assert any("colour" in q for q in text) and any("color" in q for q in text)
    assert any(q[0].islower() for q in text) and any(q[0].isupper() for q in text)


def test_no_wording_is_of_two_kinds():
    """A question's words say its kind, so that they cannot have two answers."""
    kinds: dict[tuple[int, str], set[tuple[str, str]]] = {}
    for scene in DRAWN:
        for asked in everything(scene):
            # where_cs asks as where does, of a colour and a shape.
            text = asked.question.lower().rstrip("?.")
            kinds.setdefault((scene.seed, text), set()).add((asked.ask, asked.answer))
    assert all(len(found) == 1 for found in kinds.values())


# Marks and targets


def test_marks_stand_behind_key_words_and_name_what_they_refer_to():
    for scene in SCENES:
        for asked in everything(scene):
            for mark in asked.marks:
                text = (asked.question, asked.answer)[mark.turn]
                assert 0 < mark.end <= len(text)
                assert sum(mark.words.values()) == pytest.approx(1, abs=0.02)
                if asked.kind in ("where", "color", "shape", "size", "where_cs", "relation", "box"):
                    key = re.findall(r"[a-z]+$", text[: mark.end])[0]
                    assert key in mark.words or set(mark.words) == {"nothing"}, asked
            grounded = {"describe": None, "outside": [], "relation": [0, 0, 1, 1]}
            told = [(mark.turn, mark.target) for mark in asked.marks]
            if asked.kind != "describe":
                keys = grounded.get(asked.kind, [0, 1])
                assert [turn for turn, target in told if target == "ground"] == keys, asked
                # What is listed is found by way of what came before; at the end nothing is left.
                follows = int(asked.kind == "next")
                if asked.kind.startswith("count"):
                    follows = 1 if "nothing" in asked.answer else 2 + asked.answer.count(",")
                assert told[len(keys) :] == [(1, "follow")] * follows, asked


def test_marks_of_two_steps_name_both():
    checked = 0
    for scene in DRAWN:
        for asked in everything(scene):
            if asked.kind == "relation":
                names = re.fullmatch(r"The (.+?) is in .+?\. The (.+?) is in .+", asked.answer)
                assert names, asked
                two = [qa.ground(described(name, scene)) for name in names.groups()]
                assert [mark.words for mark in asked.marks] == two * 2
                for mark in asked.marks:
                    text = (asked.question, asked.answer)[mark.turn]
                    assert re.search(rf"(?:{names[1]}|{names[2]})$", text[: mark.end])
            elif asked.kind == "next":
                start, *_, then = asked.answer.removesuffix(".").split(" is ")
                key = described(start.removeprefix("The "), scene)
                beside = [item for item in scene.items if called(item) == then]
                in_question, in_answer, follow = asked.marks
                assert in_question.words == in_answer.words == qa.ground(key)
                assert re.search(r"(?:of|Above|Below) it$", asked.answer[: follow.end])
                # Two things may look alike; then the words are the same.
                assert follow.words == (
                    {"nothing": 1.0} if then == "nothing" else follow.words
                ) and (then == "nothing" or follow.words in [qa.ground([i]) for i in beside])
                checked += 1
    assert checked > 50


def test_descriptions_mark_each_item_and_what_comes_next():
    scene = first("shapes", things=2)
    asked = questions.ask_one("describe", scene)
    a, b = (qa.ground([thing]) for thing in scene.things)
    assert [(mark.words, mark.target) for mark in asked.marks] == [
        (a, "follow"),
        (a, "ground"),
        (b, "follow"),
        (b, "ground"),
        (qa.ground([]), "follow"),
    ]
    ends = [asked.answer[: mark.end].split()[-1][-1] for mark in asked.marks if mark.turn]
    assert [end == "." for end in ends] == [False, True, False, True]
    chart = first("bars", bars=2)
    asked = questions.ask_one("describe", chart)
    ends = [asked.answer[: mark.end].split()[-1] for mark in asked.marks if mark.turn]
    one, two = chart.bars
    ends_wanted = ["chart:", one.color, f"{world.NUMBERS[one.height]},", two.color]
    assert ends == [*ends_wanted, f"{world.NUMBERS[two.height]}."]
    likeliest = [max(mark.words, key=lambda word: mark.words[word]) for mark in asked.marks]
    heights = [world.NUMBERS[bar.height] for bar in chart.bars]
    assert likeliest == [one.color, one.color, heights[0], two.color, heights[1], "nothing"]


def test_plurals_are_marked_at_their_stems():
    for word, stem in (("circles", "circle"), ("crosses", "cross"), ("hearts", "heart")):
        text, marks = qa.lift(f"How many {word}| are there^?", 0, [{"one": 1.0}, {"two": 1.0}])
        assert text == f"How many {word} are there?"
        assert text[: marks[0].end].endswith(" " + stem)
        assert marks[1] == qa.Mark(0, len(text) - 1, {"two": 1.0}, "follow")


def test_grounding_weighs_words():
    a, b = first("shapes", things=2).things
    words = qa.ground([a, b], 2)
    assert words["two"] == pytest.approx(1 / 3, abs=0.01)
    assert set(words) == {*a.words, *b.words, "two"}
    assert qa.ground([]) == {"nothing": 1.0}
    bar = first("bars").bars[0]
    assert qa.ground([bar]) == {bar.color: 0.25, world.NUMBERS[bar.height]: 0.75}
    each = next(s for s in SCENES if s.prints).prints[0]
    words = qa.ground([each])
    assert words[each.text] == pytest.approx(3 / 7, abs=0.01) and set(words) == set(each.words)


def test_rows_carry_targets_in_the_trainers_form():
    for scene in SCENES[:60]:
        for rows in (
            data.pretrain_rows(shoot(scene), "a.png"),
            data.chat_rows(shoot(scene), "a.png"),
            data.describe_rows(shoot(scene), "a.png"),
        ):
            assert ["align" in row["targets"] for row in rows] == [True] + [False] * (len(rows) - 1)
            for row in rows:
                roles = [m["role"] for m in row["messages"]]
                assert roles == ["user", "assistant"] * (len(roles) // 2)
                for target in (*row["targets"]["ground"], *row["targets"]["follow"]):
                    text = row["messages"][target["turn"]]["content"]
                    assert re.search(r"[a-z.,:]$", text[: target["end"]])
            aligned = rows[0]["targets"]["align"]
            assert bool(aligned) == (scene.kind != "texture")
            for target in aligned:
                assert target["image"] == 0 and 0 <= target["token"] < PATCHES
                assert target["words"]
    assert {len(row["messages"]) for row in data.chat_rows(as_drawn(first("shapes")), "a.png")} == {
        8
    }


def test_empty_patches_say_the_place_that_holds_most_of_them():
    side = world.SIZE // world.PATCH
    checked = 0
    for scene in DRAWN[:80]:
        held = drawing.patch_items(scene)
        for target in data.align(scene):
            if held[target["token"]] is None:
                y, x = (i * world.PATCH + world.PATCH / 2 for i in divmod(target["token"], side))
                words = world.place_words(int(y // world.CELL), int(x // world.CELL))
                assert target["words"] == ["nothing", *words], (scene.seed, target)
                checked += 1
    assert checked > 100


# Shots


def test_shots_show_the_scene_where_the_map_says():
    """Things' own colour stands where each came to lie, and questions are about that place."""
    shots = [camera.shoot(scene) for scene in SCENES]
    assert 0.15 < sum(shot.map is not None for shot in shots) / len(shots) < camera.SHOTS
    checked = 0
    for scene, shot in zip(SCENES, shots, strict=True):
        assert shot.image.size == (world.SIZE, world.SIZE)
        assert camera.in_place(scene, shot.scene)
        pixels = np.asarray(shot.image).astype(float)
        labels = encoder.labels(shot.drawn, shot.map)
        for thing in shot.scene.things:
            row, column = (int(v // world.PATCH) for v in (thing.y, thing.x))
            there = labels[row * (world.SIZE // world.PATCH) + column]
            assert encoder.GROUPS[0][there[0]] == thing.shape
            light = pixels[round(thing.y), round(thing.x)]
            far = {
                color: np.linalg.norm(light - np.array(rgb) * light.sum() / sum(rgb))
                for color, rgb in world.COLORS.items()
                if color != "black"
            }
            checked += min(far, key=lambda color: far[color]) == thing.color
    total = sum(t.color != "black" for shot in shots for t in shot.scene.things)
    assert checked > 0.8 * total


def test_a_map_moves_boxes_as_it_moves_the_picture():
    scene = replace(first("shapes", things=3), look=world.Look(), paper=(255, 255, 255))
    for found in (camera.turned(9), camera.cornered(np.full((4, 2), 0.07))):
        image = camera.warp(drawing.draw(scene, 4), found, (255, 255, 255))
        dark = np.asarray(image.resize((96, 96)).convert("L")) < 200
        boxes = [drawing.spread(drawing.box(item), found) for item in scene.items]
        inside = np.zeros_like(dark)
        for x0, y0, x1, y1 in boxes:
            inside[int(y0) : int(y1) + 2, int(x0) : int(x1) + 2] = True
        assert dark.any() and not (dark & ~inside).any()
    assert camera.turned(0) == pytest.approx(np.eye(3), abs=1e-9)
    assert camera.cornered(np.zeros((4, 2))) == pytest.approx(np.eye(3), abs=1e-9)


# The tokenizer


def test_every_word_is_one_token_wherever_it_stands():
    # " [" and "]." are one each; before a number a space stands alone, as in Llama 3.
    piece = r"\n\n| ?[A-Za-z]+|\d+| (?=\d)| \[|\]\.|[^\w\s]"
    for scene in SCENES:
        for asked in everything(scene):
            for text in ("\n\n" + asked.question, asked.answer):
                tokens = encode(text)
                assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text
                if text == asked.answer or asked.question not in phrases.OUTSIDE_ASKS:
                    pieces = re.findall(piece, text)
                    assert "".join(pieces) == text
                    plurals = sum(token in ("s", "es") for token in tokens)
                    assert len(tokens) == len(pieces) + plurals, text
            for mark in asked.marks:
                text = (asked.question, asked.answer)[mark.turn]
                assert mark.end in [end for _, end in TOKENIZER.encode(text).offsets]
                # Numbers have no form with a space.
                forms = [word if word.isdigit() else " " + word for word in mark.words]
                assert all(len(encode(form)) == 1 for form in forms)
    for word in phrases.vocabulary():
        for form in (word, word.capitalize(), " " + word, " " + word.capitalize()):
            assert len(encode(form)) == 1
    for text in phrases.printed():
        assert len(encode(text)) == 1
        assert text.isdigit() or len(encode(" " + text)) == 1


@pytest.mark.parametrize(
    "text", ["naïve café 漢字 🙂", "x\ty\r\n\r\n  z", "12345 <|eot_id|", "\u0000"]
)
def test_any_text_survives(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_control_tokens_and_template():
    for name in CONTROLS:
        assert TOKENIZER.token_to_id(name) is not None
    template = tokenizer_config()["chat_template"]
    jinja2 = pytest.importorskip("jinja2")
    text = jinja2.Template(template).render(
        bos_token="<|begin_of_text|>",
        messages=[{"role": "user", "content": "How many circles?"}],
        add_generation_prompt=True,
    )
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHow many circles?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    # Four tokens open a turn.
    assert len(encode("<|start_header_id|>assistant<|end_header_id|>\n\n")) == 4


# The encoder's labels, and the evaluation's arithmetic


def named(classes: np.ndarray) -> list[str]:
    return [group[i] for group, i in zip(encoder.GROUPS, classes, strict=True)]


def test_labels_of_patches_and_slots():
    scene = first("shapes", things=4)
    found = encoder.labels(scene)
    assert found.shape == (PATCHES + encoder.QUERIES, len(encoder.GROUPS))
    for thing in scene.things:
        label = named(found[PATCHES + 3 * thing.row + thing.column])
        assert label[: encoder.SEEN] == [thing.shape, thing.size, thing.color, "", "", "", ""]
        for edge, seen in zip(label[encoder.SEEN : -1], ink(scene)[thing], strict=True):
            assert abs(int(edge) - 1000 * seen / world.SIZE) <= STEP
    empty = [slot for slot in found[PATCHES:] if not slot.any()]
    assert len(empty) == encoder.QUERIES - 4
    printed = next(s for s in SCENES if {p.kind for p in s.prints} == {"number", "word"})
    for each in printed.prints:
        label = named(encoder.labels(printed)[PATCHES + 3 * each.row + each.column])
        kind, size, color, height, tens, units, word = label[: encoder.SEEN]
        assert (kind, size, color, height) == (each.kind, "", each.color, "")
        assert (tens + units or word) == each.text and not (tens + units and word)
        shown = drawing.patch_letters(printed)
        for letter, (x0, y0, x1, y1) in drawing.letters(each):
            patch = int((y0 + y1) / 2) // world.PATCH * ACROSS + int((x0 + x1) / 2) // world.PATCH
            assert shown[patch] in each.text and letter in shown
    chart = first("bars")
    for i, bar in enumerate(chart.bars):
        label = named(encoder.labels(chart)[PATCHES + 9 + i])
        assert label[:4] == ["bar", "", bar.color, world.NUMBERS[bar.height]]
    texture = encoder.labels(first("texture"))
    assert {named(patch)[0] for patch in texture[:PATCHES]} == {"texture"}
    assert not texture[PATCHES:].any() and not texture[:, 1:].any()


def test_a_page_is_full_of_print_and_asks_nothing_of_slots():
    pages = [encoder.page(seed) for seed in range(20)]
    assert min(len(page.prints) for page in pages) > 6
    for page in pages:
        found = encoder.labels(page)
        assert (found[PATCHES:] == encoder.IGNORE).all() and (found[:PATCHES] >= 0).all()
        assert (found[:PATCHES, -1] > 0).mean() > 0.4
    made = next(encoder.fresh_scenes(100, pages=encoder.PAGES))
    assert 15 < sum(len(scene.prints) > world.MAX_PRINTS for scene in made) < 50


def test_one_word_is_the_looked_up_one():
    told = Counter()
    for scene in SCENES:
        for asked in questions.ask_many(scene, 8):
            short = in_one_word(asked)
            if short is None:
                assert asked.kind in ("at", "where", "where_cs", "next", "relation", "outside") or (
                    asked.answer.endswith("not there.")
                )
                continue
            told[short.kind] += 1
            assert asked.answer.endswith(f" {short.answer}.")
            assert short.question.endswith(phrases.IN_ONE_WORD)
            assert len(encode("\n\n" + short.answer)) == 2
    assert len(told) > 10


def test_loose_wording_keeps_the_question_and_its_keys():
    rng = random.Random(0)
    changed = 0
    for scene in SCENES:
        for asked in questions.ask_many(scene, 8):
            loose = loosely(asked, rng)
            changed += loose.question != asked.question
            assert (loose.answer, loose.ask) == (asked.answer, asked.ask)
            for mark, before in zip(loose.marks, asked.marks, strict=True):
                assert (mark.turn, mark.words) == (before.turn, before.words)
                if mark.turn == 0 and mark.target == "ground":
                    # The same word, but for a slip, which leaves its first letter.
                    keys = [
                        q[: m.end].lower()
                        for q, m in ((asked.question, before), (loose.question, mark))
                    ]
                    key, now = (re.findall(r"[a-z]+$", text)[0] for text in keys)
                    assert now[0] == key[0] and len(set(key) ^ set(now)) <= 1, loose
                if mark.turn == 0:
                    assert mark.end in [end for _, end in TOKENIZER.encode(loose.question).offsets]
                else:
                    assert mark == before
    assert changed > 1000


def test_other_words_say_what_the_vocabulary_need_not_know():
    assert set(wording.OTHERWISE) == set(phrases.ASKS)
    taught = {text for kind in phrases.ASKS for text in phrases.ASKS[kind]}
    for kind, templates in wording.OTHERWISE.items():
        signs = {re.sub(r"[^|^]", "", template) for template in (*templates, *phrases.ASKS[kind])}
        assert len(signs) == 1 and not taught & set(templates), kind
        # What nobody is taught measures how other words are understood.
        asked = {re.sub(r"[|^]", "", template) for template in templates}
        assert not asked & set(paraphrases.PARAPHRASES.get(kind, ()))


def test_wilson_interval():
    low, high = exam.wilson(90, 100)
    assert (low, high) == (pytest.approx(0.8256, abs=1e-3), pytest.approx(0.9448, abs=1e-3))
    assert exam.wilson(0, 0) == (0.0, 1.0)


def test_the_guesser_knows_frequencies_only():
    guesses = exam.blind_guesses(300)
    assert guesses["count"].startswith("The shapes: ")
    assert all(math.isfinite(len(answer)) for answer in guesses.values())
    assert guesses == exam.blind_guesses(300)


def test_exams_ask_each_scored_kind():
    asked = [(scene, each) for scene in SCENES for each in exam.exam(scene)]
    assert {each.kind for _, each in asked} == {*questions.SCORED, "box"}
    for scene, each in asked:
        if each.kind in ("bar_value", "bars_count", "bar_extreme"):
            assert scene.bars
        elif each.kind in ("number", "word", "text"):
            assert scene.prints
        elif each.kind not in ("describe", "at"):
            assert scene.things
    taken = exam.take("heldout", 7)
    assert Counter(each.kind for _, each in taken) == dict.fromkeys((*questions.SCORED, "box"), 7)
    pairs = [(scene.seed, each.kind) for scene, each in taken]
    assert len(set(pairs)) == len(pairs)
    assert all(world.SPLITS["heldout"] <= seed < 3 * world.SPAN for seed, _ in pairs)
    assert taken == exam.take("heldout", 7)
    assert {each.kind for _, each in exam.take("progress", 2, ("next", "box"))} == {"next", "box"}


def test_overlap_of_boxes():
    def said(*numbers: int) -> str:
        return f"The star is at {list(numbers)}."

    wanted = said(100, 200, 300, 400)
    assert evaluate.overlap(wanted, wanted) == 1.0
    assert evaluate.overlap(said(200, 200, 400, 400), wanted) == pytest.approx(1 / 3)
    assert evaluate.overlap(said(500, 500, 600, 600), wanted) == 0.0
    # Boxes inside out, points, other scales, and none at all.
    for other in (said(300, 400, 100, 200), said(200, 300), said(1, 2, 3), "The star is red.", ""):
        assert evaluate.overlap(other, wanted) == 0.0


# What was shipped


def test_the_readme_shows_the_evaluation():
    result = json.loads((ROOT / "examples" / "shapes" / "evaluation.json").read_text())
    readme = (ROOT / "examples" / "shapes" / "README.md").read_text()
    assert evaluate.table(result) in readme
    scores = {score["kind"]: score for score in result["kinds"]}
    assert result["split"] == "heldout" and list(scores) == list(questions.SCORED)
    assert all(score["asked"] == 500 for score in scores.values())
    assert result["mean"] == pytest.approx(np.mean([s["right"] for s in scores.values()]))
    assert result["generated"]["agree"] == result["generated"]["asked"]
    right, *later = result["chats"]["right"]
    assert min(later) >= right - 10


def test_the_shipped_model_answers():
    # A few fresh scenes: enough to see that the file is the trained one, and still read as it was.
    vlm = mlxvlm.load(ROOT / "weights" / "demo", dtype="float32")
    taken = exam.take("progress", 5, questions.SCORED)
    pictures = evaluate.features(vlm, (scene for scene, _ in taken))
    verdicts = evaluate.right_answers(vlm, [(pictures[scene.seed], each) for scene, each in taken])
    assert len(verdicts) == 5 * len(questions.SCORED)
    assert sum(verdicts) >= 0.8 * len(verdicts)
    stranger = [{"role": "user", "content": "What is the capital of Spain?"}]
    picture = ROOT / "examples" / "shapes" / "pictures" / "scene.png"
    assert vlm.generate(stranger, [picture]).text == phrases.OUTSIDE
    texture = drawing.draw(first("texture"))
    asked = [{"role": "user", "content": "How many shapes are there?"}]
    assert vlm.generate(asked, [texture]).text == phrases.OUTSIDE


def test_the_shipped_tokenizer_is_the_one_built_here():
    shipped = json.loads((ROOT / "weights" / "demo" / "tokenizer.json").read_text())
    assert shipped == json.loads(TOKENIZER.to_str())


# The recipe


def test_the_recipe_runs_at_toy_length(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "examples.shapes.run", "--out", str(tmp_path), "--tiny"]
        + ["--ship", str(tmp_path / "shipped")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in run.STAGES:
        assert f"{stage}: python -m" in done.stdout
    result = json.loads((tmp_path / "evaluation.json").read_text())
    kinds = len(questions.SCORED)
    assert [score["asked"] for score in result["kinds"]] == [2] * kinds
    assert result["generated"]["asked"] == result["generated"]["agree"] == kinds
    assert result["boxes"]["asked"] == 2 and 0 <= result["boxes"]["mean_iou"] <= 1
    start = mx.load(str(tmp_path / "language" / "model.safetensors"))
    for name in (n for n in start if n.endswith("k_proj.weight")):
        assert mx.array_equal(start[name], 1.5 * start[name.replace("k_proj", "q_proj")])
    lines = (tmp_path / "pretrain" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(step["ground_loss"] > 0 and step["align_loss"] > 0 for step in steps)
    shipped = {file.name for file in (tmp_path / "shipped").iterdir()}
    assert shipped == {"config.json", "model.safetensors", "tokenizer.json"} | {
        "tokenizer_config.json"
    }
