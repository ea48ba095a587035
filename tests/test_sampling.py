"""language/sampling.py: a model's generation_config.json, as far as nothing else is asked for."""

from __future__ import annotations

import pytest
from tiny_vlm import tiny_vlm

from mlxvlm.errors import ConfigError
from mlxvlm.language.sampling import sampling_defaults

LLAMA = {
    "bos_token_id": 128000,
    "do_sample": True,
    "eos_token_id": [128001, 128008, 128009],
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.45.0.dev0",
}
QUESTION = [{"role": "user", "content": "What is this?"}]


def test_options_of_published_files():
    assert sampling_defaults(LLAMA) == {"temperature": 0.6, "top_p": 0.9}
    greedy = {**LLAMA, "do_sample": False, "repetition_penalty": 1.1, "max_new_tokens": 99}
    assert sampling_defaults(greedy) == {"repetition_penalty": 1.1, "max_tokens": 99}
    qwen = {"do_sample": True, "temperature": None, "top_k": 20, "top_p": 0.8, "min_p": 0}
    assert sampling_defaults(qwen) == {"temperature": 1.0, "top_k": 20, "top_p": 0.8, "min_p": 0.0}
    assert sampling_defaults({}) == {}
    with pytest.raises(ConfigError, match="top_p .=.0.9.. in generation_config.json"):
        sampling_defaults({**LLAMA, "top_p": "0.9"})


def test_the_model_decides_what_the_caller_does_not():
    vlm = tiny_vlm()

    def tokens(**options):
        return vlm.generate(QUESTION, **{"max_tokens": 8, "seed": 4, **options}).tokens

    greedy = tokens()
    hot = tokens(temperature=1.5, top_k=50)
    assert hot != greedy
    vlm.tokenizer.generation_config = {"do_sample": True, "temperature": 1.5, "top_k": 50}
    assert tokens() == tokens(temperature=None) == hot
    assert tokens(temperature=0.0) == greedy
    assert tokens(top_k=1) == greedy  # one of them given, the others still the model's
    vlm.tokenizer.generation_config["do_sample"] = False
    assert tokens() == greedy
    vlm.tokenizer.generation_config["max_new_tokens"] = 3
    assert len(vlm.generate(QUESTION).tokens) == 3
    assert len(vlm.generate(QUESTION, max_tokens=5).tokens) == 5
