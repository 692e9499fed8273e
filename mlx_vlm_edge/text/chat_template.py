"""Messages -> prompt text by a Hugging Face chat template, for the families that ship one."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    import jinja2

LONGEST = 1_000_000  # characters of a template; published ones have some thousands
_REMEDY = "the chat template cannot be used with these messages: "


def render_chat_template(
    template: str, messages: Sequence[Mapping[str, Any]], **variables: Any
) -> str:
    """Render a Hugging Face chat template (Jinja, sandboxed) with what transformers gives it.

    variables: add_generation_prompt, bos_token, ...; tools and documents are none. Raises
    UsageError when the template is broken, refuses the messages or does not come to an end.
    """
    from .sandbox import limited

    try:
        compiled = _compile(template)
        with limited():
            return compiled.render(
                {"messages": messages, "tools": None, "documents": None, **variables}
            )
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001  (a template may raise whatever Python does)
        raise UsageError(_REMEDY + _first_line(error)) from None


def takes_parts(template: str) -> bool:
    """Whether a template goes through a message's content part by part; others want it as text.

    True for `{% for part in message.content %}`, with or without filters.
    """
    import jinja2
    from jinja2 import nodes

    def is_content(node: nodes.Node) -> bool:
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        return isinstance(node, nodes.Getitem) and node.arg == nodes.Const("content")

    try:
        loops = list(_environment().parse(template).find_all(nodes.For))
    except (jinja2.TemplateError, RecursionError) as error:
        raise UsageError(_REMEDY + _first_line(error)) from None
    subjects = [[loop.iter, *loop.iter.find_all((nodes.Getattr, nodes.Getitem))] for loop in loops]
    return any(is_content(node) for nodes_of_one in subjects for node in nodes_of_one)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


@lru_cache(8)
def _compile(template: str) -> "jinja2.Template":
    from .sandbox import limited

    if len(template) > LONGEST:
        raise UsageError(f"the chat template is {len(template):,} characters long: it is none")
    with limited():
        return _environment().from_string(template)


@lru_cache(1)
def _environment() -> "jinja2.Environment":
    from datetime import datetime

    import jinja2
    from jinja2.ext import loopcontrols

    from .sandbox import Generation, Sandbox

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = Sandbox(
        {"tojson": tojson}, trim_blocks=True, lstrip_blocks=True,
        extensions=[loopcontrols, Generation],
    )  # fmt: skip
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
