"""Final answers, how they are counted, and samples of one prompt that was read once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from PIL import Image
from test_reuse import DECODERS, decoder
from tiny_vlm import picture, tiny_vlm
from typer.testing import CliRunner

import mlxvlm
import mlxvlm.batch
from mlxvlm.batch import samples
from mlxvlm.cli.chat import demo
from mlxvlm.cli.main import app
from mlxvlm.errors import ConfigError, PromptError, VLMError
from mlxvlm.vote import ASK, TEMPERATURE, count, final, normalise, vote, with_steps

QUESTION = [{"role": "user", "content": "How many are there?"}]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("There are 2 and 3.\nAnswer: 5", "5"),
        ("Answer: 4? No.\nFinal answer: **5**\n", "**5**"),
        ("So the answer is: (B)", "(B)"),
        ("Steps.\n**Answer:** a cat.", "** a cat."),
        ("x = 3, so \\boxed{1,200}.", "1,200"),
        ("答えは\nAnswer：五", "五"),
        ("It is red.\n\nRed", "Red"),
        ("", None),
    ],
)
def test_where_a_text_ends(text, answer):
    assert final(text) == answer


def test_a_text_that_was_cut_short_has_no_last_line():
    assert final("First I look at the", whole=False) is None
    assert final("Steps.\nAnswer: 5\nBecause", whole=False) == "5"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("5", " **5**. "),
        ("5", "5.0"),
        ("2.5", "2.50"),
        ("1,200,000", "1200000"),
        ("B", "(b)"),
        ("B", "b. A cat"),
        ("B", "B) a cat"),
        ("The red star", "red star."),
        ("$12$", "12"),
        ("\\boxed{7}", "7"),
        ("New  York", "new york"),
        ("3.0 cm", "3 cm"),
    ],
)
def test_answers_that_mean_the_same(one, other):
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("5", "50"),
        ("5", "0.5"),
        ("1.05", "1.5"),
        ("A cat", "A"),
        ("1,5", "15"),
        ("10", "1"),
        ("-3", "3"),
    ],
)
def test_answers_that_do_not(one, other):
    assert normalise(one) != normalise(other)


@pytest.fixture(scope="module")
def reply():
    return tiny_vlm().generate(QUESTION, max_tokens=1)


def said(reply, *texts):
    return [replace(reply, text=text, finish_reason="stop") for text in texts]


def test_the_most_votes_win_and_the_first_of_equals(reply):
    found = count(said(reply, "Answer: 3", "Answer: Five", "Answer: five.", "Answer: 3", "?!"))
    assert found.answer == "3" and list(found.counts.items())[:2] == [("3", 2), ("five", 2)]
    assert found.answers[1:3] == ["five", "five"]
    assert count(said(reply, "Answer: five", "Answer: 3", "Answer: 3.0")).answer == "3"
    cut = [*said(reply, "Answer: 3"), replace(reply, text="I look", finish_reason="length")]
    assert count(cut).counts == {"3": 1} and count(cut).answers == ["3", None]
    with pytest.raises(VLMError, match="none of 1 samples came to an answer"):
        count(cut[1:])


def test_steps_are_asked_for_in_the_last_question():
    system = {"role": "system", "content": "Be kind."}
    assert with_steps([system, *QUESTION])[1]["content"] == "How many are there?" + ASK
    assert with_steps([system, *QUESTION])[0] is system and "Answer" not in QUESTION[0]["content"]
    parts = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    asked = with_steps([{"role": "user", "content": parts}])[0]["content"]
    assert asked == [parts[0], {"type": "text", "text": "How many?" + ASK}]
    bare = with_steps([{"role": "user", "content": [{"type": "image"}]}])[0]["content"]
    assert bare[1]["text"].startswith("Think step by step")


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_samples_are_those_of_single_calls(kind):
    vlm = decoder(kind)
    options = {"max_tokens": 9, "temperature": 0.9, "top_k": 40}
    wanted = [vlm.generate(QUESTION, [picture(1)], seed=5 + i, **options) for i in range(4)]
    assert len({tuple(one.tokens) for one in wanted}) > 1
    for size in (1, 3, 8):
        found = samples(vlm, QUESTION, [picture(1)], 4, batch_size=size, seed=5, **options)
        assert [one.tokens for one in found] == [one.tokens for one in wanted]
        assert [one.reused_tokens == 0 for one in found] == [True, False, False, False]


def test_the_prompt_is_read_once(monkeypatch):
    read = []
    inner = mlxvlm.batch.Prefill
    monkeypatch.setattr(mlxvlm.batch, "Prefill", lambda *a: read.append(1) or inner(*a))
    samples(tiny_vlm(), QUESTION, [picture(1)], 5, batch_size=2, max_tokens=3)
    assert read == [1]


def test_a_dynamic_rope_samples_one_by_one():
    vlm = tiny_vlm()
    vlm.config.language["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    options = {"max_tokens": 5, "temperature": 0.9}
    found = samples(vlm, QUESTION, [], 3, seed=2, **options)
    wanted = [vlm.generate(QUESTION, seed=2 + i, **options) for i in range(3)]
    assert [one.tokens for one in found] == [one.tokens for one in wanted]


def test_a_vote_samples_unless_it_is_of_one(monkeypatch):
    asked_for = []

    def drawn(*args, **options):
        asked_for.append(options.get("temperature"))
        return samples(*args, **options)

    monkeypatch.setattr("mlxvlm.vote.draw", drawn)
    vlm = mlxvlm.load(demo())
    asked = [{"role": "user", "content": "which shape is red?"}]
    options = {"images": [picture(1)], "reason": False, "max_tokens": 60}
    found = vlm.vote(asked, samples=4, seed=1, temperature=3.0, **options)
    assert len({tuple(one.tokens) for one in found.replies}) > 1
    again = vlm.vote(asked, samples=4, seed=1, temperature=3.0, **options)
    assert again.counts == found.counts and again.answer == found.answer
    single = vlm.vote(asked, samples=1, **options)
    assert single.replies[0].tokens == vlm.generate(asked, [picture(1)], max_tokens=60).tokens
    vlm.vote(asked, samples=2, **options)
    assert asked_for == [3.0, 3.0, None, TEMPERATURE]


def test_what_cannot_be_voted_on():
    vlm = tiny_vlm()
    with pytest.raises(ConfigError, match="temperature 0 gives the same answer every time"):
        vote(vlm, QUESTION, temperature=0.0)
    with pytest.raises(ConfigError, match=r"samples \(=0\) must be at least 1"):
        vote(vlm, QUESTION, samples=0)
    with pytest.raises(PromptError):
        vote(vlm, [*QUESTION, {"role": "assistant", "content": "5"}])


def run(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done.output


def test_a_vote_through_the_command(tmp_path):
    Image.fromarray(picture(3, 64)).save(tmp_path / "a.png")
    words = ("chat", tmp_path / "a.png", "-p", "What is drawn?", "--vote", "--samples", 3)
    words += ("--seed", 1, "--no-reason", "--max-tokens", 40)
    told = json.loads(run(*words, "--json").splitlines()[-1])
    assert len(told["samples"]) == 3 and sum(told["counts"].values()) <= 3 and told["answer"]
    assert {"answer", "text", "finish_reason"} <= set(told["samples"][0])
    plain = run(*words)
    assert told["answer"] in plain and "(votes of 3: " in plain
    assert "--vote wants the question" in run("chat", "--vote", code=2)
    assert "go with --vote" in run("chat", "-p", "?", "--samples", 3, code=2)
    wrong = ("chat", "-p", "?", "--vote", "--kv-bits", 8)
    assert "--vote and --kv-bits do not go together" in run(*wrong, code=2)
