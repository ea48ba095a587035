"""Tokenizer folders as the hub has them, at their real ids: Llama 3's, and LLaVA's own Llama 2."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hub_tokenizers import IMAGE, PAD, llama2_files, llama3_files
from tiny_vlm import picture, tiny_config, tiny_vlm

import mlxvlm
from mlxvlm.language.forward import embedding, hidden_states
from mlxvlm.language.tokenizer import Tokenizer
from mlxvlm.weights.join import image_token_id
from mlxvlm.weights.load import choose_prompt, layout_for
from mlxvlm.weights.save import save

END_OF_TEXT, EOT = 128001, 128009
QUESTION = "What is <image> and <|eot_id|> or </s> and <pad>?"


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama3_files(tmp_path_factory.mktemp("llama3"))


@pytest.fixture(scope="module", params=[True, False], ids=["special", "not-special"])
def llama2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama2_files(tmp_path_factory.mktemp("llama2"), special=request.param)


def test_llama_3(llama3: Path) -> None:
    tokenizer = Tokenizer.load(llama3)
    assert tokenizer.vocab_size == 128256
    assert tokenizer.bos_token_id == 128000
    assert tokenizer.eos_token_ids == {END_OF_TEXT, EOT}  # <|eot_id|> whatever eos_token says
    assert len(tokenizer.control) == 256 and min(tokenizer.control.values()) == 128000
    assert layout_for(tokenizer) == "llama-3"
    # A reserved token marks a picture, so no row is added to the table.
    assert image_token_id(tokenizer, {"vocab_size": 128256}) == 128002
    names = "<|reserved_special_token_0|><|eot_id|><|reserved_special_token_250|>"
    assert max(tokenizer.encode(names)[0]) < 128000
    assert tokenizer.decode(tokenizer.encode(names)[0]) == names


def test_llama_2_with_added_tokens(llama2: Path) -> None:
    tokenizer = Tokenizer.load(llama2)
    assert tokenizer.vocab_size == 32002
    assert tokenizer.id("<image>") == IMAGE and tokenizer.id("<pad>") == PAD
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, {2})
    assert layout_for(tokenizer) == "vicuna_v1"
    ids = tokenizer.encode("a <image> b</s><pad>")[0]
    assert not {0, 1, 2, IMAGE, PAD} & set(ids)
    assert tokenizer.decode(ids) == "a <image> b</s><pad>"


def test_the_template_of_llava_s_processor_means_vicuna(llama2: Path) -> None:
    """LLaVA-1.5 keeps its template in a file of the processor, not of the tokenizer."""
    tokenizer, config = Tokenizer.load(llama2), tiny_config()
    assert tokenizer.chat_template is None
    choose_prompt(config, tokenizer, llama2)
    assert tokenizer.chat_template is not None and config.prompt.layout == "vicuna_v1"


def vlm_with(folder: Path, image: int, vocab: int) -> mlxvlm.VLM:
    """The tiny model with the folder's tokenizer and a vocabulary of its size."""
    config = tiny_config()
    config.language = {**config.language, "hidden_size": 16, "vocab_size": vocab}
    config.prompt = dataclasses.replace(config.prompt, image_token_id=image)
    vlm = tiny_vlm(config)
    tokenizer = Tokenizer.load(folder)
    choose_prompt(config, tokenizer, folder)
    vlm.tokenizer = tokenizer
    return vlm


def says(vlm: mlxvlm.VLM, messages: list[dict[str, Any]], wanted: dict[int, float]) -> Any:
    """The reply of a model whose head is set so that the first answer's logits are `wanted`."""
    prompt = vlm.tokenize(messages, [picture(0)])
    hidden = hidden_states(vlm.language, vlm.embed(prompt.tokens[None], prompt.pictures))[0]
    last = hidden[0, -1] / mx.sum(hidden[0, -1] ** 2)
    weight = np.zeros(embedding(vlm.language).weight.shape, np.float32)
    for token, logit in wanted.items():
        weight[token] = logit * np.array(last)
    vlm.language.lm_head.weight = mx.array(weight)
    # Greedy: the files ask for sampling.
    return vlm.generate(messages, [picture(0)], max_tokens=3, temperature=0.0)


CASES: dict[str, tuple[Callable[..., Path], int, int, dict[int, str]]] = {
    "llama3": (llama3_files, 128002, 128256, {END_OF_TEXT: "stop", EOT: "stop", 300: "length"}),
    "llama2": (llama2_files, IMAGE, 32064, {2: "stop", 300: "length"}),
}


@pytest.mark.parametrize("name", CASES)
def test_answers_end_and_never_speak_the_image_token(tmp_path: Path, name: str) -> None:
    files, image, vocab, ends = CASES[name]
    vlm = vlm_with(files(tmp_path / "files"), image, vocab)
    tokenizer = vlm.tokenizer
    assert tokenizer is not None
    messages = [{"role": "user", "content": QUESTION}]
    prompt = vlm.tokenize(messages, [picture(0)])
    # What the user wrote stays text: the picture's places are the only image tokens.
    assert (prompt.tokens == image).sum() == vlm.config.tokens_per_view == 16
    assert QUESTION in tokenizer.decode([i for i in prompt.tokens if i != image], False)
    assert prompt.tokens[0] == tokenizer.bos_token_id
    controls = np.isin(prompt.tokens, list(tokenizer.control.values()))
    text = prompt.chars[:, 0] >= 0
    assert text.any() and not (controls & text).any()
    for token, reason in ends.items():
        # The image token, and the last row of the table, would win; neither may be sampled.
        wanted = {token: 1.0, image: 5.0} | ({vocab - 1: 5.0} if vocab == 32064 else {})
        reply = says(vlm, messages, wanted)
        assert reply.tokens[0] == token and reply.finish_reason == reason
        assert reply.text == "" if reason == "stop" else reply.text
    save(vlm, tmp_path / "out")
    again = mlxvlm.load(tmp_path / "out")
    assert again.tokenizer is not None
    assert again.tokenizer.eos_token_ids == tokenizer.eos_token_ids
    assert np.array_equal(again.tokenize(messages, [picture(0)]).tokens, prompt.tokens)
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())
