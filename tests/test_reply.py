"""reply.py: what `vlm.generate` and `vlm.stream` say, against a plain loop over the logits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from tiny_vlm import EOT, IMAGE, VOCAB, picture, tiny_config, tiny_vlm

from mlxvlm.boxes import Box
from mlxvlm.errors import ConfigError, PictureError, PromptError
from mlxvlm.reply import context_length

QUESTION = [{"role": "user", "content": "What is this?"}]


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


def greedy(vlm, prompt, steps):
    """The slow truth: each token from a full pass over pictures and all tokens before it."""
    tokens = prompt.tokens.tolist()
    allowed = np.full(VOCAB, -np.inf, np.float32)
    allowed[[i for i in range(vlm.tokenizer.vocab_size) if i != IMAGE]] = 0
    for _ in range(steps):
        logits = np.array(vlm(np.array([tokens], np.int32), prompt.pictures)[0, -1])
        tokens.append(int((logits + allowed).argmax()))
        if tokens[-1] in vlm.tokenizer.eos_token_ids:
            break
    return tokens[len(prompt.tokens) :]


def test_greedy_equals_full_recomputation_with_pictures(vlm):
    images = [picture(1), picture(2)]
    reply = vlm.generate(QUESTION, images, max_tokens=10)
    prompt = vlm.tokenize(QUESTION, images)
    assert reply.tokens == greedy(vlm, prompt, 10)
    assert reply.prompt_tokens == len(prompt.tokens) and (prompt.tokens == IMAGE).sum() == 32
    assert len(set(reply.tokens)) > 4
    # Answers hang on what the pictures show, and on their order.
    assert vlm.generate(QUESTION, images[::-1], max_tokens=10).tokens != reply.tokens


def test_without_pictures_and_in_pieces(vlm):
    whole = vlm.generate(QUESTION, max_tokens=10)
    assert whole.tokens == greedy(vlm, vlm.tokenize(QUESTION), 10)
    images = [picture(3)]
    assert (
        vlm.generate(QUESTION, images, max_tokens=8, prefill_step_size=5).tokens
        == vlm.generate(QUESTION, images, max_tokens=8).tokens
    )


def test_a_row_of_a_batch_gives_the_token_that_it_gives_alone(vlm):
    long = [{"role": "user", "content": "And what, if I may ask, is this?"}]
    prompts = [vlm.tokenize(QUESTION, [picture(1)]), vlm.tokenize(long, [picture(2)])]
    rows = np.zeros((2, max(map(len, prompts))), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt.tokens
    logits = np.array(vlm(rows, [p.pictures[0] for p in prompts]))
    for row, prompt, messages, seed in zip(logits, prompts, (QUESTION, long), (1, 2), strict=True):
        best = row[len(prompt) - 1, :IMAGE].argmax()
        assert vlm.generate(messages, [picture(seed)], max_tokens=1).tokens == [best]


def test_stream_adds_up_to_the_reply(vlm):
    *chunks, last = vlm.stream(QUESTION, [picture(1)], max_tokens=12)
    reply = last.reply
    assert reply is not None and all(chunk.reply is None for chunk in chunks)
    assert "".join(chunk.text for chunk in chunks) + last.text == reply.text
    assert [chunk.token for chunk in chunks] == reply.tokens
    assert reply.text == vlm.tokenizer.decode(reply.tokens)
    assert reply.generation_tokens == len(reply.tokens) == 12
    assert reply.finish_reason == "length"
    assert reply.time_to_first_token_s > 0 and reply.prompt_tps > 0 and reply.generation_tps > 0
    assert reply.peak_memory_gb > 0


def test_max_tokens_of_one(vlm):
    reply = vlm.generate(QUESTION, max_tokens=1)
    assert reply.generation_tokens == 1 and reply.generation_tps == 0


def favouring(token):
    """A model whose answer to QUESTION begins with `token`, and shouts it."""
    loud = tiny_vlm()
    hidden = loud.language.model(mx.array(loud.tokenize(QUESTION).tokens[None]))[0, -1]
    weight = loud.language.lm_head.weight
    weight[token] = 100 * hidden
    loud.language.lm_head.weight = weight
    return loud


def test_the_end_token_stops_and_is_not_text():
    reply = favouring(EOT).generate(QUESTION, max_tokens=12)
    assert reply.finish_reason == "stop"
    assert reply.tokens == [EOT] and reply.text == "" and reply.generation_tokens == 1


@pytest.mark.parametrize("token", [IMAGE, VOCAB - 1])
def test_image_token_and_rows_past_the_tokenizer_are_never_sampled(token):
    loud = favouring(token)
    prompt = loud.tokenize(QUESTION)
    assert (
        np.array(loud(prompt.tokens[None])[0, -1]).argmax() == token
    )  # the model wants nothing else
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        assert token not in loud.generate(QUESTION, max_tokens=8, **options).tokens


def test_half_characters_are_held_back(vlm, monkeypatch):
    ids = vlm.tokenizer.encode("é🙂!")[0] + vlm.tokenizer.encode("🙂")[0][:2]  # a token a byte
    monkeypatch.setattr("mlxvlm.reply.generate_tokens", lambda *a, **k: (i for i in ids))
    chunks = list(vlm.stream(QUESTION))
    assert [c.text for c in chunks] == ["", "é", "", "", "", "🙂", "!", "", "", "\ufffd"]
    assert chunks[-1].reply.text == "é🙂!\ufffd"


def test_boxes_that_an_answer_names(vlm, monkeypatch):
    ids = vlm.tokenizer.encode("star: [1, 2, 30, 40] [9, 9, 8, 8]")[0]
    monkeypatch.setattr("mlxvlm.reply.generate_tokens", lambda *a, **k: (i for i in ids))
    reply = vlm.generate(QUESTION)
    assert reply.boxes == [Box("star", 1, 2, 30, 40)]
    assert [why.partition(":")[0] for why in reply.boxes_left_out] == ["[9, 9, 8, 8]"]


def test_a_seed_decides(vlm):
    options = {"temperature": 1.5, "max_tokens": 10}
    first = vlm.generate(QUESTION, seed=1, **options)
    assert vlm.generate(QUESTION, seed=1, **options).tokens == first.tokens
    assert vlm.generate(QUESTION, seed=2, **options).tokens != first.tokens


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers():
    config = tiny_config()
    config.language["max_position_embeddings"] = 64
    small = tiny_vlm(config)
    length = len(small.tokenize(QUESTION, [picture(1), picture(2), picture(3)]).tokens)
    with pytest.raises(PromptError, match=f"{length} tokens .48 of them.* at most 64"):
        small.stream(QUESTION, [picture(1), picture(2), picture(3)])
    # An answer ends where the positions do.
    prompt = len(small.tokenize(QUESTION).tokens)
    reply = small.generate(QUESTION, max_tokens=500)
    assert reply.finish_reason == "length" and reply.generation_tokens == 64 - prompt + 1


def test_context_of_stretched_positions():
    llama = {**tiny_config().language, "max_position_embeddings": 4096}
    assert context_length(llama) == 4096
    assert context_length({**llama, "rope_scaling": {"type": "linear", "factor": 4.0}}) == 16384
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    stretched = {**llama, "max_position_embeddings": 131072, "rope_scaling": llama3}
    assert context_length(stretched) == 131072


def test_what_cannot_work_is_refused_at_the_call(vlm):
    with pytest.raises(ConfigError, match="max_tokens"):
        vlm.stream(QUESTION, max_tokens=0)
    with pytest.raises(PictureError):
        vlm.stream(QUESTION, ["no-such-picture.jpg"])
    with pytest.raises(PromptError):
        vlm.stream([*QUESTION, {"role": "assistant", "content": "A cat."}])
    with pytest.raises(TypeError):
        vlm.stream(QUESTION, max_token=3)


def test_closing_a_stream_leaves_the_next_one_right(vlm):
    chunks = vlm.stream(QUESTION, [picture(1)], max_tokens=50)
    next(chunks)
    chunks.close()
    assert vlm.generate(QUESTION, max_tokens=6).tokens == greedy(vlm, vlm.tokenize(QUESTION), 6)


def test_a_stop_string_ends_the_answer_and_is_not_in_it(vlm):
    whole = vlm.generate(QUESTION, [picture(1)], max_tokens=12)
    at = next(i for i in range(2, 10) if whole.text[i : i + 2].isascii())
    stop = whole.text[at : at + 2]
    expected = whole.text[: whole.text.index(stop)]
    *chunks, last = vlm.stream(QUESTION, [picture(1)], max_tokens=12, stop=[stop, "not there"])
    reply = last.reply
    assert reply.text == expected and reply.finish_reason == "stop"
    assert "".join(chunk.text for chunk in chunks) + last.text == expected
    assert reply.tokens == whole.tokens[: len(reply.tokens)] and len(reply.tokens) < 12
    assert vlm.generate(QUESTION, [picture(1)], max_tokens=12, stop="zzz").text == whole.text
