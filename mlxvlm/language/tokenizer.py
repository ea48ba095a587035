"""Text to ids and back, without ever letting text become a control token.

A tokenizer folder names control tokens (`<|eot_id|>`, `</s>`, `<image>`), and its library turns
their names into ids wherever they stand in a text, special or not. Here they are made by id alone:
`encode` reads every text with a copy of the model that knows no added token.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import read_json
from ..errors import ConfigError, PromptError
from . import tokenizer_model
from .plain_text import Encoded, PlainText

if TYPE_CHECKING:
    from .detokenizer import Detokenizer

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class Tokenizer:
    """A `tokenizers.Tokenizer` (`.backend`) and what its folder says around it.

    added: id -> token, the whole added vocabulary. special_ids: those that decoding leaves out.
    control: token -> id, those that text must never become: all but runs of whitespace.
    bos_token_id: None where the folder names none. eos_token_ids: every id that ends an answer.
    num_embeddings: rows of the language model's table, which prompts must keep to; None: unknown.
    """

    def __init__(self, backend: Any, folder: Path | None, settings: dict[str, Any] | None = None):
        settings = settings or {}
        self.backend = backend
        self.folder = folder
        self.special_tokens = _special_tokens(settings)
        self.chat_template: str | None = _template(settings)
        decoder = backend.get_added_tokens_decoder()
        self.added: dict[int, str] = {i: token.content for i, token in decoder.items()}
        self.special_ids = frozenset(i for i, token in decoder.items() if token.special)
        self.control = {token: i for i, token in self.added.items() if token.strip()}
        self._added_tokens = decoder
        self.bos_token_id = self._find_bos(settings)
        self.eos_token_ids = self._find_eos(settings)
        self.generation_config: dict[str, Any] = settings.get("generation_config") or {}
        self.num_embeddings: int | None = None
        self._plain = PlainText(backend, self.control.values())

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads tokenizer.json, or makes one of what the folder has."""
        from tokenizers import Tokenizer as Backend

        folder = Path(folder)
        path = folder / "tokenizer.json"
        settings = _read_settings(folder)
        if not path.exists():
            kind = str(settings["tokenizer_config"].get("tokenizer_class", ""))
            if kind.startswith("InternLM2") and (folder / tokenizer_model.FILE).is_file():
                return cls(tokenizer_model.convert(folder), folder, settings)
            return cls(_backend_from_transformers(folder), folder, settings)
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{path} is not a tokenizer: {error}.") from None
        return cls(backend, folder, settings)

    # Text to ids

    def encode(self, text: str, first: bool = True) -> Encoded:
        """Ids of a text and their places in it, as (start, end) in characters.

        Control tokens in the text stay text; no BOS or EOS is added. `first` is False for a text
        that follows a control token: sentencepiece vocabularies may write no leading space there.
        """
        return self._plain.encode(text, first)

    def encode_many(
        self, texts: Sequence[str], first: Sequence[bool] | None = None
    ) -> list[Encoded]:
        """`encode` for each of many texts, on all cores."""
        return self._plain.encode_many(texts, [True] * len(texts) if first is None else first)

    def encode_inside(self, text: str) -> list[int]:
        """Ids of a text that goes on within a line: no leading space of any scheme."""
        return self._plain.encode_inside(text)

    def id(self, token: str) -> int | None:
        """Id of a token by its name, or None."""
        return self.backend.token_to_id(token)

    def backend_with(self, token: str) -> Any:
        """A copy of the backend with one more special token."""
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self.backend.to_str())
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        return backend

    # Ids to text

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; an id outside the vocabulary gives nothing."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def detokenizer(self) -> Detokenizer:
        """A fresh streaming decoder."""
        from .detokenizer import Detokenizer

        return Detokenizer(self)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        size = self.backend.get_vocab_size(with_added_tokens=True)
        return max(size, max(self.added, default=-1) + 1)

    # Chat template

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """The tokenizer's own chat template, as text."""
        if self.chat_template is None:
            raise PromptError(
                "this tokenizer has no chat template; set prompt.layout to llama-3, vicuna_v1 "
                "or plain."
            )
        from .template import render_template

        return render_template(
            self.chat_template,
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            **self.special_tokens,
        )

    def split_control(self, text: str) -> list[tuple[str, int]]:
        """Cuts a template's own text at control tokens, which stand at the odd places.

        Each piece comes with its place in the text. A token that swallows the whitespace beside it
        (lstrip, rstrip) does so here.
        """
        pieces: list[tuple[str, int]] = []
        end = 0
        for match in self._control_pattern.finditer(text) if self.control else ():
            pieces += [(text[end : match.start()], end), (match[0], match.start())]
            end = match.end()
        pieces.append((text[end:], end))
        for at in range(1, len(pieces), 2):
            token = self._added_tokens[self.control[pieces[at][0]]]
            if token.lstrip:
                before, start = pieces[at - 1]
                pieces[at - 1] = (before.rstrip(), start)
            if token.rstrip:
                after, start = pieces[at + 1]
                pieces[at + 1] = (after.lstrip(), start + len(after) - len(after.lstrip()))
        return pieces

    # Saving

    def save(self, folder: str | Path) -> None:
        """Copies the files that the tokenizer came from; tokenizer.json is written in any case."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            source = self.folder / name if self.folder else None
            if source is None or not source.exists():
                if name == "tokenizer.json":
                    self.backend.save(str(folder / name))
                continue
            if source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        names = sorted(self.control, key=len, reverse=True)
        return re.compile("|".join(re.escape(name) for name in names))

    def _find_bos(self, settings: dict[str, Any]) -> int | None:
        if (
            "bos_token" in settings.get("tokenizer_config", {})
            or "bos_token" in self.special_tokens
        ):
            token = self.special_tokens.get("bos_token")
            return None if token is None else self.id(token)
        for name in ("<|begin_of_text|>", "<s>"):
            if name in self.control:
                return self.control[name]
        return None

    def _find_eos(self, settings: dict[str, Any]) -> set[int]:
        found: set[int] = set()
        config = settings.get("config", {})
        places = [settings.get("generation_config", {}), config]
        places += [config.get("language"), config.get("text_config")]
        for place in places:
            value = place.get("eos_token_id") if isinstance(place, dict) else None
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, int) and item >= 0:
                    found.add(item)
        # A turn's end ends an answer, whatever eos_token says: Llama 3's and ChatML's.
        for token in (self.special_tokens.get("eos_token"), "<|eot_id|>", "<|im_end|>"):
            if token is not None and (token_id := self.id(token)) is not None:
                found.add(token_id)
        return found


def _read_settings(folder: Path) -> dict[str, Any]:
    """The JSON files beside tokenizer.json, by name; a missing one is an empty dict."""
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config", "special_tokens_map", "generation_config", "config"):
        path = folder / f"{name}.json"
        settings[name] = read_json(path) if path.exists() else {}
    path = folder / "chat_template.jinja"
    if path.exists():
        settings["chat_template"] = path.read_text(encoding="utf-8")
    return settings


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ...: the token, of tokenizer_config.json or special_tokens_map.json."""
    found: dict[str, str] = {}
    for source in ("special_tokens_map", "tokenizer_config"):
        for name in SPECIAL_NAMES:
            value = settings.get(source, {}).get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                found[name] = value
    return found


def _template(settings: dict[str, Any]) -> str | None:
    template = settings.get("chat_template")
    if template is None:
        template = settings.get("tokenizer_config", {}).get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _backend_from_transformers(folder: Path) -> Any:
    try:
        from transformers import AutoTokenizer
        from transformers.utils import logging

        # It warns of every model_type that is not its own, which does not concern a tokenizer.
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        finally:
            logging.set_verbosity(verbosity)
        return tokenizer.backend_tokenizer
    except Exception as error:  # transformers raises whatever its readers raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{folder} has no tokenizer.json, and transformers cannot make a fast tokenizer of "
            f"what is there: {reason} Put the model's tokenizer.json into the folder."
        ) from None
