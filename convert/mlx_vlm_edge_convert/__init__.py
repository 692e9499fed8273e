"""mlx-vlm-edge's converter: published PyTorch checkpoints -> the native MLX layout.

Never needed to run a converted model. `to_native` does it in memory, `convert` writes a folder.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["convert", "native_config", "to_native", "tower_repositories"]


def to_native(
    folder: Path, config: Mapping[str, Any]
) -> "tuple[dict[str, Any], dict[str, mx.array]]":
    """Native config and weights (lazy arrays) of a model folder; see `pipeline.to_native`."""
    from .pipeline import to_native as run

    return run(folder, config)


def native_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The native config of a published one, without its weights; see `pipeline.native_config`."""
    from .pipeline import native_config as run

    return run(config)


def tower_repositories(config: Mapping[str, Any]) -> list[str]:
    """The Hub's names of vision towers that a published model needs beside its own files."""
    from .pipeline import tower_repositories as run

    return run(config)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    bits: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
    verify: bool = False,
    overwrite: bool = False,
    adapter: Any = None,
    report: Callable[[str], None] | None = None,
) -> Path:
    """Write a model to a folder in the native layout; see `pipeline.convert`."""
    from .pipeline import convert as run

    return run(
        source, out, bits=bits, group_size=group_size, dtype=dtype, verify=verify,
        overwrite=overwrite, adapter=adapter, report=report,
    )  # fmt: skip
