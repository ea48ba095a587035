"""reuse.py: what is not computed twice, and that nobody can tell from the answers."""

from __future__ import annotations

import functools
import random
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import ArraysCache
from tiny_vlm import IMAGE, LFM2, VOCAB, picture, tiny_config, tiny_tokenizer, tiny_vlm

import mlxvlm.language.generate as generate_module
from mlxvlm.chat import Conversation
from mlxvlm.config import TILINGS, ProjectorConfig, PromptConfig, TilingConfig
from mlxvlm.errors import ConfigError
from mlxvlm.images.picture import Features, Picture
from mlxvlm.language.kv import KVSettings, copied, make_caches
from mlxvlm.model import VLM
from mlxvlm.reuse import Reuse
from mlxvlm.vision.siglip import SiglipVision

MIXED = ["sliding_attention", "full_attention"]
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": VOCAB}
DECODERS = {
    "llama": {},
    # Windows shorter than a picture, between a picture and a turn, and longer than a turn.
    "window 6": {"layer_types": MIXED, "sliding_window": 6},
    "window 30": {"layer_types": MIXED, "sliding_window": 30},
    "window 120": {"layer_types": MIXED, "sliding_window": 120},
    "qwen2": {"model_type": "qwen2"},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 20,
        "sliding_window_pattern": 2,
    },
    "internlm2, dynamic": {
        "model_type": "internlm2",
        "bias": False,
        "rope_scaling": {"type": "dynamic", "factor": 4.0},
        "max_position_embeddings": 130,
    },
    "lfm2": {
        "model_type": "lfm2",
        **SMALL,
        **LFM2,
    },
}
# Of the largest logit: the same sums, cut into other pieces, in float32.
CLOSE = 1e-5


ANYRES: dict = {
    "tiling": TilingConfig(image_size=32, **TILINGS["anyres"]),
    "prompt": PromptConfig(image_token_id=IMAGE, merge="spatial_unpad"),
}


def build(name: str, **choices) -> VLM:
    """A decoder whose answers hang on distant tokens; weights are a function of the name."""
    fields = DECODERS[name]
    base = {} if name == "lfm2" else tiny_config().language
    mx.random.seed(3)
    vlm = VLM(tiny_config(language={**base, **fields}, **choices), tiny_tokenizer())
    louder = tree_map(lambda x: 2 * x if x.ndim == 2 else x, vlm.language.parameters())
    vlm.language.update(louder)
    last = "out_proj" if "out_proj" in vlm.projector else "linear_2"
    vlm.projector[last].weight = 4 * vlm.projector[last].weight
    vlm.eval()
    mx.eval(vlm.parameters())
    return vlm


@functools.cache
def decoder(name: str) -> VLM:
    return build(name)


@pytest.fixture
def logits(monkeypatch):
    """The logits [V] that each answer's first token was drawn from, call after call."""
    seen = []
    mute = generate_module._mute

    def spied(*args):
        process = mute(*args)
        first = True

        def call(tokens, values):
            nonlocal first
            if first:
                seen.append(np.array(values[0].astype(mx.float32)))
                first = False
            return process(tokens, values)

        return call

    monkeypatch.setattr(generate_module, "_mute", spied)
    return seen


@pytest.fixture
def work(monkeypatch):
    """Views that the encoder ran on, and positions that the decoder read."""
    counts = {"views": 0, "read": 0}
    look, lm = SiglipVision.__call__, generate_module._run

    def counted(self, pixels):
        counts["views"] += len(pixels)
        return look(self, pixels)

    def run(prefill, *rest):
        counts["read"] += len(prefill.embeddings)
        return lm(prefill, *rest)

    monkeypatch.setattr(SiglipVision, "__call__", counted)
    monkeypatch.setattr(generate_module, "_run", run)
    return counts


def ask(text):
    return [{"role": "user", "content": text}]


def close(a, b):
    return np.abs(a - b).max() <= CLOSE * np.abs(b).max()


