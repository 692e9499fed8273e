"""A config, a picture's size and a prompt's length -> operations, bytes, memory.

Counted on the model's own shapes (loading/cost.py), with the prompts that `bench` asks.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlx_vlm_edge.checkpoint.quantization import GROUP_SIZE
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.loading import cost
from mlx_vlm_edge.loading.cost import SQUARE, Blueprint, Cost, Size
from mlx_vlm_edge.picture.preprocessing import Preprocessing
from mlx_vlm_edge.picture.token_budget import TokenBudget

from ..random.question import refuse_beyond, text_of
from ..random.weights import processor_of

Config = Mapping[str, Any]
BITS = (2, 3, 4, 5, 6, 8, 16)


def plan_of(
    config: Config,
    bits: int | None = None,
    dtype: str = "bfloat16",
    resolution: int | None = None,
    budget: TokenBudget | None = None,
) -> Blueprint:
    """A model's shapes as a GPU holds them.

    bits: of the language model, in groups of 64; 16 for an unquantised one, None for what the
    config's quantization block says. Raises UsageError for what cannot be.
    """
    if bits not in (None, *BITS):
        raise UsageError(f"bits {bits}: {', '.join(map(str, BITS[:-1]))} or 16 are known")
    block = config.get("quantization")
    if bits is not None:
        block = None if bits == 16 else {"bits": bits, "group_size": GROUP_SIZE}
    plan = cost.blueprint(config, dtype=dtype, quantization=block, fused=True)
    plan = replace(plan, asked=Preprocessing(resolution=resolution, budget=budget))
    plan.family.check(plan.config, plan.asked)  # or a clear line
    return plan


def prompt_cost(plan: Blueprint, image: Size = SQUARE, text_tokens: int | None = None) -> Cost:
    """What a question about a picture of that size costs.

    text_tokens: of the prompt, all beside the visual ones; by default those of a short question.
    Raises UsageError where the prompt is longer than the model's context.
    """
    processor = processor_of(plan, words_only=True)
    pixels = processor.preprocessor(1)(cost.blank(image))
    inputs = processor(text_of(processor, pixels, text_tokens), [pixels])
    visual = len(inputs.visual)
    refuse_beyond(plan.config.context, visual, inputs.input_ids.shape[1] - visual)
    return cost.cost(plan, inputs)


def visual_tokens(config: Config, resolution: int | None = None, *, image: Size = SQUARE) -> int:
    """How many visual tokens a picture of that size becomes."""
    plan = plan_of(config, resolution=resolution)
    return plan.processor.visual_tokens(plan.pixels(image))


def memory_bytes(
    config: Config,
    bits: int | None,
    context: int,
    *,
    dtype: str = "bfloat16",
    resolution: int | None = None,
    image: Size = SQUARE,
) -> dict[str, int]:
    """Bytes of "weights", "cache", "activations" and their "total" for a question about a picture.

    context: positions of the KV cache.
    """
    return prompt_cost(plan_of(config, bits, dtype, resolution), image).memory(context)
