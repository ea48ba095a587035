"""Prompts over the hub's own tokenizer folders, at their real ids, are those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_tokenizers import IMAGE, LLAVA_TEMPLATE, llama2_files, llama3_files

from mlxvlm.config import PromptConfig
from mlxvlm.language.tokenizer import Tokenizer
from mlxvlm.prompts import normalize_messages, render

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("layout", ["llama-3", "chat_template"])
def test_llama_3(tmp_path: Path, layout: str) -> None:
    folder = llama3_files(tmp_path)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    messages = [
        {"role": "user", "content": "What is this picture?\n\nThe 12345th 'red' one?"},
        {"role": "assistant", "content": "A blue circle."},
        {"role": "user", "content": "é 中文 🙂"},
    ]
    parts, _ = normalize_messages(messages, [])
    prompt = PromptConfig(layout=layout, image_token_id=128002)
    found = render(parts, [], Tokenizer.load(folder), prompt, True).tokens.tolist()
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found == wanted and found[0] == 128000 and 128009 in found


def test_llava_1_5(tmp_path: Path) -> None:
    """tokenizer.json as it stands, which writes a space after a control token, as LLaVA did.

    transformers 5's LlamaTokenizer builds its own steps in their stead; its fast base class reads
    the file's.
    """
    folder = llama2_files(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "The red circle"}]},
        {"role": "user", "content": [{"type": "text", "text": "How many shapes are there?"}]},
    ]
    system = {"role": "system", "content": [{"type": "text", "text": "A chat."}]}
    parts, _ = normalize_messages([system, *messages], ["picture"])
    prompt = PromptConfig(layout="vicuna_v1", image_token_id=IMAGE)
    found = render(parts, [3], Tokenizer.load(folder), prompt, True).tokens.tolist()
    image = "<image>" * 3
    text = (
        f"A chat. USER: {image}\nWhat is this? ASSISTANT: The red circle</s>"
        "USER: How many shapes are there? ASSISTANT:"
    )
    assert found == theirs(text).input_ids
    # The processor's template says the same of a first question, but for the system's sentence.
    asked = theirs.apply_chat_template(
        messages[:1], chat_template=LLAVA_TEMPLATE, add_generation_prompt=True, tokenize=False
    )
    assert asked == "USER: <image>\nWhat is this? ASSISTANT:"
