"""language/generate.py: sampling from embeddings equals the plain loop, and keeps its promises."""

from __future__ import annotations

import functools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlxvlm.errors import ConfigError
from mlxvlm.language.forward import embedding, last_logits, trunk
from mlxvlm.language.generate import generate_tokens
from mlxvlm.language.load import build_language

VOCAB = 96
PROMPT = np.array([3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46], dtype=np.int32)


@pytest.fixture(scope="module")
def lm():
    mx.random.seed(7)
    model = build_language(
        {
            "model_type": "llama",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "vocab_size": VOCAB,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
        }
    )
    # Random heads repeat one token; a larger one makes answers varied enough to tell apart.
    model.lm_head.weight = mx.random.normal(model.lm_head.weight.shape)
    mx.eval(model.parameters())
    return model


def embed(lm, tokens):
    return embedding(lm)(mx.array(tokens))


def run(lm, tokens=PROMPT, **options):
    return list(generate_tokens(lm, tokens, embed(lm, tokens), **{"max_tokens": 12, **options}))


def greedy(lm, tokens, steps, banned=()):
    """The slow truth: every token from a full pass over everything before it."""
    tokens = tokens.tolist()
    for _ in range(steps):
        logits = np.array(lm(mx.array([tokens]))[0, -1])
        logits[list(banned)] = -np.inf
        tokens.append(int(logits.argmax()))
    return tokens[-steps:]


def test_greedy_equals_full_recomputation(lm):
    answer = run(lm)
    assert answer == greedy(lm, PROMPT, 12)
    assert len(set(answer)) > 4  # an answer of one repeated token would show little


@pytest.mark.parametrize("step", [1, 3, 10, 11])
def test_prefill_in_pieces_is_the_same(lm, step):
    assert run(lm, prefill_step_size=step) == run(lm)


def test_embeddings_rule_and_masked_ids_may_lie_outside_the_table(lm, monkeypatch):
    seen = []
    call = type(lm).__call__

    @functools.wraps(call)  # generate_step reads the signature
    def spied(self, ids, *args, **kwargs):
        seen.append(ids.max().item())
        return call(self, ids, *args, **kwargs)

    monkeypatch.setattr(type(lm), "__call__", spied)
    image = VOCAB + 1000
    tokens = PROMPT.copy()
    tokens[2:6] = image
    embeddings = embed(lm, PROMPT)  # what stands at the masked places is the text's own
    options = {"max_tokens": 12, "banned_ids": (image,), "repetition_penalty": 1.0}
    assert list(generate_tokens(lm, tokens, embeddings, **options)) == run(lm)
    assert max(seen) < VOCAB  # some decoders read the ids beside the embeddings


def test_stop_id_is_yielded_and_ends_it(lm):
    answer = run(lm)
    stop = answer[5]
    assert run(lm, stop_ids={stop}) == answer[: answer.index(stop) + 1]
    assert run(lm, stop_ids={stop}, max_tokens=1) == answer[:1]


def test_banned_ids_are_never_sampled(lm):
    favourite = run(lm)[0]
    assert run(lm, banned_ids=(favourite,)) == greedy(lm, PROMPT, 12, (favourite,))
    assert favourite not in run(lm, banned_ids=(favourite,), temperature=5.0, seed=1)


def test_ids_past_the_tokenizers_table_are_never_sampled(lm):
    rest = range(10, VOCAB)
    assert run(lm, vocab_size=10) == greedy(lm, PROMPT, 12, rest)
    assert max(run(lm, vocab_size=10, temperature=50.0, seed=3, max_tokens=40)) < 10


def test_a_seed_decides_and_leaves_the_global_state_alone(lm):
    mx.random.seed(0)
    untouched = mx.random.uniform().item()
    mx.random.seed(0)
    first = run(lm, temperature=1.5, seed=11)
    assert mx.random.uniform().item() == untouched
    assert first == run(lm, temperature=1.5, seed=11)
    assert first != run(lm, temperature=1.5, seed=12)


def test_without_a_seed_the_global_state_decides(lm):
    mx.random.seed(5)
    first = run(lm, temperature=1.5)
    second = run(lm, temperature=1.5)
    mx.random.seed(5)
    assert run(lm, temperature=1.5) == first != second


def test_filters_narrow_sampling_down_to_greedy(lm):
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert run(lm, temperature=2.0, seed=4, **narrow) == run(lm)
    assert run(lm, temperature=2.0, seed=4, top_k=VOCAB + 5) == run(lm, temperature=2.0, seed=4)