def test_the_second_question_runs_no_encoder_and_reads_what_is_new(work):
    vlm = decoder("llama")
    chat = Conversation(vlm, max_tokens=6)
    chat.add(picture(1))
    first = list(chat.ask("What is this?"))[-1].reply
    assert work == {"views": 1, "read": first.prompt_tokens} and first.reused_tokens == 0
    work.update(views=0, read=0)
    second = list(chat.ask("And its colour?"))[-1].reply
    # All but what the answer is framed by: the tokens of answer and prompt before are there.
    assert second.reused_tokens >= first.prompt_tokens + first.generation_tokens - 3
    assert work == {"views": 0, "read": second.prompt_tokens - second.reused_tokens}
    assert work["read"] < 50


def test_separate_calls_share_through_one_object(work):
    vlm = decoder("llama")
    reuse = Reuse(vlm)
    vlm.generate(ask("What is this?"), [picture(1)], max_tokens=4, reuse=reuse)
    work.update(views=0, read=0)
    reply = vlm.generate(ask("Why?"), [picture(1)], max_tokens=4, reuse=reuse)
    assert work == {"views": 0, "read": reply.prompt_tokens - reply.reused_tokens}
    assert reply.reused_tokens > 16
    same = vlm.generate(ask("Why?"), [picture(1)], max_tokens=4, reuse=reuse)
    assert same.reused_tokens == same.prompt_tokens - 1 and same.tokens == reply.tokens
    other = vlm.generate(ask("Why?"), [picture(2)], max_tokens=4, reuse=reuse)
    assert other.reused_tokens < 16 and work["views"] == 1


def test_two_conversations_about_one_picture_keep_both(work):
    vlm = decoder("llama")
    reuse = Reuse(vlm)
    chats = [Conversation(vlm, reuse=reuse, max_tokens=5) for _ in range(2)]
    for chat in chats:
        chat.add(picture(1))
    before = [0, 17]
    for turn in range(3):
        for number, chat in enumerate(chats):
            work.update(views=0, read=0)
            reply = list(chat.ask(f"{number}, and {turn}?"))[-1].reply
            assert (work["views"] == 0) == bool(turn or number)
            assert work["read"] == reply.prompt_tokens - reply.reused_tokens
            assert reply.reused_tokens >= before[number]
            before[number] = reply.prompt_tokens


@pytest.mark.parametrize("name", DECODERS)
def test_a_walk_of_turns_retries_and_edits_answers_as_fresh_calls_do(name, logits):
    walk(decoder(name), name, [picture(seed) for seed in range(3)], logits)


@pytest.mark.parametrize("name", ["llama", "window 30", "lfm2"])
@pytest.mark.parametrize("projector", ["attention", "c_abstractor"])
def test_a_walk_among_pictures_of_any_resolution(name, projector, logits):
    """Of 4 or 5 views, and as many tokens as their padding leaves, each row's end among them."""
    fields = {"num_layers": 1, "num_query_tokens": 9} if projector == "c_abstractor" else {}
    chosen = ProjectorConfig(projector, 32, num_attention_heads=2, **fields)
    vlm = build(name, projector=chosen, **ANYRES)
    dice = np.random.default_rng(5)
    # The first two are cut alike, and so have equal tokens.
    shapes = ((30, 90, 3), (30, 90, 3), (12, 90, 3), (60, 60, 3))
    pictures = [dice.integers(0, 256, shape, np.uint8) for shape in shapes]
    counts = [len(vlm.project(vlm.look([one]))) for one in pictures]
    assert counts[0] == counts[1] and len(set(counts)) == 3
    walk(vlm, name, pictures, logits)


