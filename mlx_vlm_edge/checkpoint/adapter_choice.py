"""What a user says of adapters -> folders, how much of each one's update counts, and by which name
requests ask for it."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..paths import expand
from ..system_files import of_the_system

MAX_SCALE = 1000.0
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"


@dataclass(frozen=True)
class AdapterChoice:
    """A folder and how much of its update counts."""

    path: Path
    scale: float = 1.0

    @classmethod
    def of(cls, named: Any) -> "AdapterChoice":
        """From "folder", "folder:0.5", or (folder, 0.5). Raises UsageError for anything else."""
        if isinstance(named, cls):
            return named
        if isinstance(named, tuple) and len(named) == 2:
            folder, scale = named
        else:
            folder, scale = _split(named) if isinstance(named, str) else (named, 1.0)
        if not isinstance(folder, str | Path):
            raise UsageError(f"adapter {named!r}: give a folder, or a folder and a scale")
        number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not number or not -MAX_SCALE <= scale <= MAX_SCALE:
            raise UsageError(
                f"adapter {folder}: scale {scale!r} is no number from {-MAX_SCALE:g} to "
                f"{MAX_SCALE:g}"
            )
        return cls(expand(folder), float(scale))

    def identity(self) -> str:
        """A name of what the folder's files hold, whatever they are called and however old."""
        digest = hashlib.sha256()
        ours = (path for path in self.path.iterdir() if not of_the_system(path.name))
        for path in sorted(path for path in ours if path.is_file()):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.name} {content}\n".encode())
        return f"{self.scale:g} of {digest.hexdigest()[:16]}"


def _split(named: str) -> tuple[str, float]:
    """ "folder:0.5" -> ("folder", 0.5), unless there is a folder of the whole name."""
    match = re.fullmatch(r"(.+):(-?(?:\d+\.?\d*|\.\d+))", named)
    if match is None or expand(named).exists():
        return named, 1.0
    return match[1], float(match[2])


def choices(named: Any) -> tuple[AdapterChoice, ...]:
    """What `adapter` may be: one adapter, or several in a list. Raises UsageError for others."""
    if named is None:
        return ()
    several = named if isinstance(named, list) else [named]
    return tuple(map(AdapterChoice.of, several))


def split_named(
    adapters: Sequence[str] | None,
) -> tuple[list[str] | None, dict[str, AdapterChoice]]:
    """Adapters as the flag has them -> those for every request, and those that requests name.

    "french=folder:0.5" is one of the latter, unless there is a folder "french=folder". Raises
    UsageError for two of one name, and for a name that no request could have.
    """
    always: list[str] = []
    named: dict[str, AdapterChoice] = {}
    for text in adapters or ():
        name, equals, folder = text.partition("=")
        if not equals or "/" in name or AdapterChoice.of(text).path.exists():
            always.append(text)
        elif not re.fullmatch(NAME, name) or not folder:
            raise UsageError(
                f"--adapter {text}: give NAME=DIR, with a name of letters, digits, _, . and -, "
                "of at most 64"
            )
        elif name in named:
            raise UsageError(f"--adapter: two are named {name}; give each a name of its own")
        else:
            named[name] = AdapterChoice.of(folder)
    return always or None, named
