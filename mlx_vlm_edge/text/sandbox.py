"""A Jinja environment for templates of others: no reach beyond its values, and an end to its work.

Every step of Python that a template takes is counted, and every text or list that it makes, before
it is made.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

STEPS = 1_000_000  # lines of Python; a chat of 1,000 turns takes some 50,000
LENGTH = 20_000_000  # characters or items of anything made
SIZE = 400_000_000  # of all together: a text that grows turn by turn is made as often
LARGEST = 10_000  # number that a method or filter may be called with: widths, counts
_WIDE = re.compile(r"\d{5,}|\*")  # a width in a format
# What no chat is written with, and may take long.
_LEFT_OUT = ("urlize", "wordwrap", "striptags", "xmlattr", "pprint")


class TooMuch(Exception):  # noqa: N818  (an end, not an error of ours)
    """A template's work went beyond its limits."""


class _Spent:
    """What one rendering has used up."""

    def __init__(self) -> None:
        self.steps = self.size = 0

    def step(self, *_: Any) -> Callable[..., Any]:
        self.steps += 1
        if self.steps > STEPS:
            raise TooMuch("it takes too many steps")
        return self.step

    def make(self, size: int) -> None:
        self.size += size
        if size > LENGTH or self.size > SIZE:
            raise TooMuch("it makes too much text")

    def weigh(self, value: Any) -> None:
        """Count a text or a collection with all that is in it, as often as it is there: lists of
        one list twice, and so on, would take for ever to write or compare."""
        rest = [value]
        while rest:
            match rest.pop():
                case str(text):
                    self.make(len(text))
                case dict(entries):
                    self.make(len(entries))
                    rest += entries.values()
                case list(items) | tuple(items):
                    self.make(len(items))
                    rest += items


_spent: ContextVar[_Spent] = ContextVar("spent")


@contextmanager
def limited() -> Iterator[None]:
    """Inside, templates are compiled and rendered within the limits. Raises TooMuch beyond them."""
    spent, before = _Spent(), sys.gettrace()
    token = _spent.set(spent)
    sys.settrace(spent.step)
    try:
        yield
    finally:
        sys.settrace(before)
        _spent.reset(token)


def _joined(pieces: Iterable[Any]) -> str:
    texts = [str(piece) for piece in pieces]
    _spent.get().make(sum(map(len, texts)))
    return "".join(texts)


class _Code(CodeGenerator):
    """Has `a ~ b` and collections written in a template counted as well."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self.write("environment.weighed(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self.write("environment.weighed(")
        super().visit_Dict(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx != "load":
            super().visit_Tuple(node, frame)
            return
        self.write("environment.weighed(")
        super().visit_Tuple(node, frame)
        self.write(")")


class Sandbox(ImmutableSandboxedEnvironment):
    """What transformers renders chat templates in, with limits; see `limited`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    code_generator_class = _Code
    concat = staticmethod(_joined)

    def __init__(self, filters: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        super().__init__(**options)
        known = {name: one for name, one in self.filters.items() if name not in _LEFT_OUT}
        self.filters = {name: self._checked(one) for name, one in {**known, **filters}.items()}
        del self.globals["lipsum"]

    @staticmethod
    def weighed(value: Any) -> Any:
        _spent.get().weigh(value)
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_binop(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, one: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_call(one, args, kwargs)
        return self.weighed(super().call(context, one, *args, **kwargs))

    def _checked(self, one: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose arguments and results are held against the limits."""

        @wraps(one)
        def checked(*args: Any, **kwargs: Any) -> Any:
            _check_call(one, args, kwargs)
            return self.weighed(one(*args, **kwargs))

        return checked


def _check_binop(operator: str, left: Any, right: Any) -> None:
    if operator == "**":
        if isinstance(left, int) and isinstance(right, int):
            _spent.get().make(left.bit_length() * abs(right))
    elif operator == "%" and isinstance(left, str):
        _check_format(left, right)
    elif operator == "+":
        _spent.get().make(_length(left) + _length(right))
    elif operator == "*":
        numbers = [n for n in (left, right) if isinstance(n, int)]
        if len(numbers) == 2:
            _spent.get().make(sum(n.bit_length() for n in numbers))
        elif numbers:
            _spent.get().make(max(_length(left), _length(right)) * max(numbers[0], 0))


def _length(value: Any) -> int:
    return len(value) if isinstance(value, Sized) else 0


def _check_format(form: str, values: Any) -> None:
    if _WIDE.search(form):
        raise TooMuch("a format in it is too wide")
    values = values if isinstance(values, tuple | list) else [values]
    _spent.get().make(len(form) + sum(len(v) for v in values if isinstance(v, str)) * len(form))


def _check_call(one: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What a method or filter would make out of all proportion to what it is called with."""
    method = getattr(one, "__wrapped__", one)  # of a format, which Jinja wraps
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    values = [*args, *kwargs.values()] if owner is None else [owner, *args, *kwargs.values()]
    texts = [value for value in values if isinstance(value, str)]
    if any(isinstance(value, int) and abs(value) > LARGEST for value in values):
        raise TooMuch(f"a number in it is too large for {name or 'a call'}")
    if name == "translate" or (name == "do_indent" and len(texts) > 1):
        raise TooMuch(f"it uses {name} as no chat does")
    match name.removeprefix("do_"):  # as Jinja names its filters
        case "replace":
            _check_replace(texts)
        case "join":
            _check_join(max(map(len, texts), default=0), values)
        case "format" | "format_map" if texts:
            _check_format(texts[0], values)


def _check_replace(texts: list[str]) -> None:
    if len(texts) > 2:
        text, old, new = texts[:3]
        _spent.get().make(text.count(old) * len(new))


def _check_join(between: int, values: list[Any]) -> None:
    for items in values:
        if isinstance(items, list | tuple | dict):
            _spent.get().make(between * len(items))
            _spent.get().weigh(items)


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks an answer for training: its inside."""

    tags = {"generation"}  # noqa: RUF012  (as Jinja has it)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
