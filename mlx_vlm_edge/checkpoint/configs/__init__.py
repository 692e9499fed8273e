"""The configs of every model that has an alias, in the native layout: for work without its files.

A JSON file per alias, what its `preprocessor_config.json` says under that key. `_source` tells
where the values are from, `_unconfirmed` which of them nobody has seen; neither changes a shape.
`_licence` is the weights', by the name their publisher gives it, with where that was read.
"""

import difflib
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UsageError
from ..files import read_json

_FOLDER = Path(__file__).parent


class Origin(NamedTuple):
    """Where a config's values are from, and the keys whose values are unconfirmed ("" for none)."""

    source: str
    unconfirmed: str


def names() -> list[str]:
    """The aliases there is a config of."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def read(alias: str) -> dict[str, Any]:
    """The config of an alias, as `loading.read_config` gives a folder's.

    Raises UsageError for a name without one.
    """
    return {key: value for key, value in _read(alias).items() if key[0] != "_"}


def origin(alias: str) -> Origin:
    """Where the config of an alias is from. Raises UsageError for a name without one."""
    content = _read(alias)
    return Origin(content["_source"], content["_unconfirmed"])


def licence(alias: str) -> str | None:
    """The licence of an alias's weights, None where nobody here has read it."""
    return _read(alias).get("_licence") or None


def _read(alias: str) -> dict[str, Any]:
    known = names()
    if alias.lower() not in known:
        near = difflib.get_close_matches(alias.lower(), known, n=2, cutoff=0.5)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(
            f"no config is shipped for {alias!r}; {meant}`mlx-vlm-edge models list --available` "
            "has the names"
        )
    return read_json(_FOLDER / f"{alias.lower()}.json")
