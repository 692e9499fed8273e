"""The keyword arguments of `generate` and `stream_generate`, for type checkers and completion.

They are the fields of Sampling and Options, where they are explained; a test compares the two.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from ..timings import Clock
    from .prefix import PrefixCache


class OptionKeywords(TypedDict, total=False):
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    repetition_context_size: int
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    max_tokens: int
    stop: str | Sequence[str]
    skip_special_tokens: bool
    max_kv_size: int | None
    kv_bits: int | None
    kv_group_size: int
    quantized_kv_start: int
    prefill_step_size: int
    schema: Mapping[str, Any] | str | None
    choices: Sequence[str] | None
    logprobs: int | None
    visual_tokens: int | float | None
    token_method: str | None
    draft: str | None


class AnswerKeywords(OptionKeywords, total=False):
    """What `stream_generate` takes by name, options included."""

    image: Any
    raw: bool
    verbose: bool
    clock: "Clock"
    prefix_cache: "PrefixCache | Literal[False] | None"
