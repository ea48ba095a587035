"""Builds the demo's tokenizer: byte-level BPE in which every word of the drawn world is one token.

It splits text as Llama-3's does and, like it, looks a whole word up before it merges
(`ignore_merges`). So the words need no training corpus: they are entries of the vocabulary, and
merges exist only for the stems of plurals, " circle" + "s". Any other text falls apart into bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.shapes.phrases import PLURALS, printed, vocabulary

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROLS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|reserved_special_token_0|>",  # stands for a visual token; never text
)
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SPACE = "\u0120"  # how byte-level BPE writes " "
NEWLINE = "\u010a"


def build(extra: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer; ids are a function of the vocabulary's sorted words, then the extra ones."""
    merges: list[tuple[str, str]] = [(NEWLINE, NEWLINE), ("e", "s")]
    for stem in PLURALS:
        # Chains start at the space, which no other word of a text can hold: nothing cuts in.
        chain = SPACE + stem
        pairs = [(chain[:i], chain[i]) for i in range(1, len(chain))]
        merges += [pair for pair in pairs if pair not in merges]
    # Chains go before what could cut in on them.
    merges.sort(key=lambda pair: not pair[0].startswith(SPACE))
    entries = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries += [left + right for left, right in merges]
    words = [*vocabulary(), *ROLES]
    for form in ("{0}", "{1}", SPACE + "{0}", SPACE + "{1}"):
        entries += [form.format(word, word.capitalize()) for word in words]
    entries += printed() + [SPACE + text for text in printed() if text.isalpha()]
    entries += [SPACE + "[", "]."]  # around a box
    entries += [form for word in extra for form in (word, SPACE + word)]
    vocab: dict[str, int] = {}
    for entry in entries:
        vocab.setdefault(entry, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    _dress(tokenizer)
    return _with_controls(tokenizer)


def _dress(tokenizer: Tokenizer) -> None:
    """Splits text as Llama-3 does, into bytes."""
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]


def _with_controls(tokenizer: Tokenizer) -> Tokenizer:
    controls = [AddedToken(name, special=True, normalized=False) for name in CONTROLS]
    tokenizer.add_special_tokens(controls)  # type: ignore[arg-type]
    return tokenizer


def learn(texts: Iterable[str], size: int) -> Tokenizer:
    """An ordinary byte-level BPE of `size` tokens, its merges learnt from texts: what `build` is
    compared with. Words that are rare among the texts come apart."""
    tokenizer = Tokenizer(models.BPE())
    _dress(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(CONTROLS),  # type: ignore[call-arg]
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # type: ignore[call-arg]
        show_progress=False,  # type: ignore[call-arg]
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_controls(tokenizer)


def tokenizer_config() -> dict:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": CONTROLS[0],
        "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