def test_repetition_penalty_counts_text_and_answer(lm):
    answer = run(lm, repetition_penalty=1e6, max_tokens=9)  # all within its window of 20
    assert len(set(answer)) == len(answer)
    assert not set(answer) & set(PROMPT.tolist())


def test_repetition_penalty_counts_no_picture_as_a_word(lm):
    """No id stands in for a masked place: each in turn may be what the model wants most."""
    image = VOCAB + 7
    masked = np.full_like(PROMPT, image)
    options = {"max_tokens": 1, "banned_ids": (image,), "repetition_penalty": 1e6}
    weight = lm.lm_head.weight
    favourite = run(lm)[0]
    for wanted in (0, 1, VOCAB - 1):
        order = np.arange(VOCAB)
        order[[wanted, favourite]] = order[[favourite, wanted]]
        lm.lm_head.weight = weight[mx.array(order)]
        assert list(generate_tokens(lm, masked, embed(lm, PROMPT), **options)) == [wanted]
    lm.lm_head.weight = weight


def test_interleaved_streams_do_not_touch_each_other_or_the_callers_stream(lm):
    home = mx.default_stream(mx.default_device())
    other = PROMPT[::-1].copy()
    a = generate_tokens(lm, PROMPT, embed(lm, PROMPT), max_tokens=6)
    b = generate_tokens(lm, other, embed(lm, other), max_tokens=6)
    pairs = [(next(a), next(b)) for _ in range(3)]
    assert mx.default_stream(mx.default_device()) == home
    a.close()  # an answer cut short
    assert mx.default_stream(mx.default_device()) == home
    rest = list(b)
    assert mx.default_stream(mx.default_device()) == home
    assert [p[0] for p in pairs] == run(lm)[:3]
    assert [p[1] for p in pairs] + rest == run(lm, other)[:6]


def test_a_given_cache_continues_a_prefix(lm):
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(lm)
    lm(mx.array(PROMPT[None, :6]), cache=cache)
    rest = PROMPT[6:]
    ids = generate_tokens(lm, rest, embed(lm, rest), max_tokens=12, prompt_cache=cache)
    assert list(ids) == run(lm)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("prefill_step_size", 0),
    ],
)
def test_impossible_settings_are_refused_before_any_work(lm, setting, value):
    with pytest.raises(ConfigError, match=setting):
        generate_tokens(lm, PROMPT, embed(lm, PROMPT), **{setting: value})


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_the_head_runs_at_the_last_position_alone(model_type, monkeypatch):
    """Also where logits are capped after the head, which the head by itself would miss."""
    mx.random.seed(3)
    model = build_language(
        {
            "model_type": model_type,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "rms_norm_eps": 1e-5,
            "vocab_size": VOCAB,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        }
    )
    embeddings = embed(model, PROMPT)
    whole = model(mx.array(PROMPT)[None], input_embeddings=embeddings[None])[:, -1]
    rows = []
    as_linear = nn.Embedding.as_linear

    def counted(self, x):
        rows.append(x.shape[1])
        return as_linear(self, x)

    monkeypatch.setattr(nn.Embedding, "as_linear", counted)
    found = last_logits(model, mx.array(PROMPT), embeddings, make_prompt_cache(model))
    assert rows == [1]
    np.testing.assert_allclose(np.array(found), np.array(whole), atol=1e-5)
    assert trunk(model) is model["model"] and not hasattr(model["model"], "_call")


@pytest.mark.parametrize(
    ("step", "at_once", "wanted"),
    [(1, 256, [1] * 11), (4, 256, [4, 4, 2, 1]), (11, 256, [11]), (64, 256, [11])]
    + [(64, 10, [10, 1]), (4, 10, [4, 4, 2, 1])],
)
def test_what_is_short_is_read_at_once(lm, step, at_once, wanted, monkeypatch):
    plain = run(lm, max_tokens=2)
    monkeypatch.setattr("mlxvlm.language.generate.AT_ONCE", at_once)
    calls = []
    inner = type(lm).__call__

    def counted(self, ids, *args, **options):
        calls.append(ids.shape[1])
        return inner(self, ids, *args, **options)

    monkeypatch.setattr(type(lm), "__call__", counted)
    assert run(lm, max_tokens=2, prefill_step_size=step) == plain
    # Then a call a token: the second's keys too, for whoever keeps the state.
    assert calls == [*wanted, 1, 1]
