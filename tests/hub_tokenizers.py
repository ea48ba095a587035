"""Tokenizer folders with the files, names and ids that the hub's models have; few merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_tokenizers import LLAMA3_TEMPLATE, byte_level, sentencepiece, write_folder

IMAGE, PAD = 32000, 32001

# What the names of Llama 3's 256 control tokens are, where not <|reserved_special_token_N|>.
LLAMA3_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def llama3_files(folder: Path) -> Path:
    """Llama 3 Instruct as first published: 256 added tokens, eos_token is not the turn's end."""
    reserved = iter(range(251))
    names = [
        LLAMA3_NAMED.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(256)
    ]
    backend = _filled(byte_level(()), 128000, [_added(n) for n in names])
    backend.post_processor = _starts_with("<|begin_of_text|>", 128000)
    settings = {
        "added_tokens_decoder": {str(128000 + i): _added(n) for i, n in enumerate(names)},
        "bos_token": "<|begin_of_text|>",
        "chat_template": LLAMA3_TEMPLATE,
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|end_of_text|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    specials = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    ends = {"bos_token_id": 128000, "eos_token_id": [128001, 128009], "do_sample": True}
    return write_folder(
        folder,
        backend,
        tokenizer_config=settings,
        special_tokens_map=specials,
        generation_config=ends,
    )


def llama2_files(folder: Path, special: bool = True) -> Path:
    """LLaVA-1.5's Llama 2: legacy sentencepiece, `<image>` and `<pad>` added past its 32,000."""
    added = [_added(n) for n in ("<unk>", "<s>", "</s>")]
    added += [_added("<image>", special), _added("<pad>", special)]
    backend = _filled(sentencepiece(), 32000, added)
    backend.post_processor = _starts_with("<s>", 1)
    places = [0, 1, 2, IMAGE, PAD]
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): token for i, token in zip(places, added, strict=True)},
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": False,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<pad>",
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    whole: dict[str, Any] = {"lstrip": False, "normalized": False, "rstrip": False}
    specials = {
        f"{kind}_token": {"content": token, **whole, "single_word": False}
        for kind, token in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"), ("unk", "<unk>"))
    }
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
    return write_folder(
        folder,
        backend,
        tokenizer_config=settings,
        special_tokens_map=specials,
        generation_config=ends,
        chat_template={"chat_template": LLAVA_TEMPLATE},
    )


def _added(content: str, special: bool = True) -> dict[str, Any]:
    return {
        "content": content,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": special,
    }


def _filled(backend: Any, size: int, added: list[dict[str, Any]]) -> Any:
    """The tokenizer with `size` words of its own, and then the added tokens it lacks."""
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    vocab: dict[str, int] = state["model"]["vocab"]
    vocab |= {f"\x01{i}": i for i in range(len(vocab), size)}
    next_id = iter(range(size, size + len(added)))
    state["added_tokens"] = [
        {"id": vocab[t["content"]] if t["content"] in vocab else next(next_id), **t} for t in added
    ]
    return Tokenizer.from_str(json.dumps(state))


def _starts_with(token: str, token_id: int) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, token_id)]
    )
