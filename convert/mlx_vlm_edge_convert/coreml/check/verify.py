"""The one way by which a package is saved and believed: run here, held against MLX, or removed."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from mlx_vlm_edge.errors import UsageError

from ..parity import Check, Parity
from ..part import Part, Say


def saved_and_checked(part: Part, path: Path, say: Say) -> tuple[Part, Check]:
    """Save a part's package and hold it against MLX: the part as it was saved, repaired maybe.

    Raises UsageError when it is not what MLX computes; no package that fails stays on disk.
    """
    say(f"{part.name}: writing {path.name} and comparing it with the MLX model")
    try:
        part, check = part.verified(path)
        for line in part.warnings():
            say(f"  {part.name}: {line}")
        judge(f"the exported {part.name}", check.parity, say)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return part, check


def judge(what: str, comparisons: Iterable[Parity], say: Say) -> None:
    """Tell every comparison. Raises UsageError for the first that did not pass."""
    listed = [*comparisons]
    for parity in listed:
        say(f"  {parity.part}, {parity.inputs}: relative error {parity.error:.2e}")
    for parity in listed:
        if not parity.passed:
            raise UsageError(
                f"{what} is wrong: off by {parity.error:.2e} (relative) on {parity.inputs}, more "
                f"than {parity.limit:.0e}; nothing was kept"
            )
