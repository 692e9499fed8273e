"""What a model needs of memory: weights, KV cache, activations."""

from collections.abc import Mapping
from typing import Any

from mlx_vlm_edge.errors import UsageError

from .parts import SQUARE, Parts, parts_of
from .visual import Size

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
BITS = (4, 8, 16)
STEP = 2048  # positions of a prefill that are computed together, as `generate` does it
TILES = 4  # that go through a vision tower together, about
# What the CPU back end was seen to hold in float32 (mlx 0.32): FastViTHD at 256 and 512 pixels 7.7
# times its widest layer, a SmolVLM tile 9.2; a prefill of 512 positions 1.4 and 1.5 times a layer.
TOWER_HELD, DECODER_HELD = 8, 1.5


def packed(bits: int | None) -> int | None:
    """4 or 8 bits per weight, None for none (16). Raises UsageError for anything else."""
    if bits not in (None, *BITS):
        raise UsageError(f"bits {bits}: 4, 8 or 16 are known")
    return None if bits == 16 else bits


def weight_bytes(
    config: Mapping[str, Any], bits: int | None = None, dtype: str = "bfloat16"
) -> int:
    """Bytes of a model's weights as `load` holds them.

    bits: 4 or 8 for a quantised language model (groups of 64; the rest stays in `dtype`).
    """
    return model_bytes(parts_of(config), packed(bits), _size(dtype))


def _size(dtype: str) -> int:
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def model_bytes(found: Parts, bits: int | None, size: int) -> int:
    """Bytes of the weights of all parts."""
    rest = found.vision.parameters + found.connector.parameters
    return rest * size + found.decoder.weight_bytes(bits, size)


def memory_bytes(
    config: Mapping[str, Any],
    bits: int | None = None,
    context: int | None = None,
    *,
    dtype: str = "bfloat16",
    resolution: int | None = None,
    image: Size = SQUARE,
) -> dict[str, int]:
    """Bytes of "weights", "cache", "activations" and their "total" for a prompt with one picture.

    context: positions the KV cache holds; by default the visual tokens and 512 more. Activations
    are a simple model: 8 times what the widest layer of the vision tower reads and writes, for up
    to 4 tiles, or 1.5 times what a layer of the decoder does in a prefill of up to 2048 positions,
    whichever is more, and the logits. Raises UsageError as `parts_of` does.
    """
    found, size = parts_of(config, resolution, image), _size(dtype)
    positions = found.view.tokens + found.view.marks + 512 if context is None else context
    needed = {
        "weights": model_bytes(found, packed(bits), size),
        "cache": found.decoder.cache_bytes(positions, size),
        "activations": _activations(found, size),
    }
    return {**needed, "total": sum(needed.values())}


def _activations(found: Parts, size: int) -> int:
    view, decoder = found.view, found.decoder
    positions = min(view.tokens + view.marks, STEP)
    prefill = int(DECODER_HELD * positions * decoder.passed)
    tower = TOWER_HELD * found.vision.widest * min(view.tiles, TILES)
    return size * max(prefill, tower) + decoder.vocabulary * 4
