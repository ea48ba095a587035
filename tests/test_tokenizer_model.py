"""tokenizer.model without its repository's code: ids and text as sentencepiece itself has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from internvl_folders import sentencepiece_model

from mlxvlm.errors import ConfigError
from mlxvlm.language.tokenizer import Tokenizer

TEXTS = (
    "What is this picture?",
    "  two  spaces, a tab\tand\n\na newline ",
    "how many red circles are there",
    "naïve 你好 😀 \u200b",
    "<|im_end|> [UNUSED_TOKEN_3] </s> <0x41>",
    "a",
    "",
)


@pytest.fixture(scope="module", params=["plain", "prefix", "prefix, extra spaces gone"])
def places(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    from sentencepiece import SentencePieceProcessor

    prefix, remove = "prefix" in request.param, "extra" in request.param
    folder = sentencepiece_model(tmp_path_factory.mktemp("model"), prefix, remove)
    return Tokenizer.load(folder), SentencePieceProcessor(
        model_file=str(folder / "tokenizer.model")
    )


def check(places: tuple[Tokenizer, Any], text: str) -> None:
    tokenizer, theirs = places
    ids, _ = tokenizer.encode(text)
    if "UNUSED" in text or "</s>" in text:  # text never comes to a control token here
        assert not set(ids) & set(tokenizer.control.values()) - {0}
        return
    assert ids == theirs.encode(text), text
    assert tokenizer.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_sentencepieces(places, text):
    check(places, text)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("abcdehilnorstuw WPT?.\n你é😀"), max_size=40))
def test_any_text(places, text):
    check(places, text)


def test_control_tokens_take_the_places_of_vacant_pieces(places):
    tokenizer, theirs = places
    size = theirs.get_piece_size()
    assert theirs.id_to_piece(size - 1) == "[UNUSED_TOKEN_5]"
    assert tokenizer.id("<|im_start|>") == size - 1 and tokenizer.id("<|im_end|>") == size - 2
    assert tokenizer.id("[UNUSED_TOKEN_5]") is None and tokenizer.id("<IMG_CONTEXT>") == size + 2
    assert tokenizer.bos_token_id == 1 and tokenizer.eos_token_ids == {2, size - 2}
    assert tokenizer.decode([size - 1, *tokenizer.encode("What")[0]]).strip() == "What"


def test_it_is_saved_as_tokenizer_json(places, tmp_path):
    tokenizer, _ = places
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert again.control == tokenizer.control


def test_what_it_cannot_be_is_refused(tmp_path: Path):
    folder = sentencepiece_model(tmp_path, True, False)
    path = folder / "tokenizer_config.json"
    raw = json.loads(path.read_text())
    last = str(max(map(int, raw["added_tokens_decoder"])))
    added = dict(raw["added_tokens_decoder"])
    added[str(int(last) + 5)] = added.pop(last)
    path.write_text(json.dumps({**raw, "added_tokens_decoder": added}))
    with pytest.raises(ConfigError, match="'<IMG_CONTEXT>' should have id"):
        Tokenizer.load(folder)
    (folder / "tokenizer.model").write_bytes(b"\xff\xff no model")
    with pytest.raises(ConfigError, match="is no sentencepiece model"):
        Tokenizer.load(folder)
