"""Names of files and folders, as users and the environment write them -> paths.

The one place that knows where home is. Where nobody does (no HOME, a user without an entry), and
in a file's name that only begins with ~, the ~ stays as it is: Path.expanduser would raise.
"""

import os
from pathlib import Path


def expand(name: str | os.PathLike[str]) -> Path:
    """The path of a name that a user wrote: "~/photo.jpg" -> /home/ann/photo.jpg."""
    return Path(os.path.expanduser(name))


def expand_all(value: str) -> Path:
    """The path that a variable of the environment names, with ~ and $NAME as huggingface_hub reads
    them: a shell expands neither in a file of variables."""
    return Path(os.path.expandvars(os.path.expanduser(value)))


def user_cache() -> Path:
    """Where this user's programs keep what they can make anew."""
    return expand_all(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
