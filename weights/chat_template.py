"""Our prompt layouts as Jinja chat templates, for tools that know no layouts.

A template takes messages as transformers' processors do, a content being a text or a list of parts
({"type": "image"}, {"type": "text", "text": ...}), and gives the text that our layout gives, with
the image token once for each picture: the processor repeats it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mlxvlm.config import PromptConfig
from mlxvlm.errors import ConfigError, PromptError
from mlxvlm.prompts import internvl, vicuna

if TYPE_CHECKING:
    from mlxvlm.language.tokenizer import Tokenizer

# What no template writes by itself.
MARK = "\ue0f0"
# `content` and `front` of prompts/layout.py as a macro. ns.whole is the message's text, of which
# low to high is shown; ns.wait: a picture's suffix is due before what follows.
CONTENT = """\
{%- macro content(message, trim=false, front=false) -%}
{%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string
    else message['content'] -%}
{%- set images = parts | selectattr('type', 'equalto', 'image') | list -%}
{%- set texts = parts | selectattr('type', 'equalto', 'text') | list -%}
{%- set ns = namespace(whole=texts | map(attribute='text') | join, at=0, wait=false) -%}
{%- set trims = trim or (front and images | length > 0) -%}
{%- set low = ns.whole | length - ns.whole.lstrip() | length if trims else 0 -%}
{%- set high = ns.whole.rstrip() | length if trims else ns.whole | length -%}
{%- for part in (images + texts if front else parts) -%}
{%- if part['type'] == 'image' -%}
{%- if not sequence -%}
{{- suffix if ns.wait -}}{{- picture -}}{%- set ns.wait = true -%}
{%- endif -%}
{%- else -%}
{%- set start = [ns.at, low] | max -%}
{%- set end = [ns.at + part['text'] | length, high] | min -%}
{%- set ns.at = ns.at + part['text'] | length -%}
{%- if start < end -%}
{{- suffix if ns.wait -}}{{- ns.whole[start:end] -}}{%- set ns.wait = false -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- endmacro -%}
"""
# BOS, and under "sequence" all pictures behind it.
HEAD = """\
{{- bos -}}
{%- if sequence -%}
{%- for message in messages if message['content'] is not string -%}
{%- for part in message['content'] if part['type'] == 'image' -%}
{{- picture + suffix -}}
{%- endfor -%}
{%- endfor -%}
{%- endif -%}
"""
LAYOUTS = {
    "llama-3": """\
{%- macro turn(role, text) -%}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + text + '<|eot_id|>' -}}
{%- endmacro -%}
{%- if system and messages[0]['role'] != 'system' -%}
{{- turn('system', system.strip()) -}}
{%- endif -%}
{%- for message in messages -%}
{%- set text = content(message, trim=true) -%}
{%- if text or message['role'] != 'system' -%}{{- turn(message['role'], text) -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
""",
    "vicuna_v1": """\
{%- if messages[0]['role'] != 'system' -%}{{- system + ' ' -}}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set text = content(message) -%}{{- text + ' ' if text -}}
{%- elif message['role'] == 'user' -%}
{{- 'USER: ' + content(message, front=true) -}}
{{- ' ASSISTANT:' if not loop.last or add_generation_prompt -}}
{%- else -%}{{- ' ' + content(message) + '</s>' -}}
{%- endif -%}
{%- endfor -%}
""",
    "mistral": """\
{%- set ns = namespace(system=system) -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{%- set ns.system = content(message) -%}
{%- elif message['role'] == 'user' -%}
{{- '[INST] ' -}}
{{- '<<SYS>>\\n' + ns.system + '\\n<</SYS>>\\n\\n' if ns.system -}}
{%- set ns.system = '' -%}
{{- content(message, front=true) + ' [/INST]' -}}
{%- else -%}{{- ' ' + content(message) + ' </s>' -}}
{%- endif -%}
{%- endfor -%}
""",
    "internvl2_5": """\
{%- macro turn(role, text) -%}
{{- '<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n' -}}
{%- endmacro -%}
{%- if messages[0]['role'] != 'system' -%}{{- turn('system', system) -}}{%- endif -%}
{%- for message in messages -%}{{- turn(message['role'], content(message)) -}}{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt -}}
""",
    "plain": """\
{%- for message in messages if message['role'] != 'system' -%}
{%- if loop.first -%}
{%- for part in message['content'] if message['content'] is not string
    and part['type'] == 'image' -%}{{- picture if not sequence -}}{%- endfor -%}
{%- else -%}{{- content(message) + '\\n' -}}
{%- endif -%}
{%- endfor -%}
""",
}
# The tokenizer's own template, on contents that are one text with the image tokens in it; the
# whitespace around a content is left to it, as prompts/template.py does.
OWN = """\
{%- set own = namespace(messages=[]) -%}
{%- if system and messages[0]['role'] != 'system' -%}
{%- set own.messages = [{'role': 'system', 'content': TYPED(system)}] -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}{%- set text = message['content'] -%}
{%- else -%}
{%- set parts = message['content'] | rejectattr('text', 'equalto', '') | list -%}
{%- set first = parts[0]['text'] if parts and parts[0]['type'] == 'text' else '' -%}
{%- set last = parts[-1]['text'] if parts and parts[-1]['type'] == 'text' else '' -%}
{%- set before = first[:first | length - first.lstrip() | length] -%}
{%- set after = '' if parts | length == 1 and before == first else last[last.rstrip() | length:] -%}
{%- set text = before + content(message, true) + after -%}
{%- endif -%}
{%- set own.messages = own.messages + [{'role': message['role'], 'content': TYPED(text)}] -%}
{%- endfor -%}
{%- set messages = own.messages -%}
"""


def chat_template(prompt: PromptConfig, tokenizer: Tokenizer, image_token: str) -> str:
    """The template of a prompt layout for this tokenizer, image_token standing for a picture."""
    layout, sequence = prompt.layout, prompt.image_placement == "sequence"
    picture, suffix, system = image_token, prompt.image_suffix, prompt.system
    bos = _bos(tokenizer)
    if sequence and layout in ("chat_template", "internvl2_5"):
        raise ConfigError(f"prompt.image_placement 'sequence' is no template of {layout!r}.")
    if layout == "chat_template":
        if tokenizer.chat_template is None:
            raise ConfigError("prompt.layout is 'chat_template', but the tokenizer has none.")
        text = CONTENT + _typed(OWN, tokenizer) + tokenizer.chat_template
    else:
        text = CONTENT + HEAD + LAYOUTS[layout]
    if layout == "llama-3":
        bos = "<|begin_of_text|>"
    elif layout == "plain":
        suffix = ""
    elif layout == "vicuna_v1":
        system = system or vicuna.SYSTEM
    elif layout == "internvl2_5":
        system, picture = system or internvl.SYSTEM, f"<img>{picture}</img>"
    values = {
        "picture": picture,
        "suffix": suffix,
        "system": system,
        "bos": bos,
        "sequence": sequence,
    }
    # A JSON literal is one of Jinja's too.
    names = (
        f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n"
        for name, value in values.items()
    )
    return "".join(names) + text


def _bos(tokenizer: Tokenizer) -> str:
    """BOS as the template writes it: not where the text behind it would no longer count as the
    first, and the tokenizer puts one there by itself."""
    if tokenizer.bos_token_id is None:
        return ""
    backend, first = tokenizer.backend, tokenizer.bos_token_id
    token = backend.id_to_token(first)
    plain = backend.encode("a", add_special_tokens=False).ids
    behind = backend.encode(token + "a", add_special_tokens=False).ids
    if behind != [first, *plain] and backend.encode("a").ids == [first, *plain]:
        return ""
    return token


def _typed(text: str, tokenizer: Tokenizer) -> str:
    """Contents as the tokenizer's own template reads them: a text, or a list with one."""
    try:
        plain = MARK in tokenizer.render([{"role": "user", "content": MARK}], True)
    except PromptError:
        plain = False
    for value in ("system", "text"):
        typed = value if plain else "[{'type': 'text', 'text': " + value + "}]"
        text = text.replace(f"TYPED({value})", typed)
    return text
