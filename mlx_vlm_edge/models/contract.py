"""What a family is made of; mypy holds every family's file against it, where that says FAMILY."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import mlx.core as mx

from ..checkpoint.weights import Weights
from ..errors import UsageError
from ..picture.preprocessing import Preprocessing
from ..picture.token_budget import check_method
from ..text.prompt import Processor
from .base import VisionLanguageModel


class FamilyConfig(Protocol):
    """A frozen dataclass of what a family needs of config.json.

    text: the language model's own. context: positions that it was trained for. source: config.json
    with every key of it, known or not.
    """

    @property
    def text(self) -> Any: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def context(self) -> int: ...
    @property
    def source(self) -> Mapping[str, Any]: ...

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a native config.json. Raises UsageError for a missing key or an unknown value."""

    def adapted(self, asked: Preprocessing) -> Self:
        """The same with the user's preprocessing. Raises UsageError for values that cannot be."""


C = TypeVar("C", bound=FamilyConfig)


def _none(config: FamilyConfig) -> dict[str, int]:
    return {}


@dataclass(frozen=True)
class Family(Generic[C]):
    """Config -> (processor, model), and native weights -> the model's parameters.

    Model: built from a config alone, its parameters unevaluated. rename: a native weight's name ->
    its parameter's. fold: renamed native weights -> the parameters. is_native: whether weights are
    in the native layout, by their names and shapes. own_tokens: those whose ids the model itself
    has, so that every tokenizer of it has them there.
    """

    Config: type[C]
    Processor: type[Processor]
    Model: Callable[[C], VisionLanguageModel]
    rename: Callable[[str], str]
    fold: Callable[[Weights, C], dict[str, mx.array]]
    is_native: Callable[[Mapping[str, mx.array]], bool]
    own_tokens: Callable[[C], dict[str, int]] = _none

    def check(self, config: C, asked: Preprocessing) -> None:
        """Raises UsageError for a preprocessing that the family does not understand."""
        config.adapted(asked)
        if asked.auto and not self.Processor.chooses_side:
            raise UsageError(
                "resolution auto: FastVLM alone has it, whose tower takes any size; give pixels"
            )
        if asked.budget is not None:
            check_method(asked.budget.method, self.Processor.methods(config))