def walk(vlm, name, pictures, logits):
    """Conversations that grow, go back, branch and share pictures; every answer is that of a call
    without a past, and is drawn from the same logits."""
    reuse = Reuse(vlm)
    dice = random.Random(name)
    chats: list[tuple[list, list]] = [([], [])]
    reused = answered = 0
    for _ in range(14):
        messages, images = dice.choice(chats)
        move = dice.random()
        if messages and move < 0.25:  # the same question again, or another in its place
            messages = messages[:-2]
            images = images[: str(messages).count("'image'")]
        elif move < 0.35 or len(str(messages)) > 900:
            messages, images = [], []
        parts = [
            {"type": "text", "text": dice.choice(["Why?", "What is this?", "Who is it then?"])}
        ]
        if not messages or dice.random() < 0.3:
            parts.insert(0, {"type": "image"})
            images = [*images, dice.choice(pictures)]
        messages = [*messages, {"role": "user", "content": parts}]
        limit = dice.choice([1, 2, 9])
        reply = vlm.generate(messages, images, max_tokens=limit, reuse=reuse)
        fresh = vlm.generate(messages, images, max_tokens=limit)
        assert reply.tokens == fresh.tokens
        assert close(*logits[-2:])
        reused += reply.reused_tokens
        answered += reply.prompt_tokens
        chats.append(([*messages, {"role": "assistant", "content": reply.text}], images))
    assert reused > (0.2 if "dynamic" in name else 0.4) * answered


@pytest.mark.parametrize("name", ["window 6", "window 30", "lfm2"])
def test_states_that_cannot_be_cut_back_are_kept_where_they_will_be_wanted(name, work):
    """After the picture, for other questions, before the answer, for retries, and after it."""
    vlm = decoder(name)
    reuse = Reuse(vlm)
    first = vlm.generate(ask("What is this thing?"), [picture(1)], max_tokens=9, reuse=reuse)
    retry = vlm.generate(ask("What is this thing?"), [picture(1)], max_tokens=9, reuse=reuse)
    assert retry.reused_tokens == first.prompt_tokens - 1
    other = vlm.generate(ask("Why?"), [picture(1)], max_tokens=9, reuse=reuse)
    end = int(np.flatnonzero(vlm.tokenize(ask("Why?"), [picture(1)]).tokens == 261)[-1]) + 1
    assert other.reused_tokens >= end
    assert work["views"] == 1
    turns = [
        *ask("What is this thing?"),
        {"role": "assistant", "content": first.text},
        *ask("And?"),
    ]
    more = vlm.generate(turns, [picture(1)], max_tokens=9, reuse=reuse)
    retokenised = vlm.tokenize(turns, [picture(1)]).tokens[first.prompt_tokens :]
    if retokenised[: len(first.tokens)].tolist() == first.tokens:  # else the text is another
        assert more.reused_tokens == first.prompt_tokens + len(first.tokens)


@pytest.mark.parametrize("name", DECODERS)
def test_a_copy_and_its_original_do_not_write_into_each_other(name):
    """mlx-lm assigns into its arrays, and whoever holds the same object sees it."""
    lm = decoder(name).language

    def read(caches, *ids):
        return [np.array(lm(mx.array([[i]]), cache=caches)[0, -1]) for i in ids]

    def state():
        caches = make_caches(lm, KVSettings())
        read(caches, *range(70, 110))
        return caches

    original = state()
    copy = copied(original)
    other = read(copy, 1, 2, 3)
    for found, wanted in zip(read(original, 4, 5, 6), read(state(), 4, 5, 6), strict=True):
        assert np.array_equal(found, wanted)
    for found, wanted in zip([*other, *read(copy, 7)], read(state(), 1, 2, 3, 7), strict=True):
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("kind", [Picture, Features])
def test_a_picture_of_the_same_views_that_is_cut_otherwise_is_another(kind):
    """Black pictures, whose canvases and padding are black: their sizes alone tell them apart."""
    vlm = build("llama", **ANYRES)
    reuse = Reuse(vlm)
    looked = vlm.look([np.zeros((height, 96, 3), np.uint8) for height in (32, 16)])
    pictures = looked if kind is Picture else vlm.features(looked)
    for one in pictures:
        one.sha256 = None
    tall, flat = pictures
    assert all(np.array_equal(a, b) for a, b in zip(tall.views, flat.views, strict=True))
    vlm.generate(ask("Why?"), [tall], max_tokens=3, reuse=reuse)
    reply = vlm.generate(ask("Why?"), [flat], max_tokens=3, reuse=reuse)
    # The tokens before the picture agree, and its own numbers do, but not what stands for them.
    assert reply.reused_tokens < 16
    assert reply.tokens == vlm.generate(ask("Why?"), [flat], max_tokens=3).tokens


