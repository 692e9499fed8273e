"""What a model with random weights will take, held against what is free, before any is made."""

from typing import Any

import mlx.core as mx

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.loading.cost import Cost
from mlx_vlm_edge.wording import gigabytes

PROGRAM = 300_000_000  # the interpreter, and the buffers that MLX keeps for reuse
ALLOWANCE = 1_500_000_000  # for the activations of a part that is run by itself


def needed(cost: Cost, positions: int) -> dict[str, int]:
    """Bytes by what they are for. positions: of the KV cache. The activations' are an estimate."""
    parts = cost.memory(positions)
    return {
        "weights": parts["weights"],
        "KV cache": parts["cache"],
        "activations (estimated)": parts["activations"],
        "program": PROGRAM,
    }


def refuse_too_large(name: str, parts: dict[str, int], free: int | None) -> None:
    """Raises UsageError with the figures when the parts together are more than what is free."""
    total = sum(parts.values())
    if free is None or total <= free:
        return
    shown = " + ".join(f"{gigabytes(size)} {part}" for part, size in parts.items() if size)
    raise UsageError(
        f"{name} would take {gigabytes(total)} ({shown}) and {gigabytes(free)} are free: "
        "take a smaller model, --bits 4 or --dtype bfloat16, or close other programs"
    )


def usable(free: int | None) -> int | None:
    """What a model may take of the free memory: on Metal no more than the system recommends."""
    details: dict[str, Any] = mx.device_info()
    limit = details.get("max_recommended_working_set_size")
    known = [int(size) for size in (free, limit) if size]
    return min(known) if known else None
