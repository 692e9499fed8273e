"""Towers of any kind behind one interface: normalised pixels [1, H, W, 3] -> features on one grid.

For models that look with several at once. A grid of another size is brought to the one that is
wanted, and of ConvNeXt all stages are, one after the other in the channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.weights import Weights
from ..errors import UsageError
from ..kernels import resize_bilinear
from . import convnext, dinov2, vit
from .convnext import ConvNeXt, ConvNeXtConfig
from .dinov2 import Dinov2, Dinov2Config
from .vit import ViT, ViTConfig

Geometry = ViTConfig | Dinov2Config | ConvNeXtConfig


@dataclass(frozen=True)
class TowerConfig:
    """One of several towers. side: of the grid that its features are brought to."""

    geometry: Geometry
    side: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], side: int) -> "TowerConfig":
        """Read a tower's own config. Of CLIP the last layer but one is taken, without a norm; of
        SigLIP the last one with its norm. Raises UsageError for one that is not known."""
        kind = config.get("model_type")
        if kind == "clip_vision_model":
            return cls(ViTConfig.from_dict(config, -2), side)
        if kind == "siglip_vision_model":
            return cls(ViTConfig.from_dict(config, -1, post_norm=True), side)
        if kind == "dinov2":
            return cls(Dinov2Config.from_dict(config), side)
        if kind == "convnext":
            return cls(ConvNeXtConfig.from_dict(config), side)
        raise UsageError(f"vision_config: a tower of type {kind!r} is not known")

    @property
    def image_size(self) -> int:
        """The side in pixels of the pictures that it takes."""
        geometry = self.geometry
        return geometry.input_size if isinstance(geometry, Dinov2Config) else geometry.image_size

    @property
    def width(self) -> int:
        """Channels of its features."""
        geometry = self.geometry
        if isinstance(geometry, ConvNeXtConfig):
            return sum(geometry.hidden_sizes)
        return geometry.hidden_size


class Tower(nn.Module):
    """A tower, as `model`, and what brings its features to the grid that is wanted."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self._config = config
        geometry = config.geometry
        if isinstance(geometry, ViTConfig):
            self.model: nn.Module = ViT(geometry)
        elif isinstance(geometry, Dinov2Config):
            self.model = Dinov2(geometry)
        else:
            self.model = ConvNeXt(geometry)

    def maps(self, x: mx.array) -> list[mx.array]:
        """Feature maps [h, w, C] of a picture [1, H, W, 3], without a class token."""
        if isinstance(self.model, ConvNeXt):
            _, *stages = self.model.stage_outputs(x)
            return [features[0] for _, features in stages]
        geometry = self._config.geometry
        assert not isinstance(geometry, ConvNeXtConfig)
        rows = self.model(x)[0]
        return [rows[len(rows) - geometry.grid**2 :].reshape(geometry.grid, geometry.grid, -1)]

    def __call__(self, x: mx.array) -> mx.array:
        """[1, H, W, 3] -> [1, side * side, C], rows first."""
        side = self._config.side
        maps = [
            features if features.shape[0] == side else resize_bilinear(features, side, side)
            for features in self.maps(x)
        ]
        return mx.concatenate(maps, axis=-1).reshape(1, side * side, -1)


def fold(weights: Weights, prefix: str, config: TowerConfig) -> dict[str, mx.array]:
    """Take a tower's weights under `prefix` (transformers' names, NHWC): Tower's parameters.

    Raises UsageError for a missing or misshapen weight.
    """
    geometry = config.geometry
    if isinstance(geometry, ViTConfig):
        folded = vit.fold(weights, prefix, geometry)
    elif isinstance(geometry, Dinov2Config):
        folded = dinov2.fold(weights, prefix, geometry)
    else:
        folded = convnext.fold(weights, prefix, geometry)
    return {f"model.{name}": array for name, array in folded.items()}
