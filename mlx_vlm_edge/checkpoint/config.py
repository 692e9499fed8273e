"""The configs of a model folder as one, and their values held against the types of a dataclass."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import Refusing, UsageError
from .files import CONFIG, GENERATION_CONFIG, read_json, read_preprocessor

PREPROCESSOR = "preprocessor_config"  # key for that file's content beside config.json's keys
MAX_NUMBER = 1 << 31  # what MLX counts a dimension with
MAX_LAYERS = 1000


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, with the eos ids of generation_config.json added to its own.

    What the folder says about preprocessing is under PREPROCESSOR, {} when it says nothing.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(f"{folder}: no config.json; name a folder with a model in it")
    config = read_json(path)
    generation = read_json(folder / GENERATION_CONFIG)
    if (more := generation.get("eos_token_id")) is not None:
        config["eos_token_id"] = _joined(config.get("eos_token_id"), more)
    return {**config, PREPROCESSOR: read_preprocessor(folder)}


def _joined(ids: Any, more: Any) -> Any:
    """Two entries of eos ids, each one id, several or None, as one: 1 and [1, 2] -> [1, 2]."""
    one, two = ([] if x is None else x if isinstance(x, list) else [x] for x in (ids, more))
    both = one + [x for x in two if x not in one]
    return both[0] if len(both) == 1 else both


def reading_values(where: str) -> Refusing:
    """The one net for values that are of another kind than a model's: what `check` and `number` do
    not see ends here, as what Python or MLX makes of it."""
    return Refusing(where, "a value is of the wrong kind", "take it from the original model's file")


def check(config: Any, *, positive: bool = False) -> None:
    """Raises UsageError naming the first field of a dataclass whose value is of another type, not
    finite, or beyond what any model has.

    With `positive`, every number in it must be above zero, as sizes are.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not fits(value, hint):
            raise UsageError(f"config.json: {name} cannot be {_shown(value)}")
        for one in _numbers(value):
            if not math.isfinite(one) or abs(one) >= MAX_NUMBER:
                raise UsageError(f"config.json: {name} cannot be {_shown(value)}")
            if positive and not one > 0:
                raise UsageError(f"config.json: {name} must be above zero, not {_shown(value)}")
            if name.endswith("layers") and one > MAX_LAYERS:
                raise UsageError(f"config.json: {name} {one:,} is more than any model has")


def number(settings: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number of a config that must be finite and above zero, the default where it is missing or
    null. Raises UsageError for anything else, and where it is missing without a default."""
    value = first(settings.get(key), default)
    if value is None:
        raise UsageError(f"config.json lacks {key!r}")
    fitting = fits(value, float) and abs(value) < MAX_NUMBER and math.isfinite(value)
    if not fitting or not value > 0:
        raise UsageError(f"config.json: {key} must be a number above zero, not {_shown(value)}")
    return float(value)


def first(*values: Any) -> Any:
    """The first that is not None, which is how a config says nothing: 0, [] and false are said."""
    return next((value for value in values if value is not None), None)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type: fits(3, float), fits((1, 2), tuple[int, ...])."""
    kind, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind is tuple:
        each = inner[:1] * len(value) if inner[1:] == (...,) and isinstance(value, tuple) else inner
        return (
            isinstance(value, tuple)
            and len(value) == len(each)
            and all(fits(item, of) for item, of in zip(value, each, strict=True))
        )
    if kind is Literal:
        return value in inner
    if kind in (Union, type(int | str)):
        return any(fits(value, one) for one in inner)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, Mapping if kind is Mapping else hint)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, tuple):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def says_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config ties the output head to the embedding: it, or its text_config, or neither
    says anything. transformers writes false beside a text_config that says true."""
    key = "tie_word_embeddings"
    said = [part[key] for part in (config, config.get("text_config") or {}) if key in part]
    return any(said) or not said
