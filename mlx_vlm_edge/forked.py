"""MLX's threads do not live on in a forked child: its first evaluation would wait for ever."""

import os

from .errors import UsageError

_user: int | None = None  # the process that has used MLX


def check() -> None:
    """To be called before MLX computes. Raises UsageError in the child of a process that did."""
    global _user
    if _user not in (None, os.getpid()):
        raise UsageError(
            "this process was forked from one that has used MLX, which cannot compute here: start "
            'it with multiprocessing.get_context("spawn"), or load the model after the fork alone'
        )
    _user = os.getpid()
