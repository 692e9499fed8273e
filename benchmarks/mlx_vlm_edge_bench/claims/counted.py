"""A part of a claim -> its parameters, MACs and tokens, counted from shapes; nothing is run."""

import math
from dataclasses import replace
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.connectors.ldp import LDP, POOLED, LDPv2
from mlx_vlm_edge.connectors.pixel_shuffle import PixelShuffle
from mlx_vlm_edge.vision.vit import ViT, ViTConfig

from ..estimate import connector as connectors
from ..estimate.connector import ldp_side
from ..estimate.parts import Parts, parts_of
from ..estimate.work import Work
from .read import Claim, Part, Subject
from .timed import Pieces, features_shape, pieces


def counted(claim: Claim, subject: Subject) -> float:
    """What a count claim counts, of one subject, in the claim's unit."""
    unit = {"params": 1e6, "macs": 1e9, "tokens": 1}[claim.kind.split("_")[0]]
    count = {"params": parameters, "macs": macs, "tokens": tokens}[claim.kind.split("_")[0]]
    return sum(count(part) for part in subject.parts) / unit


def tokens(part: Part) -> int:
    """Visual tokens of `times` tiles, or the positions of a prefill."""
    if part.tokens is not None:
        return part.tokens
    found = pieces(part.model)
    _, features, _ = features_shape(found, part.resolution)
    join = found.connector_of(part.type)
    if isinstance(join, PixelShuffle):
        features //= join.scale**2
    elif isinstance(join, LDP):
        features = ldp_side(math.isqrt(features)) ** 2
    elif isinstance(join, LDPv2):
        features = POOLED**2
    return features * part.times


def parameters(part: Part) -> int:
    """Of the whole published tower, of the connector, or of the language model."""
    found = pieces(part.model)
    if part.part == "vision":
        return _size(_whole_tower(found, part.layers))
    if part.part == "connector":
        return _size(found.connector_of(part.type))
    return _size(found.language_model)


def _whole_tower(found: Pieces, published: int | None) -> nn.Module:
    """The tower with the layers that the model leaves out, and its final norm."""
    vision = found.config.vision
    if not isinstance(vision, ViTConfig):
        return found.tower
    given: dict[str, Any] = found.config.source.get("vision_config") or {}
    layers = published or given.get("num_hidden_layers", vision.layers)
    return ViT(replace(vision, layers=layers, post_norm=True))


def _size(part: nn.Module) -> int:
    return sum(array.size for _, array in tree_flatten(part.parameters()))


def macs(part: Part) -> int:
    """Multiply-accumulates of matmuls and convolutions."""
    return work(part).flops // 2


def flops(subject: Subject) -> int:
    """Of all parts together, two per MAC: what a ratio would be if only these took time."""
    return sum(work(part).flops for part in subject.parts)


def work(part: Part) -> Work:
    """What a part costs, by the estimate's counting; a tile's cost as often as there are tiles."""
    config = configs.read(part.model)
    found = parts_of(config, part.resolution)
    if part.part == "prefill":
        return found.decoder.prefill(part.tokens or 0)
    if part.part == "language":
        return found.decoder.prefill(1)
    whole = found.vision if part.part == "vision" else _connector(part, found)
    tiles = 1 if part.part == "connector" and part.type else found.view.tiles
    one = replace(whole, macs=whole.macs // tiles, attention=whole.attention // tiles)
    return one.runs(part.times)


def _connector(part: Part, found: Parts) -> Work:
    if part.type is None:
        return found.connector
    parsed = pieces(part.model).config
    side, features, width = parsed.vision.grid, parsed.vision.hidden_size, found.decoder.width
    if part.type == "mlp2x":
        return connectors.mlp(side**2, features, width)
    kind = connectors.ldp if part.type == "ldp" else connectors.ldpv2
    return kind(side, features, width)
