"""Tables of renames: the weights of a published layout -> the names of another one.

A name that no rule matches, or that two names would share, raises: nothing is dropped in silence.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.wording import some

Arrays = dict[str, mx.array]


def keep(array: mx.array) -> mx.array:
    """The array as it is."""
    return array


def to_channels_last(array: mx.array) -> mx.array:
    """A PyTorch convolution weight [O, I, kH, kW] -> MLX's [O, kH, kW, I]."""
    return array.transpose(0, 2, 3, 1)


def to_last_axis(array: mx.array) -> mx.array:
    """A layer scale [C, 1, 1] -> [1, 1, C]."""
    return array.transpose(1, 2, 0)


@dataclass(frozen=True)
class Rule:
    """Names that `pattern` matches as a whole become `target` (a `re` template).

    A target of None leaves the array out, and `why` then says why that is right.
    """

    pattern: str
    target: str | None
    transform: Callable[[mx.array], mx.array] = keep
    why: str = ""

    def __post_init__(self) -> None:
        if self.target is None and not self.why:
            raise ValueError(f"{self.pattern}: a rule that leaves weights out says why")


def apply(rules: Sequence[Rule], weights: Mapping[str, mx.array], layout: str) -> Arrays:
    """Rename and transform every array by the first rule that matches its whole name.

    `layout` names the source in messages. Arrays stay lazy. Raises UsageError for names without
    a rule and for two names that become one.
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    unknown: list[str] = []
    renamed: Arrays = {}
    for name, array in weights.items():
        tried = ((pattern.fullmatch(name), rule) for pattern, rule in compiled)
        match, rule = next(((match, rule) for match, rule in tried if match), (None, None))
        if match is None or rule is None:
            unknown.append(name)
        elif rule.target is not None:
            target = match.expand(rule.target)
            if target in renamed:
                raise UsageError(f"{layout}: {name} and another weight both become {target}")
            renamed[target] = rule.transform(array)
    if unknown:
        raise UsageError(f"{layout}: no rule for {some(unknown)}")
    return renamed
