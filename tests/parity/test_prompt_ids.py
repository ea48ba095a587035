"""Prompts are, id by id, what transformers makes of the same messages."""

import numpy as np
import pytest
from tiny_tokenizers import (
    CHATML_TEMPLATE,
    LLAMA3_TEMPLATE,
    byte_level,
    sentencepiece,
    write_folder,
)

from mlxvlm.config import PromptConfig
from mlxvlm.language.tokenizer import Tokenizer
from mlxvlm.prompts import normalize_messages, render
from mlxvlm.prompts.vicuna import SYSTEM

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

LLAMA3_NAMES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
IMAGE = 5000


def chat(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    rows = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return ([{"role": "system", "content": system}] if system is not None else []) + rows


CHATS = [
    chat("Hi"),
    chat("What is this?", "A red circle.", "How many shapes are there?"),
    chat("  What\n\nis this? ", "\n\nTwo:\n- 'red'\n- blue\n", "42 + 1000000?", "é 中文 🙂"),
    chat("Hi", "Yo", "", "x", " ", "y", system="  You are helpful.\n"),
    chat("\tdef f(x):\n\n\n    return x", "    pass\n\n"),
]


def pair(folder, backend, template, names):
    """Ours and transformers' tokenizer of one folder."""
    config = {**names, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_folder(folder, backend, tokenizer_config=config, chat_template=template)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    return Tokenizer.load(folder), theirs


def ours(messages, tokenizer, layout, ask, images=(), **config):
    parts, images = normalize_messages(messages, images)
    prompt = PromptConfig(layout=layout, image_token_id=IMAGE, **config)
    return render(parts, [1] * len(images), tokenizer, prompt, ask)


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("layout", ["llama-3", "chat_template"])
def test_llama_3(tmp_path, messages, layout):
    tokenizer, theirs = pair(tmp_path, byte_level(), LLAMA3_TEMPLATE, LLAMA3_NAMES)
    ask = messages[-1]["role"] == "user"
    expected = theirs.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)
    assert ours(messages, tokenizer, layout, ask).tokens.tolist() == expected


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("rstrip", [False, True])
def test_chatml(tmp_path, messages, rstrip):
    from tokenizers import AddedToken

    backend = byte_level(("<|endoftext|>", "<|im_start|>"))
    backend.add_special_tokens([AddedToken("<|im_end|>", rstrip=rstrip, normalized=False)])
    names = {"eos_token": "<|im_end|>"}
    tokenizer, theirs = pair(tmp_path, backend, CHATML_TEMPLATE, names)
    ask = messages[-1]["role"] == "user"
    expected = theirs.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)
    assert ours(messages, tokenizer, "chat_template", ask).tokens.tolist() == expected


@pytest.mark.parametrize("scheme", ["legacy", "first", "always", "never"])
def test_vicuna(tmp_path, scheme):
    """The whole conversation as one string; BOS is the tokenizer's own."""
    tokenizer, theirs = pair(tmp_path, sentencepiece(scheme), "", {"bos_token": "<s>"})
    for messages in CHATS[:3]:
        ask = messages[-1]["role"] == "user"
        text = SYSTEM + " "
        for message in messages:
            if message["role"] == "user":
                text += f"USER: {message['content']} ASSISTANT:"
            else:
                text += f" {message['content']}</s>"
        expected = [tokenizer.bos_token_id, *theirs(text, add_special_tokens=False).input_ids]
        assert ours(messages, tokenizer, "vicuna_v1", ask).tokens.tolist() == expected


@pytest.mark.parametrize("scheme", ["legacy", "first"])
def test_vicuna_with_a_picture(tmp_path, scheme):
    """transformers' LLaVA has one `<image>` in the text for each visual token."""
    tokenizer, theirs = pair(tmp_path, sentencepiece(scheme), "", {"bos_token": "<s>"})
    prompt = ours(chat("What is this?"), tokenizer, "vicuna_v1", True, ["a.png"])
    text = f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT:"
    expected = theirs(text, add_special_tokens=False).input_ids
    expected = [IMAGE if i == tokenizer.id("<image>") else i for i in expected]
    assert prompt.tokens.tolist() == [tokenizer.bos_token_id, *expected]


@pytest.mark.parametrize("messages", [m for m in CHATS if m[-1]["role"] == "assistant"])
def test_supervised_is_transformers_mask_of_generated_tokens(tmp_path, messages):
    """Its templates mark answers with `{% generation %}`, which reaches to the end token."""
    template = (
        "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    tokenizer, theirs = pair(tmp_path, byte_level(), template, LLAMA3_NAMES)
    expected = theirs.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = np.array(expected["assistant_masks"], bool)
    assert mask.any()
    for layout in ("llama-3", "chat_template"):
        prompt = ours(messages, tokenizer, layout, False)
        assert prompt.tokens.tolist() == expected["input_ids"]
        assert prompt.supervised.tolist() == mask.tolist()


def test_a_folder_without_tokenizer_json(tmp_path):
    """GPT-2's older files, of which transformers makes a fast tokenizer."""
    import json

    state = json.loads(byte_level(("<|endoftext|>",)).to_str())
    vocab = {**state["model"]["vocab"], "<|endoftext|>": len(state["model"]["vocab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = "\n".join(" ".join(pair) for pair in state["model"]["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    ids, _ = tokenizer.encode("What is <|endoftext|>?")
    assert tokenizer.decode(ids) == "What is <|endoftext|>?"
    assert tokenizer.eos_token_ids == {tokenizer.id("<|endoftext|>")}
    assert not tokenizer.eos_token_ids & set(ids)
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").encode("What is") == tokenizer.encode("What is")


def test_a_folder_with_nothing_says_so(tmp_path):
    from mlxvlm.errors import ConfigError

    with pytest.raises(ConfigError, match="no tokenizer.json"):
        Tokenizer.load(tmp_path)