def test_what_is_kept_is_bounded_and_the_oldest_goes_first():
    vlm = decoder("llama")
    one = Reuse(vlm)
    vlm.generate(ask("What?"), [picture(0)], max_tokens=2, reuse=one)
    reuse = Reuse(vlm, limit=2 * one.prefixes.nbytes + 1)
    for seed in (1, 2, 1, 3):
        vlm.generate(ask("What?"), [picture(seed)], max_tokens=2, reuse=reuse)
        assert reuse.prefixes.nbytes <= reuse.prefixes.limit
    assert len(reuse.prefixes) == 2
    kept = [
        vlm.generate(ask("What?"), [picture(seed)], max_tokens=2, reuse=reuse).reused_tokens
        for seed in (1, 3)
    ]
    assert min(kept) > 16
    assert vlm.generate(ask("What?"), [picture(2)], max_tokens=2, reuse=reuse).reused_tokens < 16
    none = Reuse(vlm, limit=0)
    for _ in range(2):
        assert vlm.generate(ask("What?"), max_tokens=2, reuse=none).reused_tokens == 0
    assert len(none.prefixes) == 0


def test_new_weights_forget_what_the_old_ones_computed(work):
    vlm = build("llama")
    reuse = Reuse(vlm)
    old = vlm.generate(ask("Why?"), [picture(1)], max_tokens=5, reuse=reuse)
    weights = [(n, -x) for n, x in tree_flatten(vlm.vision.parameters())]
    vlm.vision.load_weights(weights)
    new = vlm.generate(ask("Why?"), [picture(1)], max_tokens=5, reuse=reuse)
    assert new.reused_tokens == 0 and work["views"] == 2 and new.tokens != old.tokens
    assert new.tokens == vlm.generate(ask("Why?"), [picture(1)], max_tokens=5).tokens


@pytest.mark.parametrize("name", ["llama", "window 30", "lfm2"])
@pytest.mark.parametrize("after", [0, 3])
def test_ctrl_c_in_the_middle_of_a_token_leaves_the_next_answer_right(name, after, monkeypatch):
    """Between two layers of one step, some hold one more token than others."""
    vlm = decoder(name)
    chat = Conversation(vlm, max_tokens=8)
    chat.add(picture(1))
    list(chat.ask("What?"))
    calls = 0
    last = type(vlm.language.layers[-1])
    call = last.__call__

    def interrupted(self, *args, **kwargs):
        nonlocal calls
        if self is vlm.language.layers[-1]:
            calls += 1
            if calls > after + 1:
                raise KeyboardInterrupt
        return call(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(last, "__call__", interrupted)
        list(chat.ask("And this, what is it?"))
    reply = list(chat.ask("Why?"))[-1].reply
    fresh = vlm.generate(chat.messages[:-1], chat.pictures, max_tokens=8)
    assert reply.tokens == fresh.tokens
    assert reply.reused_tokens > 16


def test_ctrl_c_in_the_encoder_leaves_what_was_known(work, monkeypatch):
    vlm = decoder("llama")
    chat = Conversation(vlm, max_tokens=8)
    chat.add(picture(1))
    before = list(chat.ask("What?"))[-1].reply
    chat.add(picture(2))

    def interrupted(self, pixels):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SiglipVision, "__call__", interrupted)
        list(chat.ask("And this?"))
    reply = list(chat.ask("And this?"))[-1].reply
    assert reply.reused_tokens >= before.prompt_tokens and work["views"] == 2


