"""Chat templates: Jinja in a sandbox, with the names that the hub's templates rely on."""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

from ..errors import PromptError


def render_template(template: str, **values: Any) -> str:
    """Renders a chat template; whatever goes wrong in it is a PromptError."""
    from jinja2 import TemplateError

    try:
        return _compiled(template).render(tools=None, documents=None, **values)
    except TemplateError as error:
        raise PromptError(f"the tokenizer's chat template refuses: {error}.") from None
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise PromptError(f"the tokenizer's chat template fails: {error}.") from None


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks answers in some templates; here it changes nothing."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
