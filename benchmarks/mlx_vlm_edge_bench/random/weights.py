"""A model's name -> the model at its full size with random weights, and a processor for it.

No file is read but its config: an alias's is shipped with the package. Latency does not depend on
the values. Parameters are made directly in the final dtype, the quantised ones as packed integers.
"""

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_vlm_edge.checkpoint.quantization import GROUP_SIZE
from mlx_vlm_edge.kernels import on_cpu
from mlx_vlm_edge.loading import cost
from mlx_vlm_edge.loading.cost import Blueprint, config_of
from mlx_vlm_edge.loading.load import arrange, quantize_language_model
from mlx_vlm_edge.models.base import VisionLanguageModel
from mlx_vlm_edge.text.prompt import Processor

from .tokenizer import random_tokenizer

BLOCK = (1 << 20) + 7  # random values that are drawn; laid end to end they fill the parameters
SEED = 7
WORDS_ONLY = 2048  # tokens of a vocabulary that has room for all words and markers
PACKED = mx.uint32  # of quantised weights


def blueprint(
    name: str, *, dtype: str | None = None, bits: int | None = None, config: Any = None
) -> Blueprint:
    """The shapes of a model as its config has it, or quantised to `bits` in groups of 64.

    dtype: float32 by default on the CPU back end, bfloat16 elsewhere.
    """
    source: Mapping[str, Any] = config or config_of(name)
    block = source.get("quantization")
    chosen = dtype or usual_dtype()
    plan = cost.blueprint(source, dtype=chosen, quantization=block)
    if bits is not None:
        quantize_language_model(plan.model, {"quantization": block}, bits)
    return plan


def usual_dtype() -> str:
    """What random weights are made in where nothing is said."""
    return "float32" if on_cpu() else "bfloat16"


def build(plan: Blueprint) -> tuple[VisionLanguageModel, Processor]:
    """Make the parameters, and a tokenizer; the blueprint's model is the one that is returned."""
    fill(plan.model, plan.dtype)
    arrange(plan.model)
    return plan.model, processor_of(plan)


def processor_of(plan: Blueprint, words_only: bool = False) -> Processor:
    """The family's processor with a synthetic tokenizer.

    words_only: one that lacks the rest of the vocabulary: sooner there, the same prompts.
    """
    size = (
        min(WORDS_ONLY, plan.config.text.vocab_size) if words_only else plan.config.text.vocab_size
    )
    tokenizer = random_tokenizer(size, plan.family, plan.config)
    return plan.family.Processor(plan.config, tokenizer, plan.asked)


def fill(part: nn.Module, dtype: mx.Dtype) -> None:
    """Give every parameter of a module random values that keep a signal's variance.

    One array at a time, so that no more than one is ever held twice.
    """
    draw = np.random.default_rng(SEED)
    normal = mx.array(draw.standard_normal(BLOCK, np.float32))
    packed = mx.array(draw.integers(0, 1 << 32, BLOCK, np.uint32))
    bits = {path: layer.bits for path, layer in part.named_modules() if "scales" in layer}
    filled = []
    for name, array in tree_flatten(part.parameters()):
        if array.dtype == PACKED:
            values = _laid_out(packed, array.shape, 1, PACKED)
        elif name.endswith((".scales", ".biases")):
            step = _step(name, array.shape, bits[name.rpartition(".")[0]])
            values = mx.full(array.shape, step, dtype)
        elif array.ndim == 1:
            values = mx.full(array.shape, 1.0 if name.endswith("weight") else 0.0, dtype)
        else:
            deviation = 1 / math.sqrt(math.prod(array.shape[1:]))
            values = _laid_out(normal, array.shape, deviation, dtype)
        mx.eval(values)
        filled.append((name, values))
    part.update(tree_unflatten(filled))


def _step(name: str, shape: tuple[int, ...], bits: int) -> float:
    """What a packed integer q of 0 .. 2 ** bits - 1 is multiplied by (scales) and moved by."""
    top = (1 << bits) - 1
    step = math.sqrt(12 / (top * (top + 2))) / math.sqrt(shape[-1] * GROUP_SIZE)
    return step if name.endswith(".scales") else -step * top / 2


def _laid_out(block: mx.array, shape: tuple[int, ...], factor: float, dtype: mx.Dtype) -> mx.array:
    """As much of the block as often as a shape needs, times a factor."""
    size = math.prod(shape)
    times = -(-size // block.size)
    length = -(-size // times)  # scaled after the cut, so that no array keeps the whole block
    row = (block[:length] * factor).astype(dtype)
    return mx.concatenate([row] * times)[:size].reshape(shape)
