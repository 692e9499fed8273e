"""What a model with random weights will take, held against what is free, before any is made."""

from typing import Any

import mlx.core as mx

from ..errors import UsageError
from ..estimate.parts import parts_of
from .random_weights import Blueprint

# Activations, and the buffers that MLX keeps: FastVLM at 1024 pixels in float32 holds about 1 GB,
# LLaVA-OneVision's 8,765 tokens on the CPU somewhat more in attention scores.
ALLOWANCE = 1_500_000_000


def needed(plan: Blueprint, positions: int) -> dict[str, int]:
    """Bytes by what they are for; nothing is evaluated. positions: of the KV cache."""
    decoder = parts_of(plan.config.source).decoder
    return {
        "weights": plan.nbytes,
        "KV cache": decoder.cache_bytes(positions, plan.dtype.size),
        "allowance for activations": ALLOWANCE,
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


def gigabytes(size: float) -> str:
    """2_481_048_960 -> "2.48 GB"; 1e9 bytes are one."""
    return f"{size / 1e9:.2f} GB"