def test_interleaved_streams_leave_each_other_alone():
    vlm = decoder("llama")
    reuse = Reuse(vlm)
    questions = ["What is this?", "What is that?", "Why?"]
    vlm.generate(ask(questions[0]), [picture(1)], max_tokens=3, reuse=reuse)
    streams = [vlm.stream(ask(q), [picture(1)], max_tokens=7, reuse=reuse) for q in questions]
    tokens = [[] for _ in questions]
    for _ in range(8):
        for found, stream in zip(tokens, streams, strict=True):
            chunk = next(stream, None)
            if chunk is not None and chunk.token is not None:
                found.append(chunk.token)
    for question, found in zip(questions, tokens, strict=True):
        assert found == vlm.generate(ask(question), [picture(1)], max_tokens=7).tokens


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "window 30"])
def test_quantised_keys_and_values_are_reused_and_answer_alike(name, bits, logits):
    """Quantised from the first token on: a state hangs on the tokens before it alone. A rounding
    that float32 tips over moves one number by one step of its group."""
    vlm = wide(name)
    options = {"kv_bits": bits, "kv_group_size": 32, "max_tokens": 4}
    reuse = Reuse(vlm)
    vlm.generate(ask("What is this?"), [picture(1)], reuse=reuse, **options)
    reply = vlm.generate(ask("Why?"), [picture(1)], reuse=reuse, **options)
    assert reply.reused_tokens > 16
    vlm.generate(ask("Why?"), [picture(1)], **options)
    exact = vlm.generate(ask("Why?"), [picture(1)], max_tokens=4)
    assert exact.reused_tokens == 0
    *_, reused, fresh, whole = logits
    scale = np.abs(whole).max()
    noise = np.abs(fresh - whole).max() / scale
    assert 1e-5 < noise < (0.3 if bits == 4 else 0.02)  # quantised indeed, and not wrong
    assert np.abs(reused - fresh).max() / scale <= max(CLOSE, noise / 10)
    # What is kept in other ways is not mixed up.
    assert vlm.generate(ask("Why?"), [picture(1)], max_tokens=4, reuse=reuse).reused_tokens == 0


def wide(name):
    """Heads of 32, which a quantised group fits."""
    fields = {"num_attention_heads": 2, "num_key_value_heads": 1, **DECODERS[name]}
    return tiny_vlm(tiny_config(language={**tiny_config().language, **fields}))


def test_quantised_prefixes_take_less_memory():
    vlm = wide("llama")
    sizes = []
    for bits in (None, 8, 4):
        reuse = Reuse(vlm)
        options = {"kv_bits": bits, "kv_group_size": 32, "max_tokens": 2}
        vlm.generate(ask("Why?"), [picture(1)], reuse=reuse, **options)
        sizes.append(reuse.prefixes.nbytes)
    assert sizes[1] < 0.4 * sizes[0] and sizes[2] < 0.65 * sizes[1]


@pytest.mark.parametrize("size", [12, 60, 90, 500])
def test_a_bounded_cache_is_reused_until_it_has_overwritten_something(size, logits):
    vlm = decoder("llama")
    options = {"max_kv_size": size, "max_tokens": 6}
    reuse, plain = Reuse(vlm), Reuse(vlm)
    messages: list = []
    whole = []
    for text in ("What is this?", "Why?", "Who is it then?"):
        messages = [*messages, *ask(text)]
        reply = vlm.generate(messages, [picture(1)], reuse=reuse, **options)
        fresh = vlm.generate(messages, [picture(1)], **options)
        assert reply.tokens == fresh.tokens and close(*logits[-2:])
        fits = reply.prompt_tokens <= size
        if messages[1:]:
            assert (reply.reused_tokens > 16) == fits
        unbounded = vlm.generate(messages, [picture(1)], reuse=plain, max_tokens=6)
        whole.append(unbounded.tokens == reply.tokens)
        messages = [*messages, {"role": "assistant", "content": reply.text}]
    assert all(whole) == (size == 500)
    assert all(prefix.caches[0].offset < size for prefix in reuse.prefixes._kept)


def test_settings_of_the_cache_that_cannot_be():
    vlm = decoder("llama")
    for bad in ({"kv_bits": 5}, {"max_kv_size": 3}, {"kv_bits": 8, "max_kv_size": 50}):
        with pytest.raises(ConfigError, match="kv_"):
            vlm.stream(ask("Why?"), **bad)
    with pytest.raises(ConfigError, match="kv_group_size .=32. must divide.* 16"):
        vlm.generate(ask("Why?"), kv_bits=8, kv_group_size=32)
    with pytest.raises(ConfigError, match="nothing to act on"):
        make_caches(SimpleNamespace(make_cache=lambda: [ArraysCache(2)]), KVSettings(bits=8))
