"""What the last `bench` of a model measured on this machine, for who has to choose by it.

A small JSON file in the user's cache: stages' seconds by model and precision, and at which size.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

from mlx_vlm_edge import whole_file
from mlx_vlm_edge.paths import expand_all, user_cache

VARIABLE = "MLX_VLM_EDGE_BENCH_FILE"  # names another file
STAGES = ("vision", "prefill")


@dataclass(frozen=True)
class Measured:
    """Median seconds. resolution: None for the checkpoint's own. rest: of ttft_e2e, beside both."""

    resolution: int | None
    vision: float
    prefill: float
    rest: float


def file() -> Path:
    if named := os.environ.get(VARIABLE):
        return expand_all(named)
    return user_cache() / "mlx-vlm-edge" / "bench.json"


def key(model: str, bits: int | None, dtype: str | None) -> str:
    return f"{model} {bits or 'as it is'} {dtype or 'as it is'}"


def remember(case: Mapping[str, Any], dtype: str | None) -> None:
    """Keep a case of `bench`; of several sizes the last. A cache that cannot be written is none."""
    figures = {name: figure["median"] for name, figure in case["figures"].items()}
    vision, prefill = (figures.get(f"stage: {name}", 0.0) for name in STAGES)
    measured = Measured(
        case["resolution"], vision, prefill, max(0.0, figures["ttft_e2e"] - vision - prefill)
    )
    entries = _read() | {key(case["model"], case["bits"], dtype): asdict(measured)}
    try:
        file().parent.mkdir(parents=True, exist_ok=True)
        whole_file.write(file(), json.dumps(entries, indent=1).encode())
    except OSError:
        return


def recall(model: str, bits: int | None, dtype: str | None) -> Measured | None:
    """What was measured of a model at that precision; None where nothing was, or is readable."""
    entry = _read().get(key(model, bits, dtype))
    if not isinstance(entry, dict):
        return None
    try:
        measured = Measured(**entry)
    except TypeError:  # of another version
        return None
    return measured if _sound(measured) else None


def _sound(measured: Measured) -> bool:
    """Whether every value is what the file's writer puts there: people edit files."""
    side, times = measured.resolution, (measured.vision, measured.prefill, measured.rest)
    return (side is None or (type(side) is int and side > 0)) and all(
        type(seconds) in (int, float) and 0 <= seconds < inf for seconds in times
    )


def _read() -> dict[str, Any]:
    try:
        content = json.loads(file().read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
