"""Many prompts decoded together: each answer is the one that it would have had alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_reuse import DECODERS, decoder
from tiny_vlm import picture, tiny_vlm

from mlxvlm.errors import ConfigError, VLMError
from mlxvlm.reply import Reply
from mlxvlm.reuse import Reuse


def asks(count: int) -> list:
    """Questions of other lengths, about none, one or two pictures, some of them about the same."""
    found = []
    for i in range(count):
        images = [picture(seed) for seed in ((), (i % 3,), (i % 3, 7))[i % 3]]
        text = "What is this? " * (1 + i * 5 % 4) + str(i)
        found.append(([{"role": "user", "content": text}], images))
    return found


def answers(vlm, questions, **options) -> list:
    found = dict(vlm.batch(questions, **options))
    return [found[i] for i in range(len(questions))]


@pytest.fixture(scope="module", params=sorted(DECODERS))
def vlm(request):
    return decoder(request.param)


def test_together_as_one_by_one(vlm):
    questions = asks(7)
    alone = [vlm.generate(*ask, max_tokens=4 + 3 * (i % 4)) for i, ask in enumerate(questions)]
    # All of one length are decoded to the end; of the shorter ones the beginning is compared.
    for size in (1, 3, 16):
        for found, wanted in zip(
            answers(vlm, questions, batch_size=size, max_tokens=13), alone, strict=True
        ):
            assert isinstance(found, Reply)
            assert found.tokens[: len(wanted.tokens)] == wanted.tokens
            assert found.prompt_tokens == wanted.prompt_tokens


@pytest.fixture(scope="module")
def llama():
    return tiny_vlm()


def same(found, wanted) -> None:
    for name in ("text", "tokens", "finish_reason", "generation_tokens"):
        assert getattr(found, name) == getattr(wanted, name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "seed": 3, "top_p": 0.9},
        {"repetition_penalty": 1.7},
        {"max_tokens": 1},
        {"prefill_step_size": 5},
        {"stop": ("e", "q")},
    ],
)
def test_each_option_means_what_it_means_alone(llama, options):
    options = {"max_tokens": 24, **options}
    questions = asks(6)
    for found, ask in zip(answers(llama, questions, **options), questions, strict=True):
        same(found, llama.generate(*ask, **options))


def test_answers_come_as_they_are_done_and_questions_as_there_is_room(llama):
    """A question that stops at once makes room before the longer ones are through."""
    taken = []

    def source():
        for i, ask in enumerate(asks(6)):
            taken.append(i)
            yield ask

    order = []
    for index, reply in llama.batch(source(), batch_size=2, max_tokens=30):
        assert len(taken) <= len(order) + 3
        order.append((index, reply.generation_tokens))
    assert sorted(index for index, _ in order) == list(range(6)) == taken


def test_a_question_that_cannot_be_costs_itself(llama, tmp_path):
    good = asks(3)
    missing = ([{"role": "user", "content": "What?"}], [str(tmp_path / "missing.png")])
    long = ([{"role": "user", "content": "x" * 600}], [])
    found = answers(llama, [missing, good[0], long, good[1]], max_tokens=5, batch_size=2)
    assert isinstance(found[0], VLMError) and "missing.png" in str(found[0])
    assert isinstance(found[2], VLMError) and "512" in str(found[2])
    for reply, ask in ((found[1], good[0]), (found[3], good[1])):
        same(reply, llama.generate(*ask, max_tokens=5))
    with pytest.raises(ConfigError, match="batch_size"):
        llama.batch(good, batch_size=0)
    with pytest.raises(ConfigError, match="temperature"):
        llama.batch(good, temperature=-1.0)


def test_a_picture_of_several_questions_is_encoded_once(llama, monkeypatch):
    seen = []
    real = llama.encoder.__class__.encode

    def encode(self, pictures):
        seen.extend(pictures)
        return real(self, pictures)

    monkeypatch.setattr(llama.encoder.__class__, "encode", encode)
    shown = picture(5)
    questions = [([{"role": "user", "content": f"What {i}?"}], [shown]) for i in range(4)]
    reuse = Reuse(llama)
    answers(llama, questions, max_tokens=3, reuse=reuse)
    answers(llama, questions, max_tokens=3, reuse=reuse)
    assert len(seen) == 1


def test_an_answer_stops_where_the_context_ends(llama):
    config = replace(
        llama.config, language={**llama.config.language, "max_position_embeddings": 80}
    )
    short = tiny_vlm(config)
    questions = asks(2)
    for found, ask in zip(answers(short, questions, max_tokens=99), questions, strict=True):
        same(found, short.generate(*ask, max_tokens=99))
        assert (
            found.prompt_tokens + found.generation_tokens == 81 and found.finish_reason == "length"
        )
