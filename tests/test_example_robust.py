"""Other conditions do what their rows say, and the rows measure what they should."""

import random
import re
import string
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tiny_vlm import tiny_vlm  # noqa: E402

from examples.shapes import (  # noqa: E402
    camera,
    conditions,
    evaluate,
    exam,
    paraphrases,
    photographs,
    phrases,
    questions,
    robust,
    world,
)
from examples.shapes.drawing import box, draw  # noqa: E402
from examples.shapes.qa import QA, turns  # noqa: E402
from mlxvlm.images.open import open_picture  # noqa: E402
from mlxvlm.prompts import Prompt  # noqa: E402

SCENES = [s for s in map(world.make_scene, range(120)) if s.kind != "texture"]
CLEAN = [replace(s, look=world.Look()) for s in SCENES]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), float)


# Pictures


@pytest.mark.parametrize("orientation", [6, 3, 8])
def test_a_phone_file_comes_out_upright(tmp_path, orientation):
    scene = next(s for s in CLEAN if s.bars)
    wide = draw(scene, 4).resize((384, 288))
    path = conditions.store(wide, tmp_path / "a.jpg", orientation)
    with Image.open(path) as stored:
        assert stored.size == (wide.size if orientation == 3 else wide.size[::-1])
        lying = pixels(stored.resize(wide.size))
    upright, _ = open_picture(path)
    assert upright.size == wide.size
    assert abs(pixels(upright) - pixels(wide)).mean() < 2
    assert abs(lying - pixels(wide)).mean() > 20


def test_phone_files_use_every_orientation(tmp_path):
    tags = set()
    for scene in CLEAN[:9]:
        with Image.open(conditions.sideways(scene, tmp_path)) as stored:
            tags.add(stored.getexif()[0x0112])
    assert tags == {3, 6, 8}


def test_a_landscape_canvas_keeps_each_thing_in_its_ninth():
    for scene in [s for s in CLEAN if s.things][:20]:
        image = pixels(conditions.landscape(scene))
        assert image.shape == (96, 128, 3)
        for thing in scene.things:
            spot = image[int(thing.y), int(thing.x * 4 / 3)]
            assert abs(spot - thing.rgb).max() < 40
    chart = next(s for s in CLEAN if s.bars)
    image = pixels(conditions.landscape(chart))
    for bar in chart.bars:
        x0, y0, x1, y1 = box(bar)
        assert abs(image[int(y1) - 3, int((x0 + x1) * 2 / 3)] - bar.rgb).max() < 20


@pytest.mark.parametrize("name", ["tilt", "camera"])
def test_things_move_as_the_maps_say(name):
    for scene in [s for s in CLEAN if s.things][:10]:
        found = conditions.tilt(scene, 10) if name == "tilt" else conditions.camera(scene)
        image = camera.warp(conditions.larger(scene), found, scene.paper)
        for thing, moved in zip(scene.things, camera.moved(scene, found).things, strict=True):
            spot = pixels(image)[int(4 * moved.y), int(4 * moved.x)]
            assert abs(spot - thing.rgb).max() < 40
        for corner in ((0, 0, 1), (96, 0, 1), (0, 96, 1), (96, 96, 1)):
            x, y, w = found @ corner
            assert -0.01 <= x / w <= 96.01 and -0.01 <= y / w <= 96.01


def test_a_tilt_turns_by_the_angle():
    for scene in CLEAN[:4]:
        found = conditions.tilt(scene, 10)
        across = found @ (96, 48, 1) - found @ (0, 48, 1)
        assert abs(np.degrees(np.arctan2(across[1], across[0]))) == pytest.approx(10)


def test_steady_questions_keep_their_answers():
    kept = lost = 0
    for scene in SCENES:
        for qa in exam.exam(scene, questions.SCORED):
            turned = camera.moved(scene, conditions.tilt(scene, 10))
            if not conditions.stays(scene, qa, [conditions.tilt(scene, 10)]):
                lost += 1
                continue
            kept += 1
            assert questions.ask_one(qa.kind, turned, "exam").answer == qa.answer
            assert [t.place for t in turned.things] == [t.place for t in scene.things]
    assert kept > lost > 0


