"""A sentencepiece tokenizer.model as a `tokenizers.Tokenizer`, for folders that have nothing else.

InternLM2's repositories bring code to read theirs, and no tokenizer.json; that code is never run,
and what it does is said here: byte-pair encoding with bytes for what the vocabulary lacks, and
control tokens that take the places of vacant pieces ([UNUSED_TOKEN_145]) or stand behind the last.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..config import read_json
from ..errors import ConfigError

FILE = "tokenizer.model"
SPACE = "▁"


def convert(folder: Path) -> Any:
    """The tokenizer of `folder`/tokenizer.model with the added tokens that the folder names."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    # Made at import, so that no type checker knows what is in it.
    protos: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    model = protos.ModelProto()
    try:
        model.ParseFromString((folder / FILE).read_bytes())
    except Exception as error:  # protobuf's own, which differ between its builds
        raise ConfigError(f"{folder / FILE} is no sentencepiece model: {error}.") from None
    spec, normal = model.trainer_spec, model.normalizer_spec
    if spec.model_type != spec.BPE:
        raise ConfigError(f"{folder / FILE} must hold a BPE model, as InternLM2's does.")
    added = _added(folder)
    names = [added[i]["content"] if i in added else p.piece for i, p in enumerate(model.pieces)]
    vocab = {name: i for i, name in enumerate(names)}
    if len(vocab) != len(names):
        raise ConfigError(f"{folder}: an added token has the name of another piece.")
    merged = {p.piece: p.score for i, p in enumerate(model.pieces) if p.type == p.NORMAL}
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(merged, vocab),
            unk_token=names[spec.unk_id],
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    )
    steps: list[Any] = []
    if normal.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normal.precompiled_charsmap))
    if normal.remove_extra_whitespaces:
        from tokenizers import Regex

        # Spaces alone: sentencepiece keeps a newline at the end.
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if normal.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if normal.add_dummy_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(parts)
    for i, piece in enumerate(model.pieces):
        if piece.type in (piece.CONTROL, piece.UNKNOWN, piece.USER_DEFINED):
            special = piece.type != piece.USER_DEFINED
            added.setdefault(i, {"content": piece.piece, "special": special})
    for i in sorted(added):
        token = AddedToken(**{"normalized": False, **added[i]})
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != i:
            raise ConfigError(
                f"{folder}: added token {token.content!r} should have id {i}, but the vocabulary "
                f"gives it {backend.token_to_id(token.content)}."
            )
    return backend


def _merges(scores: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, the likeliest piece first."""
    found = [
        (-score, ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score in scores.items()
        if piece in ids
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _added(folder: Path) -> dict[int, dict[str, Any]]:
    """id -> fields of an added token, of tokenizer_config.json and added_tokens.json."""
    found: dict[int, dict[str, Any]] = {}
    if (folder / "added_tokens.json").exists():
        for content, i in read_json(folder / "added_tokens.json").items():
            found[int(i)] = {"content": content, "special": True}
    config = folder / "tokenizer_config.json"
    fields = read_json(config).get("added_tokens_decoder", {}) if config.exists() else {}
    known = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
    for i, token in fields.items():
        found[int(i)] = {name: token[name] for name in known if name in token}
    return found
