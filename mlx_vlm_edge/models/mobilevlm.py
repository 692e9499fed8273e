"""MobileVLM V1 and V2: CLIP ViT-L/14-336 -> LDP or LDPv2 -> MobileLLaMA or Vicuna.

LLaVA-1.5 but for the connector, which leaves 144 of the 576 tokens, and a flat config. V1 and V2
differ in the connector only (`mm_projector_type` "ldpnet" and "ldpnetv2").
Native layout: `vision_tower.vision_model.*`, `language_model.*`, and the connector under its
published names (`mm_projector.*`), convolutions channels-last.
Source: Meituan-AutoML/MobileVLM, mobilevlm/model/{mobilevlm,vision_projector}.py, conversation.py.
"""

import math
from collections.abc import Mapping
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.weights import Weights
from ..connectors.ldp import LDP, POOLED, LDPv2
from ..errors import UsageError
from ..language.llama import TextConfig
from ..picture.image import Pixels
from ..picture.token_budget import OF_TOKENS, Block
from . import llava
from .contract import Family

CONNECTORS = {"ldpnet": LDP, "ldpnetv2": LDPv2}
# Beginnings of the connectors' published names -> our parameters'. LDP's lists count from 1, since
# an nn.Identity is at their head.
RENAMES = {
    "mlp.mlp.0.": "mlp.layers.0.",
    "mlp.mlp.2.": "mlp.layers.2.",
    "peg.peg.0.weight": "peg",
    "peg.peg.0.bias": "peg_bias",
    "model.mlp.1.": "mlp.layers.0.",
    "model.mlp.3.": "mlp.layers.2.",
} | {
    f"model.mb_block.{block}.block.{source}": f"blocks.{block - 1}.{target}"
    for block in (1, 2)
    for source, target in (
        ("0.0.weight", "depthwise"),
        ("0.1.", "norm1."),
        ("1.fc1.", "reduce."),
        ("1.fc2.", "expand."),
        ("2.0.", "pointwise."),
        ("2.1.", "norm2."),
    )
}
PROJECTOR = "mm_projector."


class Config(llava.Config):
    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a native config.json. Raises UsageError for a missing key or an unknown value."""
        projector = config.get("mm_projector_type")
        if projector not in CONNECTORS:
            raise UsageError(f"config.json: mm_projector_type {projector!r} is not known")
        if "vision_config" not in config:
            raise UsageError("config.json lacks 'vision_config'")
        text = TextConfig.from_dict(config, "llama")
        read = cls.flat(config, text, projector)
        if not read.vision.class_token:
            raise UsageError("vision_config: a tower without a class token is not MobileVLM's")
        return read


def rename(name: str) -> str:
    """A native weight's name -> its parameter's (the vision tower's are folded instead)."""
    for source, target in RENAMES.items():
        if name.startswith(PROJECTOR + source):
            return PROJECTOR + target + name.removeprefix(PROJECTOR + source)
    return name


def fold(weights: Weights, config: Config) -> dict[str, mx.array]:
    """The model's parameters from renamed native weights; 1x1 convolutions become matrices."""
    folded = llava.fold(weights, config)
    for name, array in folded.items():
        if name.startswith(f"{PROJECTOR}blocks.") and array.shape[1:3] == (1, 1):
            folded[name] = array.reshape(array.shape[0], array.shape[3])
    return folded


class Model(llava.Model):
    def make_connector(self, config: llava.Config) -> nn.Module:
        return CONNECTORS[config.projector](config.vision.hidden_size, config.text.hidden_size)


def visual_tokens(projector: str, side: int) -> int:
    """How many a grid of `side` x `side` features becomes: LDPv2's 144, or a quarter, rounded up.

    visual_tokens("ldpnet", 24) -> 144
    """
    return POOLED**2 if projector == "ldpnetv2" else (-(-side // 2)) ** 2


class Processor(llava.Processor):
    token_methods = OF_TOKENS | {"hiprune"}  # its connector takes whole grids

    def blocks(self, pixels: Pixels) -> tuple[Block, ...]:
        side = math.isqrt(visual_tokens(self.config.projector, self.config.vision.grid))
        return (Block(side, side),)


FAMILY = Family(Config, Processor, Model, rename, fold, llava.is_native)
