"""Names in an adapter, which are its training code's -> native names, by the family's own rules."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.wording import some

from .families import source_family
from .rules import Rule, keep


@dataclass(frozen=True)
class Native:
    """A native name, and what the original's tensor becomes under it."""

    name: str
    transform: Callable[[mx.array], mx.array] = keep


def native_names(config: Mapping[str, Any], names: Iterable[str], called: str) -> dict[str, Native]:
    """The native name of every weight that an adapter changes, in whatever published spelling.

    called: the adapter, for messages. Raises UsageError for a family whose adapters are not known,
    and for names without a rule.
    """
    family = source_family(config)
    if not hasattr(family, "adapter_rules"):
        raise UsageError(f"{called}: adapters of {config.get('model_type')} models are not known")
    rules = [(re.compile(rule.pattern), rule) for rule in family.adapter_rules()]
    ruled = {name: _by_rule(name, rules) for name in names}
    if lost := [name for name, native in ruled.items() if native is None]:
        raise UsageError(
            f"{called}: {some(lost)} is no weight of a {config.get('model_type')} model that an "
            "adapter may change; it is of another base, or of a part that adapters may not change"
        )
    return {name: native for name, native in ruled.items() if native is not None}


def _by_rule(name: str, rules: Iterable[tuple[re.Pattern[str], Rule]]) -> Native | None:
    for pattern, rule in rules:
        if match := pattern.fullmatch(name):
            if rule.target is None:
                return None
            return Native(match.expand(rule.target), rule.transform)
    return None
