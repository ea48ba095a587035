"""Small tokenizers of the two kinds that language models have, made here and offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlxvlm.language.tokenizer import Tokenizer

LLAMA3_CONTROL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n'"
    " + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = (
    "user assistant system USER ASSISTANT What is this picture of the circle red blue How many "
    "shapes are there A chat between curious and an artificial intelligence The helpful answers"
).split()


def byte_level(control: tuple[str, ...] = LLAMA3_CONTROL) -> Any:
    """Byte-level BPE with Llama-3's split; `<image>` and `<think>` are added but not special."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ċ", "Ċ")] + _merges("Ġ")
    for pair in merges:
        vocab.setdefault("".join(pair), len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(control))
    backend.add_tokens(["<image>", AddedToken("<think>", special=False, normalized=False)])
    return backend


def sentencepiece(scheme: str = "legacy") -> Any:
    """BPE with byte fallback as Llama-2's. The leading space comes from a normalizer ("legacy"), or
    from Metaspace under the scheme named."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = _merges("▁")
    for char in ["▁", *map(chr, range(33, 127))]:
        vocab.setdefault(char, len(vocab))
    for pair in merges:
        vocab.setdefault("".join(pair), len(vocab))
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    backend = Tokenizer(model)
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    backend.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def llama3(**settings: Any) -> Tokenizer:
    return Tokenizer(byte_level(), None, settings)


def vicuna(scheme: str = "legacy") -> Tokenizer:
    return Tokenizer(sentencepiece(scheme), None, {})


def write_folder(folder: Path, backend: Any, **files: Any) -> Path:
    """tokenizer.json and JSON files beside it, by stem; a string is chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for stem, value in files.items():
        if isinstance(value, str):
            (folder / "chat_template.jinja").write_text(value, encoding="utf-8")
        else:
            (folder / f"{stem}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def _merges(space: str) -> list[tuple[str, str]]:
    """Merges that grow each word from its left end, and then take the space before it."""
    pairs = [(word[:i], word[i : i + 1]) for word in WORDS for i in range(1, len(word))]
    return list(dict.fromkeys(pairs)) + [(space, word) for word in dict.fromkeys(WORDS)]
