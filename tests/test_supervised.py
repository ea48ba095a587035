"""Every assistant turn is learnt, answer and end token, and nothing else: a table over layouts.

What is learnt is read back from a batch's labels, so all the way from a row's messages to the loss.
"""

import numpy as np
import pytest
from test_prompts import CHATML_CONTROL, chatml, llama3, llama3_template, says, system, user, vicuna
from tiny_tokenizers import byte_level
from tiny_vlm import tiny_config

from mlxvlm.config import PromptConfig
from mlxvlm.data.buckets import collate, group
from mlxvlm.data.records import Record
from mlxvlm.data.samples import prepare
from mlxvlm.errors import PromptError
from mlxvlm.images.picture import Cut
from mlxvlm.language.tokenizer import Tokenizer
from mlxvlm.prompts import normalize_messages, render
from mlxvlm.prompts.internvl import SYSTEM

IMAGE = 5000


def internvl() -> Tokenizer:
    return Tokenizer(byte_level((*CHATML_CONTROL, "<img>", "</img>", "<IMG_CONTEXT>")), None, {})


# layout -> tokenizer, what an answer becomes
LAYOUTS = {
    "llama-3": (llama3, "{}<|eot_id|>"),
    "vicuna_v1": (vicuna, " {}</s>"),
    "internvl2_5": (internvl, "{}<|im_end|>"),
    "plain": (vicuna, "{}\n"),
    "chat_template": (chatml, "{}<|im_end|>"),
    "chat_template of Llama": (llama3_template, "{}<|eot_id|>"),
}

# name -> messages, pictures, answers
ROWS = {
    "one turn": ([user(None, "What is this?"), says("A circle.")], 1, ["A circle."]),
    "multi-turn": (
        [
            user(None, "What is this?"),
            says("A circle."),
            user("How many?"),
            says("There are 3."),
            user("Red?"),
            says("blue"),
        ],
        1,
        ["A circle.", "There are 3.", "blue"],
    ),
    "multi-image": (
        [
            user(None, "and", None, "alike?"),
            says("The red and blue."),
            user("This?", None),
            says("A circle."),
        ],
        3,
        ["The red and blue.", "A circle."],
    ),
    "text-only": (
        [user("How many?"), says("3"), user("A circle?"), says("The answers are helpful.")],
        0,
        ["3", "The answers are helpful."],
    ),
    "system": (
        [
            system("The artificial assistant."),
            user(None, "this?"),
            says("red"),
            user("?"),
            says("b"),
        ],
        1,
        ["red", "b"],
    ),
    "the words of another turn": (
        [user(None, "assistant A circle."), says("user A circle."), user("A circle."), says("x")],
        1,
        ["user A circle.", "x"],
    ),
}
CASES = [(layout, row) for layout in LAYOUTS for row in ROWS if layout != "plain"]


def learnt(layout: str, messages: list, pictures: int) -> tuple[list[str], str]:
    """Runs of supervised tokens as text, and a batch's labels."""
    tokenizer = LAYOUTS[layout][0]()
    config = tiny_config(prompt=PromptConfig(layout.split(" ")[0], image_token_id=IMAGE))
    record = Record([f"{n}.png" for n in range(pictures)], messages)
    found, skipped = prepare([("row", record)], tokenizer, config, lambda name, among: Cut(1), 4096)
    assert not skipped
    (sample,) = found
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.supervised, [0]])))
    runs = [
        tokenizer.backend.decode(sample.tokens[a:b].tolist(), skip_special_tokens=False)
        for a, b in edges.reshape(-1, 2)
    ]
    batch = collate(group(found * 2, 0), 8)
    labels = batch.labels[: batch.supervised_tokens]
    half = labels[: len(labels) // 2]
    assert np.array_equal(half, labels[len(half) :])
    assert np.array_equal(half, sample.tokens[sample.supervised])
    # A label is what follows the position that predicts it.
    flat = batch.tokens.reshape(-1)
    where = batch.predict[: len(half)]
    assert np.array_equal(flat[where + 1], half) and not (flat[where + 1] == IMAGE).any()
    return runs, tokenizer.backend.decode(half.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(("layout", "row"), CASES)
def test_answers_and_their_ends_are_learnt_and_nothing_else(layout, row):
    messages, pictures, answers = ROWS[row]
    wanted = [LAYOUTS[layout][1].format(answer) for answer in answers]
    if layout == "vicuna_v1":  # a decoder of this kind drops a leading space
        wanted = [text.lstrip() for text in wanted]
    runs, labels = learnt(layout, messages, pictures)
    assert runs == wanted
    assert labels.replace(" ", "") == "".join(wanted).replace(" ", "")


def test_plain_learns_the_caption_and_its_newline():
    messages, pictures, answers = ROWS["one turn"]
    assert learnt("plain", messages, pictures)[0] == ["A circle.\n"]


def shown(messages: list, counts: list[int], ask: bool = False, **settings) -> str:
    tokenizer = internvl()
    parts, _ = normalize_messages(messages, ["x"] * len(counts))
    config = PromptConfig("internvl2_5", image_token_id=IMAGE, **settings)
    prompt = render(parts, counts, tokenizer, config, ask)
    ids = [tokenizer.control["<IMG_CONTEXT>"] if t == IMAGE else int(t) for t in prompt.tokens]
    return tokenizer.backend.decode(ids, skip_special_tokens=False)


def test_internvl_lays_out_as_its_authors_do():
    messages = [user(None, "What is this?"), says("A circle."), user("Red?")]
    assert shown(messages, [2], ask=True) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\nA circle.<|im_end|>\n"
        "<|im_start|>user\nRed?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert shown([system("Be brief."), user("Hi"), says("Ho")], []) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHo<|im_end|>\n"
    )
    two = shown([user(None, None, "alike?"), says("no")], [1, 2], system="S")
    assert "user\n<img><IMG_CONTEXT></img>\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nalike?<" in two
    with pytest.raises(PromptError, match="must be 'turn'"):
        shown(messages, [2], image_placement="sequence")
    plain = shown([user("a </img> b <|im_end|>"), says("x")], [])
    assert plain.count("<|im_end|>") == 4  # as words of a text, among three turns' own
