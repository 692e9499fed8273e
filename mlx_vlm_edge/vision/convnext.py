"""ConvNeXt, folded: normalised pixels [B, H, W, 3] -> image features [B, H/s * W/s, C].

Stages of one width each, every stage but the first behind a norm and a 2 x 2 convolution of stride
2: four stages have a stride s of 32, ConvLLaVA's five one of 64. Folded means that layer scale is
in the last matmul of its block, and that convolutions which do not overlap are matmuls. There is
no norm after the last stage and no pooling.
Source: facebookresearch/ConvNeXt, models/convnext.py; alibaba/conv-llava.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.config import check
from ..checkpoint.weights import Weights
from ..errors import UsageError
from ..kernels import Dense, add, compiled, depthwise_conv2d, gelu, mlp

KERNEL = 7  # of a block's depthwise convolution
EXPANSION = 4  # of a block's MLP
# Of every norm but the last, which is not run: transformers' own key is that one's. timm has
# another one for its largest, as `norm_eps`.
NORM_EPS = 1e-6


@dataclass(frozen=True)
class ConvNeXtConfig:
    """Geometry of a tower, under transformers' field names. image_size: of its pictures."""

    hidden_sizes: tuple[int, ...]
    depths: tuple[int, ...]
    image_size: int
    patch_size: int = 4
    norm_eps: float = NORM_EPS

    def __post_init__(self) -> None:
        check(self, positive=True)
        if not self.depths or len(self.depths) != len(self.hidden_sizes):
            raise UsageError("vision_config: depths and hidden_sizes are of different lengths")
        if self.image_size % self.stride:
            raise UsageError(
                f"vision_config: image_size {self.image_size} is no multiple of {self.stride}, the "
                "stride of its stages"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ConvNeXtConfig":
        """Read a `vision_config`. Raises UsageError for a missing key or another activation."""
        if (activation := config.get("hidden_act", "gelu")) != "gelu":
            raise UsageError(f"vision_config: hidden_act {activation!r} is not known in ConvNeXt")
        for key in ("hidden_sizes", "depths"):
            if not isinstance(config.get(key), list):
                raise UsageError(f"vision_config: {key} is not a list")
        if "image_size" not in config:
            raise UsageError("vision_config lacks 'image_size'")
        return cls(
            tuple(config["hidden_sizes"]), tuple(config["depths"]),
            config["image_size"], config.get("patch_size", 4), config.get("norm_eps", NORM_EPS),
        )  # fmt: skip

    @property
    def stride(self) -> int:
        """Pixels per feature along each side."""
        return int(self.patch_size) << (len(self.depths) - 1)

    @property
    def out_dim(self) -> int:
        """Channels of the image features."""
        return self.hidden_sizes[-1]


class Patches(nn.Module):
    """A convolution of kernel = stride, as one matmul: [B, H, W, C] -> [B, H/size, W/size, D]."""

    def __init__(self, inner: int, out: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.proj = Dense(size * size * inner, out)

    def __call__(self, x: mx.array) -> mx.array:
        B, H, W, C = x.shape
        p = self.size
        x = x.reshape(B, H // p, p, W // p, p, C)  # rows and columns of patches, and inside them
        return self.proj(x.transpose(0, 1, 3, 2, 4, 5).reshape(B, H // p, W // p, p * p * C))


class Block(nn.Module):
    """Depthwise 7 x 7, norm and a two-layer MLP around a residual, [B, H, W, C]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.depthwise = mx.zeros((width, KERNEL, KERNEL, 1))
        self.bias = mx.zeros((width,))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.fc1 = Dense(width, EXPANSION * width)
        self.fc2 = Dense(EXPANSION * width, width)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.norm(depthwise_conv2d(x, [self.depthwise], self.bias))
        return add(x, mlp(y, self.fc1, self.fc2, gelu))


class Stage(nn.Module):
    """What halves the sides, [B, H, W, C] -> [B, H/2, W/2, D], and blocks."""

    def __init__(self, config: ConvNeXtConfig, index: int) -> None:
        super().__init__()
        width, eps = config.hidden_sizes[index], config.norm_eps
        if index:
            before = config.hidden_sizes[index - 1]
            self.norm = nn.LayerNorm(before, eps=eps)
            self.downsample = Patches(before, width, 2)
        self.blocks = [Block(width, eps) for _ in range(config.depths[index])]

    def __call__(self, x: mx.array) -> mx.array:
        if "downsample" in self:
            x = self.downsample(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return x


class ConvNeXt(nn.Module):
    """The whole tower. Height and width must be multiples of its stride."""

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        self.stride = config.stride
        width = config.hidden_sizes[0]
        self.stem = Patches(3, width, config.patch_size)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.stages = [Stage(config, index) for index in range(len(config.depths))]
        self._features = compiled(self.features, self)

    def stage_outputs(self, x: mx.array) -> Iterator[tuple[str, mx.array]]:
        """Every stage's name and output [B, h, w, c]: stem, stage 0, stage 1, ..."""
        H, W = x.shape[1:3]
        if H % self.stride or W % self.stride:
            raise UsageError(f"an image of {W}x{H} pixels: both must be multiples of {self.stride}")
        x = self.norm(self.stem(x))
        yield "stem", x
        for index, stage in enumerate(self.stages):
            x = stage(x)
            yield f"stage {index}", x

    def features(self, x: mx.array) -> mx.array:
        """[B, H, W, 3] -> [B, H/s * W/s, C], operation by operation on every device."""
        *_, (_, features) = self.stage_outputs(x)
        return features.flatten(1, 2)  # rows first: token = row * width + column

    def __call__(self, x: mx.array) -> mx.array:
        return self._features(x)


def fold(weights: Weights, prefix: str, config: ConvNeXtConfig) -> dict[str, mx.array]:
    """Take the weights under `prefix` (transformers' names, NHWC) and give ConvNeXt's parameters.

    Layer scale is multiplied in in float32. The final norm is left out by name, whatever its width.
    Raises UsageError for a missing or misshapen weight.
    """
    first, embeddings = config.hidden_sizes[0], f"{prefix}embeddings."
    shape = (first, 3, config.patch_size)
    folded = _patches(weights, f"{embeddings}patch_embeddings", "stem", shape)
    folded |= weights.pair(f"{embeddings}layernorm", "norm", first)
    for index, (before, width) in enumerate(pairwise((0, *config.hidden_sizes))):
        source, target = f"{prefix}encoder.stages.{index}.", f"stages.{index}."
        if index:
            down = f"{source}downsampling_layer."
            folded |= weights.pair(f"{down}0", f"{target}norm", before)
            folded |= _patches(weights, f"{down}1", f"{target}downsample", (width, before, 2))
        for block in range(config.depths[index]):
            folded |= _block(weights, f"{source}layers.{block}.", f"{target}blocks.{block}.", width)
    weights.take_prefix(f"{prefix}layernorm.")
    return folded


def _patches(
    weights: Weights, source: str, target: str, shape: tuple[int, int, int]
) -> dict[str, mx.array]:
    """shape: channels out and in, and the kernel's side."""
    out, inner, side = shape
    weight = weights.take(f"{source}.weight", out, side, side, inner)
    return {
        f"{target}.proj.weight": mx.contiguous(weight.reshape(out, -1).T),
        f"{target}.proj.bias": weights.take(f"{source}.bias", out),
    }


def _block(weights: Weights, source: str, target: str, width: int) -> dict[str, mx.array]:
    inner = EXPANSION * width
    fc1 = weights.take(f"{source}pwconv1.weight", inner, width)
    fc2 = weights.take(f"{source}pwconv2.weight", width, inner)
    bias = weights.take(f"{source}pwconv2.bias", width)
    scale = weights.take(f"{source}layer_scale_parameter", width).astype(mx.float32)
    return {
        f"{target}depthwise": weights.take(f"{source}dwconv.weight", width, KERNEL, KERNEL, 1),
        f"{target}bias": weights.take(f"{source}dwconv.bias", width),
        **weights.pair(f"{source}layernorm", f"{target}norm", width),
        f"{target}fc1.weight": mx.contiguous(fc1.T),
        f"{target}fc1.bias": weights.take(f"{source}pwconv1.bias", inner),
        f"{target}fc2.weight": mx.contiguous((fc2.astype(mx.float32) * scale[:, None]).T),
        f"{target}fc2.bias": bias.astype(mx.float32) * scale,
    }
