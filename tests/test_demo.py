"""The model that ships: what it says of fresh scenes, and that it is an ordinary model."""

import json
import random
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mlxvlm  # noqa: E402
from examples.shapes import evaluate  # noqa: E402
from examples.shapes.drawing import SAMPLES  # noqa: E402
from examples.shapes.phrases import OUTSIDE, OUTSIDE_ASKS  # noqa: E402
from examples.shapes.questions import SCORED  # noqa: E402
from examples.shapes.things import unique_name  # noqa: E402
from examples.shapes.world import NUMBERS, make_scene  # noqa: E402
from mlxvlm.cli.main import app  # noqa: E402

DEMO = ROOT / "weights" / "demo"
SCENE = ROOT / "examples" / "shapes" / "pictures" / "scene.png"


@pytest.fixture(scope="module")
def demo() -> mlxvlm.VLM:
    return mlxvlm.load(DEMO, dtype="float32")


def test_it_is_small_and_stock(demo):
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 10e6
    assert demo.config.projector.type == "attention" and demo.config.projector.num_layers == 2
    assert demo.config.vision.model_type == "siglip_vision_model"
    assert demo.language.model_type == "llama" and demo.config.prompt.layout == "llama-3"


def test_it_answers_fresh_scenes(demo):
    """A small part of the evaluation in the README; the bounds leave room for so few questions."""
    result = evaluate.measure(demo, "heldout", 20, blind_scenes=300)
    scores = {score["kind"]: score for score in result["kinds"]}
    assert list(scores) == list(SCORED) and {score["asked"] for score in scores.values()} == {20}
    assert result["mean"] > 0.85 and result["mean"] > result["blind_mean"] + 0.4
    for kind, score in scores.items():
        assert score["right"] >= 0.5 and score["right"] > score["blind"], kind


def test_it_boxes_what_it_is_asked_for(demo):
    boxes = evaluate.measure_boxes(demo, "heldout", 12)
    assert boxes["asked"] == 12 and boxes["mean_iou"] > 0.35 and boxes["at_least_half"] > 0.35


def test_generated_answers_are_those_of_one_pass_and_later_turns_hold(demo):
    generated = evaluate.measure_generated(demo, "heldout", 1)
    assert generated["agree"] == generated["asked"] == len(SCORED)
    assert generated["right"] >= 0.8 * len(SCORED)
    chats = evaluate.measure_chats(demo, "heldout", 8)
    assert chats["asked"] == [8] * 4 and min(chats["right"]) >= 5


def test_chat_without_a_model_says_what_it_knows():
    things = make_scene(SAMPLES["scene"]).things
    result = CliRunner().invoke(app, ["chat", str(SCENE), "-p", "How many shapes are there?"])
    assert result.exit_code == 0
    places = ", ".join(thing.place for thing in things)
    assert result.stdout == f"The shapes: {places}. The number is {NUMBERS[len(things)]}.\n"
    assert "drawn scenes" in result.stderr and "-m names a real model" in result.stderr
    names = [(unique_name(thing, things, random.Random(0)), thing) for thing in things]
    name, thing = next((name, thing) for name, thing in names if name)
    asked = ["chat", str(SCENE), "--json", "-p", f"Where is the {name}?"]
    told = json.loads(CliRunner().invoke(app, asked).stdout)
    assert told["text"] == f"The {name} is in the {thing.place}."
    assert told["prompt_tokens"] > 64 and told["time_to_first_token_s"] > 0


def test_what_it_does_not_know_it_refuses_in_the_words_of_its_config(demo):
    assert demo.config.refusal == OUTSIDE
    result = CliRunner().invoke(app, ["chat", str(SCENE), "-p", OUTSIDE_ASKS[0]])
    assert result.stdout == OUTSIDE + "\n" and f"{SCENE} -p" in result.stderr


def test_any_text_and_any_picture_is_taken(demo):
    strange = [{"role": "user", "content": "Was ist das? 这是什么 <|eot_id|> \u0000 🐌"}]
    assert demo.generate(strange, [SCENE], max_tokens=8).generation_tokens > 0
    assert demo.generate([{"role": "user", "content": "hello"}], max_tokens=4).prompt_tokens > 3