def test_the_other_pictures_are_as_named():
    scene = next(s for s in CLEAN if s.things and s.prints)
    assert conditions.larger(scene).size == (384, 384)
    assert conditions.shrunk(scene).size == (64, 64)
    assert np.ptp(pixels(conditions.greyscale(scene)), axis=-1).max() == 0
    plain = pixels(draw(scene))
    for changed in (conditions.jpeg(scene), conditions.grey_paper(scene)):
        assert abs(pixels(changed) - plain).mean() > 0.5
    corner = pixels(conditions.grey_paper(scene))[0, 0]
    assert corner == pytest.approx(conditions.GREY, abs=12)
    taken = conditions.photographed(scene)
    assert taken.size == (384, 384) and abs(pixels(taken.resize((96, 96))) - plain).mean() > 5
    assert pixels(taken).tolist() == pixels(conditions.photographed(scene)).tolist()


def test_other_typefaces_stay_in_their_places():
    fonts = conditions.installed()
    if not fonts:
        pytest.skip("this machine has none of the typefaces.")
    assert conditions.installed(["no such typeface.ttf"]) == []
    for scene in [s for s in CLEAN if s.prints and not s.things][:20]:
        plain, other = (pixels(f) for f in (draw(scene), conditions.typeset(scene, fonts)))
        assert abs(plain - other).max() > 60
        for y, x in np.argwhere(abs(other - scene.paper).max(-1) > 24):
            assert any(
                abs(x + 0.5 - p.x) <= p.reach[0] + 1.5 and abs(y + 0.5 - p.y) <= p.reach[1] + 1.5
                for p in scene.prints
            )


# Words


def bare(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9{}_]+", text.lower()))


def test_no_paraphrase_is_known_from_training():
    assert set(paraphrases.PARAPHRASES) == set(phrases.ASKS) - {"box", "type"}
    known = {
        bare(t.replace("|", "").replace("^", "").format_map(_Spelt(picture, colour)))
        for templates in phrases.ASKS.values()
        for t in templates
        for picture in ("picture", "image")
        for colour in ("colour", "color")
    }
    for template, texts in paraphrases.PARAPHRASES.items():
        assert len(texts) == 3 and not {bare(text) for text in texts} & known, template
        slots = {
            name for t in phrases.ASKS[template] for _, name, *_ in string.Formatter().parse(t)
        }
        for text in texts:
            assert {name for _, name, *_ in string.Formatter().parse(text)} <= slots
    assert not {bare(q) for q in photographs.ORDINARY} & {bare(q) for q in phrases.OUTSIDE_ASKS}
    assert not {bare(q) for q in photographs.ORDINARY} & known


class _Spelt(dict):
    """Fills in the spelling, and leaves the other slots as they are."""

    def __init__(self, picture: str, colour: str):
        super().__init__(picture=picture, colour=colour)

    def __missing__(self, key: str) -> str:
        return "{" + key + "}"


def test_reworded_questions_ask_the_same():
    rng = random.Random(1)
    for scene in SCENES:
        for qa in exam.exam(scene, questions.SCORED):
            said = paraphrases.paraphrased(qa, rng)
            assert said.answer == qa.answer and said.question != qa.question
            keys = set(qa.ask.split()) & {*world.COLORS, *world.SHAPES, "left", "above"}
            words = set(re.findall("[a-z]+", said.question.lower()))
            words |= {shape for shape in world.SHAPES if phrases.plural(shape) in words}
            assert keys <= words, (qa, said)
            slipped = paraphrases.mistyped(qa, rng).question
            assert slipped != qa.question and abs(len(slipped) - len(qa.question)) <= 1
            assert paraphrases.lower_case(qa, rng).question.islower()


# Pictures of something else


def test_strangers_differ_and_repeat():
    for name in photographs.PAINTERS:
        first, second = photographs.painted(name, 2)
        assert first.tobytes() == photographs.painted(name, 1)[0].tobytes() != second.tobytes()
    asked = photographs.drawn_questions(3, 6)
    assert len({qa.question for qa in asked}) == 6
    assert {qa.answer for qa in asked} == {phrases.OUTSIDE}


def test_real_pictures_come_whole_and_in_parts(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "b.txt").write_text("no picture")
    found = photographs.real([tmp_path])
    assert [name for name, _ in found] == ["a.png"] * (1 + photographs.CROPS)
    assert found[0][1].size == (80, 60) and all(i.width < 80 for _, i in found[1:])


