"""What a model's generation_config.json asks of sampling, where the caller asks for nothing."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError

# transformers' name -> (ours, its type); those below the line count only where it samples.
ALWAYS = {
    "max_new_tokens": ("max_tokens", int),
    "repetition_penalty": ("repetition_penalty", float),
}
SAMPLED = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
}


def sampling_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json as options of `reply.stream`.

    As in transformers, temperature, top_p, top_k and min_p count only with `do_sample`, whose
    temperature is 1 where the file gives none; without it decoding is greedy.
    """
    names = dict(ALWAYS)
    out: dict[str, Any] = {}
    if config.get("do_sample") is True:
        out["temperature"] = 1.0
        names |= SAMPLED
    for theirs, (ours, kind) in names.items():
        value = config.get(theirs)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise ConfigError(
                f"{theirs} (={value!r}) in generation_config.json must be a number: mend the file."
            )
        out[ours] = kind(value)
    return out
