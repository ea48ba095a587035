"""The drawn world: what it asks is right, what it marks is marked, and its recipe runs."""

import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mlxvlm  # noqa: E402
from examples.shapes import data, drawing, encoder, evaluate, exam, phrases, questions, run, world  # noqa: E402
from examples.shapes.tokenizer import CONTROLS, build, tokenizer_config  # noqa: E402

SCENES = [world.make_scene(seed) for seed in range(160)]
TOKENIZER = build()


def encode(text: str) -> list[str]:
    return TOKENIZER.encode(text, add_special_tokens=False).tokens


def everything(scene: world.Scene) -> list[questions.QA]:
    """Every kind's question, twice, and a practice set."""
    found = [questions.ask_one(kind, scene, salt) for kind in questions.ASKERS for salt in "ab"]
    return [qa for qa in found if qa is not None] + questions.ask_many(scene, 8)


# The world


def test_a_scene_is_a_function_of_its_seed():
    # Another process hashes strings differently; nothing may depend on that.
    code = (
        "import hashlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "from examples.shapes import data, drawing, world\n"
        "digest = hashlib.sha256()\n"
        "for seed in range(12):\n"
        "    scene = world.make_scene(seed)\n"
        "    digest.update(drawing.draw(scene).tobytes())\n"
        "    digest.update(repr(data.pretrain_rows(scene, 'x')).encode())\n"
        "    digest.update(repr(data.chat_rows(scene, 'x')).encode())\n"
        "print(digest.hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, str(ROOT)],
            env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_scenes_hold_one_to_five_things_or_two_to_five_bars():
    things = Counter(len(s.things) for s in SCENES if not s.bars)
    bars = Counter(len(s.bars) for s in SCENES if s.bars)
    assert set(things) == {1, 2, 3, 4, 5} and set(bars) == {2, 3, 4, 5}
    assert 0.1 < bars.total() / len(SCENES) < 0.4
    for scene in SCENES:
        cells = [(t.row, t.column) for t in scene.things]
        assert len(set(cells)) == len(cells)
        assert len({bar.color for bar in scene.bars}) == len(scene.bars)


def test_pictures_show_their_colours_in_the_right_cells():
    for scene in SCENES[:60]:
        pixels = np.asarray(drawing.draw(scene)).astype(int)
        assert pixels.shape == (96, 96, 3)
        for thing in scene.things:
            assert abs(pixels[round(thing.y), round(thing.x)] - thing.rgb).max() <= 2
            assert int(thing.y // world.CELL) == thing.row
            assert int(thing.x // world.CELL) == thing.column
        for bar in scene.bars:
            column = pixels[:, round(bar.left + bar.width / 2)]
            rows = np.flatnonzero((abs(column - bar.rgb) <= 2).all(axis=1))
            assert (drawing.BASE - rows[0]) / drawing.UNIT == pytest.approx(bar.height, abs=0.2)


def test_the_pictures_beside_the_recipe_are_scenes():
    from PIL import Image

    for name, seed in drawing.SAMPLES.items():
        with Image.open(ROOT / "examples" / "shapes" / "pictures" / f"{name}.png") as image:
            drawn = drawing.draw(world.make_scene(seed), 4)
            assert (np.asarray(image.convert("RGB")) == np.asarray(drawn)).all()
        # A picture of any size looks the same to the encoder, but for its edges.
        small = np.asarray(drawing.draw(world.make_scene(seed))).astype(int)
        again = np.asarray(drawn.resize((96, 96), Image.Resampling.BICUBIC)).astype(int)
        assert abs(again - small).mean() < 6


def test_splits_share_no_seed():
    spans = [range(start, start + world.SPAN) for start in sorted(world.SPLITS.values())]
    assert all(a.stop <= b.start for a, b in zip(spans, spans[1:], strict=False))
    for split, start in world.SPLITS.items():
        assert next(world.seeds(split)) == start
    with pytest.raises(ValueError):
        world.seeds("train", world.SPAN)
    # Nor do the encoder's, the chat's and the guesser's parts of the training split.
    assert next(data.scenes("train", 1)).seed < 1000


def test_patch_words_name_what_covers_a_patch():
    scene = next(s for s in SCENES if len(s.things) == 3)
    found = drawing.patch_words(scene)
    assert len(found) == 36
    for thing in scene.things:
        patch = int(thing.y) // world.PATCH * 6 + int(thing.x) // world.PATCH
        assert found[patch] == thing.words
    corners = {(0, 0): 0, (0, 2): 5, (2, 0): 30, (2, 2): 35}
    for (row, column), patch in corners.items():
        if (row, column) not in {(t.row, t.column) for t in scene.things}:
            assert found[patch] == ()


# Questions: a second reading of the scene must find the same answer.


def solve(kind: str, question: str, scene: world.Scene) -> str:
    """The looked-up word, from the scene and the question's text alone."""
    words = [w.rstrip("?.,") for w in question.lower().split()]
    shapes = {**{s: s for s in world.SHAPES}, **{phrases.plural(s): s for s in world.SHAPES}}
    color = next((w for w in words if w in world.COLORS), None)
    shape = next((shapes[w] for w in words if w in shapes), None)
    size = next((w for w in words if w in world.SIZES), None)
    things = [
        t
        for t in scene.things
        if (color is None or t.color == color) and (shape is None or t.shape == shape)
    ]
    if kind.startswith("count"):
        return world.NUMBERS[len(things)]
    if kind == "yesno":
        return "Yes" if any(size in (None, t.size) for t in things) else "No"
    if kind == "at":
        row = next((i for i, w in enumerate(("top", "", "bottom")) if w in words), 1)
        column = next((i for i, w in enumerate(("left", "", "right")) if w in words), 1)
        held = [t for t in scene.things if (t.row, t.column) == (row, column)]
        return f"a {held[0].size} {held[0].color} {held[0].shape}" if held else "nothing"
    if kind == "bars_count":
        return world.NUMBERS[len(scene.bars)]
    if kind == "bar_value":
        bars = [bar for bar in scene.bars if bar.color == color]
        return f"at {world.NUMBERS[bars[0].height]}" if bars else "not there"
    if kind == "bar_extreme":
        pick = max if "tallest" in words else min
        return pick(scene.bars, key=lambda bar: bar.height).color
    assert len(things) <= 1, f"{question} has several answers in scene {scene.seed}"
    if not things:
        return "not there"
    thing = things[0]
    return {
        "shape": f"a {thing.shape}",
        "color": thing.color,
        "size": thing.size,
        "where": "in the " + thing.place,
        "where_cs": "in the " + thing.place,
    }[kind]


def test_each_answer_follows_from_the_scene():
    checked = Counter()
    for scene in SCENES:
        for qa in everything(scene):
            if qa.kind in ("describe", "type", "outside"):
                continue
            assert qa.answer.endswith(" " + solve(qa.kind, qa.question, scene) + "."), qa
            checked[qa.kind] += 1
    assert set(checked) >= set(questions.SCORED) and min(checked.values()) > 20


def test_descriptions_name_everything_in_order():
    scene = next(s for s in SCENES if len(s.things) == 2)
    answer = questions.ask_one("describe", scene).answer
    first, second = scene.things
    assert answer == " ".join(
        f"{t.place.capitalize()}: a {t.size} {t.color} {t.shape}." for t in (first, second)
    )
    chart = next(s for s in SCENES if s.bars)
    answer = questions.ask_one("describe", chart).answer
    assert re.findall(r"(\w+) (\w+)[,.]", answer) == [
        (bar.color, world.NUMBERS[bar.height]) for bar in chart.bars
    ]


def test_descriptions_mark_each_item_and_what_comes_next():
    scene = next(s for s in SCENES if len(s.things) == 2)
    qa = questions.ask_one("describe", scene)
    first, second = (questions.ground([thing]) for thing in scene.things)
    assert [mark.words for mark in qa.marks] == [first, first, second, second, questions.ground([])]
    ends = [qa.answer[: mark.end].split()[-1][-1] for mark in qa.marks if mark.turn]
    assert [end == "." for end in ends] == [False, True, False, True]
    chart = next(s for s in SCENES if len(s.bars) == 2)
    qa = questions.ask_one("describe", chart)
    ends = [qa.answer[: mark.end].split()[-1] for mark in qa.marks if mark.turn]
    a, b = chart.bars
    ends_wanted = ["chart:", a.color, f"{world.NUMBERS[a.height]},", b.color]
    assert ends == [*ends_wanted, f"{world.NUMBERS[b.height]}."]
    likeliest = [max(mark.words, key=lambda word: mark.words[word]) for mark in qa.marks]
    heights = [world.NUMBERS[bar.height] for bar in chart.bars]
    assert likeliest == [a.color, a.color, heights[0], b.color, heights[1], "nothing"]


def test_some_answers_say_that_there_is_none():
    answers = Counter()
    for scene in SCENES:
        for qa in everything(scene):
            none = qa.answer.endswith(("not there.", "nothing.", "zero.", "No."))
            answers[qa.kind, none] += 1
    for kind in questions.SCORED:
        if kind != "count_all":
            share = answers[kind, True] / (answers[kind, True] + answers[kind, False])
            assert 0.05 < share < 0.7, kind


def test_questions_come_in_several_phrasings():
    for kind, templates in phrases.ASKS.items():
        assert len(templates) >= 3, kind
        marked = [template.count("|") for template in templates]
        assert marked == [1] * len(templates)
    text = [qa.question for scene in SCENES for qa in everything(scene)]
    assert any("colour" in q for q in text) and any("color" in q for q in text)
    assert any(q[0].islower() for q in text) and any(q[0].isupper() for q in text)


# Marks and targets


def test_marks_stand_behind_key_words_and_name_what_they_refer_to():
    for scene in SCENES:
        for qa in everything(scene):
            for mark in qa.marks:
                text = (qa.question, qa.answer)[mark.turn]
                assert sum(mark.words.values()) == pytest.approx(1, abs=0.02)
                if qa.kind in ("where", "color", "shape", "size", "where_cs"):
                    key = re.findall(r"[a-z]+$", text[: mark.end])[0]
                    named = set(mark.words)
                    assert key in named or named == {"nothing"}, qa
            if qa.kind not in ("describe", "outside"):
                assert [mark.turn for mark in qa.marks] == [0, 1], qa


def test_grounding_weighs_words():
    scene = next(s for s in SCENES if len(s.things) == 2)
    a, b = scene.things
    words = questions.ground([a, b], 2)
    assert words["two"] == pytest.approx(1 / 3, abs=0.01)
    assert set(words) == {*a.words, *b.words, "two"}
    assert questions.ground([]) == {"nothing": 1.0}
    bar = next(s for s in SCENES if s.bars).bars[0]
    assert questions.ground([bar]) == {bar.color: 0.25, world.NUMBERS[bar.height]: 0.75}


def test_rows_carry_targets_in_the_trainers_form():
    for scene in SCENES[:40]:
        for rows in (
            data.pretrain_rows(scene, "a.png"),
            data.chat_rows(scene, "a.png"),
            data.describe_rows(scene, "a.png"),
        ):
            assert ["align" in row["targets"] for row in rows] == [True] + [False] * (len(rows) - 1)
            for row in rows:
                roles = [m["role"] for m in row["messages"]]
                assert roles == ["user", "assistant"] * (len(roles) // 2)
                for target in row["targets"]["ground"]:
                    text = row["messages"][target["turn"]]["content"]
                    assert re.search(r"[a-z.,:]$", text[: target["end"]])
            for target in rows[0]["targets"]["align"]:
                assert target["image"] == 0 and 0 <= target["token"] < 36
                assert target["words"]
    assert {len(row["messages"]) for row in data.chat_rows(SCENES[0], "a.png")} == {8}


# The tokenizer


def test_every_word_is_one_token_wherever_it_stands():
    for scene in SCENES:
        for qa in everything(scene):
            for text in ("\n\n" + qa.question, qa.answer):
                tokens = encode(text)
                assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text
                if qa.kind != "outside" or text == qa.answer:
                    pieces = re.findall(r"\n\n| ?[A-Za-z]+|[^\w\s]", text)
                    plurals = sum(token in ("s", "es") for token in tokens)
                    assert len(tokens) == len(pieces) + plurals, text
            for mark in qa.marks:
                text = (qa.question, qa.answer)[mark.turn]
                ends = [end for _, end in TOKENIZER.encode(text).offsets]
                assert mark.end in ends
                assert all(len(encode(" " + word)) == 1 for word in mark.words)
    for word in phrases.vocabulary():
        for form in (word, word.capitalize(), " " + word, " " + word.capitalize()):
            assert len(encode(form)) == 1


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


def test_labels_of_patches_and_slots():
    scene = next(s for s in SCENES if len(s.things) == 4)
    found = encoder.labels(scene)
    assert found.shape == (36 + encoder.QUERIES, len(encoder.GROUPS))
    for thing in scene.things:
        slot = found[36 + 3 * thing.row + thing.column]
        named = [g[i] for g, i in zip(encoder.GROUPS, slot, strict=True)]
        assert named == [thing.size, thing.color, thing.shape, ""]
    chart = next(s for s in SCENES if s.bars)
    slot = encoder.labels(chart)[36 + 9]
    named = [g[i] for g, i in zip(encoder.GROUPS, slot, strict=True)]
    bar = chart.bars[0]
    assert named == ["", bar.color, "bar", world.NUMBERS[bar.height]]


def test_wilson_interval():
    low, high = exam.wilson(90, 100)
    assert (low, high) == (pytest.approx(0.8256, abs=1e-3), pytest.approx(0.9448, abs=1e-3))
    assert exam.wilson(0, 0) == (0.0, 1.0)


def test_the_guesser_knows_frequencies_only():
    guesses = exam.blind_guesses(300)
    assert guesses["count"].startswith("The number of shapes is ")
    assert all(math.isfinite(len(answer)) for answer in guesses.values())
    assert guesses == exam.blind_guesses(300)


def test_exams_ask_each_scored_kind():
    asked = Counter(qa.kind for scene in SCENES for qa in exam.exam(scene))
    assert set(asked) == {*questions.SCORED, *exam.EXTRA}
    scenes = exam.take("heldout", 10)
    assert sum(not scene.bars for scene in scenes) == 10
    assert all(scene.seed >= world.SPLITS["heldout"] for scene in scenes)


# What was shipped


def test_the_readme_shows_the_evaluation():
    result = json.loads((ROOT / "examples" / "shapes" / "evaluation.json").read_text())
    readme = (ROOT / "examples" / "shapes" / "README.md").read_text()
    assert evaluate.table(result) in readme
    assert result["split"] == "heldout" and result["scenes_of_shapes"] == 500
    assert result["mean"] >= 0.9
    scores = {score["kind"]: score for score in result["kinds"]}
    assert all(scores[kind]["right"] >= 0.8 for kind in questions.SCORED)
    first, second, *_ = result["chats"]["right"]
    assert second >= first - 5


def test_the_shipped_model_answers():
    # A few fresh scenes: enough to see that the file is the trained one, and still read as it was.
    vlm = mlxvlm.load(ROOT / "weights" / "demo")
    scenes = exam.take("progress", 10)
    pictures = evaluate.features(vlm, scenes)
    asked = [
        (picture, qa)
        for scene, picture in zip(scenes, pictures, strict=True)
        for qa in exam.exam(scene)
        if qa.kind in questions.SCORED
    ]
    verdicts = evaluate.right_answers(vlm, asked)
    assert len(verdicts) > 80 and sum(verdicts) >= 0.9 * len(verdicts)
    picture = ROOT / "examples" / "shapes" / "pictures" / "scene.png"
    question = [{"role": "user", "content": "Where is the red triangle?"}]
    assert vlm.generate(question, [picture]).text == "The red triangle is in the centre."
    stranger = [{"role": "user", "content": "What is the capital of Spain?"}]
    assert vlm.generate(stranger, [picture]).text == phrases.OUTSIDE


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
    assert result["generated"]["asked"] == result["generated"]["agree"] == 2
    assert sum(score["asked"] for score in result["kinds"]) > 15
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
