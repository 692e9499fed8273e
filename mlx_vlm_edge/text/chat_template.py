"""Messages -> prompt text by a Hugging Face chat template, for the families that ship one."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..wording import first_line

if TYPE_CHECKING:
    import jinja2


def render_chat_template(
    template: str, messages: Sequence[Mapping[str, Any]], **variables: Any
) -> str:
    """Render a Hugging Face chat template (Jinja, sandboxed) with what transformers gives it.

    variables: add_generation_prompt, bos_token, tools, ... Raises UsageError when the template is
    broken or refuses the messages.
    """
    import jinja2

    try:
        return _compile(template).render(messages=messages, **variables)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, OverflowError) as error:
        reason = first_line(error)
        raise UsageError(
            f"the chat template cannot be used with these messages: {reason}"
        ) from None


@cache
def _compile(template: str) -> "jinja2.Template":
    from datetime import datetime

    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
