"""What a model costs before it runs: operations, bytes, memory, and times by a roofline.

Pure arithmetic on configs, without mlx. Everything here is an estimate, and what prints it says so.
"""

from .memory import memory_bytes, weight_bytes
from .parts import SQUARE, parts_of
from .visual import Config, Size

__all__ = ["memory_bytes", "predicted_flops", "visual_tokens", "weight_bytes"]

TEXT_TOKENS = 24  # of FastVLM's prompt around "What are these?"


def predicted_flops(
    config: Config,
    resolution: int | None = None,
    text_tokens: int = TEXT_TOKENS,
    *,
    image: Size = SQUARE,
) -> dict[str, int]:
    """FLOPs of each stage: "vision", "connector", "prefill", and "decode" for one token after it.

    Two per MAC of matmuls and convolutions, of this runtime's own way to compute them. text_tokens:
    of the prompt beside the visual ones, and beside the markers of Idefics3's tiles, which are
    added. image: the picture's (width, height), which matters to the families that keep its shape
    or cut it up. Raises UsageError as `parts_of` does.
    """
    found = parts_of(config, resolution, image)
    positions = text_tokens + found.view.tokens + found.view.marks
    return {
        "vision": found.vision.flops,
        "connector": found.connector.flops,
        "prefill": found.decoder.prefill(positions).flops,
        "decode": found.decoder.step(positions).flops,
    }


def visual_tokens(config: Config, resolution: int | None = None, *, image: Size = SQUARE) -> int:
    """How many visual tokens a picture of that size becomes. Raises as `parts_of` does."""
    return parts_of(config, resolution, image).view.tokens
