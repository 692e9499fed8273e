"""A part of a claim -> its parameters, MACs and tokens, counted from shapes; nothing is run."""

from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_vlm_edge.loading.counting import Work
from mlx_vlm_edge.loading.counting import counted as counted_work
from mlx_vlm_edge.vision.vit import ViT, ViTConfig

from ..estimate.text import prompt_work
from .read import Claim, Part, Subject
from .timed import ModelParts, features_shape, middle, model_parts, side_of


def counted(claim: Claim, subject: Subject) -> float:
    """What a count claim counts, of one subject, in the claim's unit."""
    unit = {"params": 1e6, "macs": 1e9, "tokens": 1}[claim.kind.split("_")[0]]
    count = {"params": parameters, "macs": macs, "tokens": tokens}[claim.kind.split("_")[0]]
    return sum(count(part) for part in subject.parts) / unit


def tokens(part: Part) -> int:
    """Visual tokens of `times` tiles, or the positions of a prefill."""
    if part.tokens is not None:
        return part.tokens
    model = model_parts(part.model)
    shape = features_shape(model, part.resolution)
    if model.connector is None and part.type is None:
        return shape[1] * part.times
    return int(model.connector_of(part.type)(mx.zeros(shape)).shape[1]) * part.times


def parameters(part: Part) -> int:
    """Of the whole published tower, of the connector, or of the language model."""
    model = model_parts(part.model)
    if part.part == "vision":
        return _size(_whole_tower(model, part.layers))
    if part.part == "connector":
        return _size(model.connector_of(part.type))
    return _size(model.language_model)


def _whole_tower(model: ModelParts, published: int | None) -> nn.Module:
    """The tower with the layers that the model leaves out, and its final norm."""
    vision = model.config and model.config.vision
    if not isinstance(vision, ViTConfig):
        return model.tower
    config: dict[str, Any] = model.config.source.get("vision_config") or {}
    layers = published or config.get("num_hidden_layers", vision.layers)
    return ViT(replace(vision, layers=layers, post_norm=True))


def _size(part: nn.Module) -> int:
    return sum(array.size for _, array in tree_flatten(part.parameters()))


def macs(part: Part) -> int:
    """Multiply-accumulates of matmuls and convolutions."""
    return work(part).flops // 2


def flops(subject: Subject) -> int:
    """Of all parts together, two per MAC: what a ratio would be if only these took time."""
    return sum(work(part).flops for part in subject.parts)


def nbytes(subject: Subject) -> int:
    """That go between memory and processor, of all parts together."""
    return sum(work(part).nbytes for part in subject.parts)


@cache
def work(part: Part) -> Work:
    """What a part costs, as often as there are tiles or tokens to decode."""
    model = model_parts(part.model, part.bits)
    if part.part in ("prefill", "language"):
        return prompt_work(model.language_model, part.tokens or 1)[0]
    if part.part == "decode":
        return prompt_work(model.language_model, middle(part))[1].times(part.times)
    if part.part == "vision":
        side = side_of(model, part.resolution)
        pixels = mx.zeros((1, side, side, 3), model.dtype)
        return counted_work(lambda: model.tower(pixels)).times(part.times)
    features = mx.zeros(features_shape(model, part.resolution), model.dtype)
    join = model.connector_of(part.type)
    return counted_work(lambda: join(features)).times(part.times)
