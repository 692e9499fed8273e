"""Every model with a short name: what it takes, whose terms it comes under, whether it is here.

Sizes are counted on the shipped configs: nothing is fetched, and no weights are read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..checkpoint import configs
from ..hub.cache import usable_snapshot
from ..hub.models import ALIASES
from ..loading import memory
from ..loading.cost import blueprint, own_dtype
from ..wording import gigabytes

UNKNOWN = "not known"


@dataclass(frozen=True)
class Available:
    """bytes: of its weights as published. memory: bytes that a short question about a picture
    takes on this machine. licence: by SPDX or the Hub's name, None where nobody here has read it.
    """

    name: str
    repo: str
    family: str
    bytes: int
    licence: str | None
    memory: int
    here: bool


def models() -> Iterator[Available]:
    """A fraction of a second each."""
    for alias, repo in ALIASES.items():
        config = configs.read(alias)
        published = blueprint(
            config, dtype=own_dtype(config), quantization=config.get("quantization")
        )
        yield Available(
            name=alias,
            repo=repo,
            family=config["model_type"],
            bytes=published.nbytes,
            licence=configs.licence(alias),
            memory=_memory(config),
            here=usable_snapshot(repo) is not None,
        )


def _memory(config: Mapping[str, Any]) -> int:
    return sum(memory.of_question(memory.needed(config)).values())


def line(model: Available, limit: int | None) -> str:
    """A model on a line. limit: bytes that a model may take here, where that is known."""
    state = "here" if model.here else ""
    if limit is not None and model.memory > limit:
        state = ", ".join(filter(None, (state, "does not fit here")))
    licence = model.licence or UNKNOWN
    return _columns(model.name, gigabytes(model.bytes), gigabytes(model.memory), licence, state)


def heading() -> str:
    return _columns("name", "weights", "memory", "licence")


@cache
def _widths(aliases: tuple[str, ...]) -> tuple[int, int]:
    """Of the names and the licences, which are known before anything is counted."""
    licences = [configs.licence(alias) or UNKNOWN for alias in aliases]
    return max(map(len, aliases)), max(map(len, licences))


def _columns(name: str, weights: str, taken: str, licence: str, state: str = "") -> str:
    names, licences = _widths(tuple(ALIASES))
    return f"{name:{names}} {weights:>9} {taken:>9}  {licence:{licences}}  {state}".rstrip()