# The measure


def test_verdicts_are_what_greedy_decoding_says(monkeypatch):
    vlm = tiny_vlm()
    asked = exam.take("heldout", 3, ("color", "count_all", "at", "describe"))
    seen = evaluate.features(vlm, (scene for scene, _ in asked))
    posed = [(seen[scene.seed], qa) for scene, qa in asked]
    assert len(seen) < len(posed)
    prompts = [greedy(vlm, picture, qa, wrong=i % 3 == 0) for i, (picture, qa) in enumerate(posed)]
    monkeypatch.setattr(evaluate, "tokenized", lambda vlm, asked: prompts)
    found = evaluate.verdicts(vlm, posed, batch=5, pictures=2)
    assert [verdict.right for verdict in found] == [i % 3 != 0 for i in range(len(posed))]
    firsts = [int(prompt.tokens[prompt.supervised][0]) for prompt in prompts]
    assert [verdict.first for verdict in found] == firsts and len(set(firsts)) > 1


def greedy(vlm: Any, picture: Any, qa: QA, wrong: bool) -> Prompt:
    """The question with the three tokens that full passes, one after the other, find likeliest;
    wrong: with another third one."""
    prompt = vlm.tokenize(turns([qa]), [picture])
    tokens = prompt.tokens[: np.flatnonzero(prompt.supervised)[0]].tolist()
    for _ in range(3):
        logits = np.array(vlm([tokens], [picture]))[0, -1]
        logits[vlm.config.prompt.image_token_id] = -np.inf
        tokens.append(int(logits.argmax()))
    if wrong:
        tokens[-1] = (tokens[-1] + 1) % 256
    supervised = np.arange(len(tokens)) >= len(tokens) - 3
    return replace(prompt, tokens=np.array(tokens, np.int32), supervised=supervised)


def test_refusals_are_told_from_other_answers(monkeypatch):
    vlm = tiny_vlm()
    asked = exam.take("heldout", 2, ("color", "at"))
    seen = evaluate.features(vlm, (scene for scene, _ in asked))
    posed = [(seen[scene.seed], qa) for scene, qa in asked]
    begins = vlm.tokenizer.encode(phrases.OUTSIDE[0])[0][0]
    found = [evaluate.Verdict(False, begin) for begin in (begins, 0, begins, begins)]
    again = []

    def say(vlm: Any, asked: Any) -> list[bool]:
        again.extend(asked)
        return [True, False, True]

    monkeypatch.setattr(robust, "right_answers", say)
    assert robust.refusals(vlm, posed, found) == [True, False, False, True]
    assert [qa.question for _, qa in again] == [posed[i][1].question for i in (0, 2, 3)]
    assert {qa.answer for _, qa in again} == {phrases.OUTSIDE}


@pytest.fixture
def brief(monkeypatch):
    """A few kinds, one picture and one question of each sort: the tiny model reads byte by byte."""
    monkeypatch.setattr(robust, "SCORED", ("color", "count_all"))
    monkeypatch.setattr(robust, "COLOURLESS", ("count_all",))
    monkeypatch.setattr(robust, "PRINTED", ("number",))
    monkeypatch.setattr(robust, "PICTURES", 1)
    monkeypatch.setattr(robust, "QUESTIONS", 1)


def test_every_row_is_measured(brief, tmp_path):
    vlm = tiny_vlm()
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    result = robust.robustness(vlm, "progress", 1, conditions.installed(), [tmp_path])
    names = [row["name"] for row in result["rows"]]
    assert len(set(names)) == len(names) >= 16
    costs = {row["name"]: row["cost"] for row in result["rows"]}
    for row in result["rows"]:
        assert (row["cost"] is None) == row["name"].startswith("as drawn"), costs
        assert row["asked"] == len(row["kinds"])
    text = robust.table(result)
    assert all(f"| {name} |" in text for name in names)
    assert "real photographs" in text and "Left out: real" not in text


def test_what_is_missing_is_said(brief):
    vlm = tiny_vlm()
    result = robust.robustness(vlm, "progress", 1, ())
    assert set(result["skipped"]) == {"in other typefaces", "real photographs"}
    assert "Left out: in other typefaces: no other typeface was found" in robust.table(result)
