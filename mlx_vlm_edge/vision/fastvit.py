"""FastViTHD, folded: pixels [B, H, W, 3] in 0..1 -> image features [B, H/64 * W/64, C].

A stem of stride 4, then five stages, each but the first behind a stride-2 downsampling: RepMixer
blocks (convolutions only) in the first three, global attention in the last two. Folded means one
biased depthwise convolution per RepMixer, BatchNorm in the ConvFFN's first convolution, layer scale
in the last matmul of a branch. `fold` makes these weights from the native layout.
Source: apple/ml-fastvlm, llava/model/multimodal_encoder/mobileclip/mci.py; arXiv 2412.13303.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.config import check
from ..errors import UsageError
from ..kernels import (
    Activation,
    Dense,
    add,
    attention,
    compiled,
    conv2d,
    depthwise_conv2d,
    gelu,
    mlp,
    pointwise,
)
from .attended import Attended, scores, told

STRIDE = 64  # pixels per visual token along each side
HEAD_DIM = 32
LN_EPS = 1e-5


@dataclass(frozen=True)
class VisionConfig:
    """Geometry of a FastViT tower, under the checkpoint's own field names."""

    layers: tuple[int, ...] = (2, 12, 24, 4, 2)
    embed_dims: tuple[int, ...] = (96, 192, 384, 768, 1536)
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4, 4)
    token_mixers: tuple[str, ...] = ("repmixer", "repmixer", "repmixer", "attention", "attention")
    pos_embs_shapes: tuple[tuple[int, int] | None, ...] = (None, None, None, (7, 7), (7, 7))
    down_patch_size: int = 7
    repmixer_kernel_size: int = 3
    cls_ratio: float = 2.0
    projection_dim: int = 768

    def __post_init__(self) -> None:
        check(self, positive=True)
        stages = len(self.embed_dims)
        lists = (self.layers, self.mlp_ratios, self.token_mixers, self.pos_embs_shapes)
        if stages != 5 or any(len(values) != stages for values in lists):
            raise UsageError("vision_config: a stride of 64 takes five stages in every list")
        for mixer in self.token_mixers:
            if mixer not in ("repmixer", "attention"):
                raise UsageError(f"vision_config: token mixer {mixer!r} is not known")
        for stage, width in enumerate(self.embed_dims):
            if self.token_mixers[stage] == "attention" and width % HEAD_DIM:
                raise UsageError(f"vision_config: width {width} is no multiple of {HEAD_DIM}")
            if stage and width % self.embed_dims[stage - 1]:
                raise UsageError(f"vision_config: width {width} is no multiple of the one before")

    @property
    def stride(self) -> int:
        """Pixels per visual token along each side."""
        return STRIDE

    @property
    def out_dim(self) -> int:
        """Channels of the image features."""
        return int(self.embed_dims[-1] * self.cls_ratio)

    def hidden(self, stage: int) -> int:
        """Channels inside the ConvFFN of a stage."""
        return int(self.embed_dims[stage] * self.mlp_ratios[stage])


class DepthwiseConv(nn.Module):
    """[B, H, W, C] -> [B, H / stride, W / stride, multiplier * C].

    The channels of several outputs come one after another: all first ones, then all second ones;
    `fold` permutes the next layer to match.
    """

    def __init__(
        self, channels: int, size: int, stride: int = 1, multiplier: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.stride = stride
        self.weights = [mx.zeros((channels, size, size, 1)) for _ in range(multiplier)]
        if bias:
            self.bias = mx.zeros((multiplier * channels,))

    def __call__(self, x: mx.array, activation: Activation | None = None) -> mx.array:
        return depthwise_conv2d(x, self.weights, self.get("bias"), self.stride, activation)


class Stem(nn.Module):
    """[B, H, W, 3] -> [B, H / 4, W / 4, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.depthwise = DepthwiseConv(width, 3, stride=2)
        self.pointwise = Dense(width, width)

    def __call__(self, x: mx.array) -> mx.array:
        x = conv2d(x, self.conv.weight, self.conv.bias, 2, gelu)
        return pointwise(self.depthwise(x, gelu), self.pointwise, gelu)


class Downsample(nn.Module):
    """[B, H, W, C] -> [B, H / 2, W / 2, multiplier * C]."""

    def __init__(self, width: int, out: int, size: int) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv(width, size, stride=2, multiplier=out // width)
        self.pointwise = Dense(out, out)

    def __call__(self, x: mx.array) -> mx.array:
        return pointwise(self.depthwise(x, gelu), self.pointwise, gelu)


class ConvFFN(nn.Module):
    """A depthwise 7x7, its bias in that of fc1, and a two-layer MLP, all [B, H, W, C]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv(width, 7, bias=False)
        self.fc1 = Dense(width, hidden)
        self.fc2 = Dense(hidden, width)

    def __call__(self, x: mx.array) -> mx.array:
        return mlp(self.depthwise(x), self.fc1, self.fc2, gelu)


class RepMixerBlock(nn.Module):
    """The mixer's own residual is inside its kernel, so none is added around it."""

    def __init__(self, width: int, hidden: int, size: int) -> None:
        super().__init__()
        self.mixer = DepthwiseConv(width, size)
        self.ffn = ConvFFN(width, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.mixer(x)
        return add(x, self.ffn(x))


class Attention(nn.Module):
    """Global attention over the H * W positions, heads of 32, no mask and no position bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = Dense(width, 3 * width, bias=False)
        self.proj = Dense(width, width)

    def split(self, x: mx.array) -> tuple[mx.array, ...]:
        """Queries, keys and values [B, heads, H * W, 32] of [B, H, W, C]."""
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3 * C // HEAD_DIM, HEAD_DIM)
        return tuple(mx.split(qkv.swapaxes(1, 2), 3, axis=1))

    def __call__(self, x: mx.array) -> mx.array:
        B, H, W, C = x.shape
        q, k, v = self.split(x)
        x = attention(q, k, v, HEAD_DIM**-0.5)
        return self.proj(x.transpose(0, 2, 1, 3).reshape(B, H, W, C))


class AttentionBlock(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        self.attention = Attention(width)
        self.ffn = ConvFFN(width, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        x = add(x, self.attention(self.norm(x)))
        return add(x, self.ffn(x))


class Stage(nn.Module):
    """Downsampling, position encoding (RepCPE, identity in its kernel), blocks."""

    def __init__(self, config: VisionConfig, index: int) -> None:
        super().__init__()
        width, hidden = config.embed_dims[index], config.hidden(index)
        self.entry = []
        if index:
            before = config.embed_dims[index - 1]
            self.entry.append(Downsample(before, width, config.down_patch_size))
        if shape := config.pos_embs_shapes[index]:
            self.entry.append(DepthwiseConv(width, shape[0]))
        attention = config.token_mixers[index] == "attention"
        self.blocks = [
            AttentionBlock(width, hidden)
            if attention
            else RepMixerBlock(width, hidden, config.repmixer_kernel_size)
            for _ in range(config.layers[index])
        ]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in (*self.entry, *self.blocks):
            x = layer(x)
        return x

    def attended(self, x: mx.array) -> tuple[mx.array, list[Attended]]:
        """The same of a stage with attention, and what each of its blocks says of the positions."""
        seen: list[Attended] = []
        for layer in self.entry:
            x = layer(x)
        for block in self.blocks:
            q, k, _ = block.attention.split(block.norm(x))
            received = scores(q, k, HEAD_DIM**-0.5, None).mean(axis=(1, 2))
            seen.append(Attended(received, received, None, k.astype(mx.float32).mean(axis=1), x))
            x = block(x)
        return x, seen


class Expansion(nn.Module):
    """conv_exp: depthwise 3x3 to cls_ratio outputs per channel, squeeze-and-excite, GELU."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.inputs = width
        self.depthwise = DepthwiseConv(width, 3, multiplier=out // width)
        self.reduce = Dense(out, out // 16)
        self.expand = Dense(out // 16, out)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.depthwise(x)
        # A group's outputs side by side, as published.
        x = x.reshape(*x.shape[:-1], -1, self.inputs).swapaxes(-1, -2).flatten(-2)
        squeezed = mx.mean(x, axis=(1, 2), keepdims=True)
        gate = mx.sigmoid(self.expand(mx.maximum(self.reduce(squeezed), 0)))
        return gelu(x * gate)


class FastViTHD(nn.Module):
    """The whole tower. Height and width must be multiples of 64."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.stem = Stem(config.embed_dims[0])
        self.stages = [Stage(config, index) for index in range(len(config.embed_dims))]
        self.conv_exp = Expansion(config.embed_dims[-1], config.out_dim)
        self._features = compiled(self.features, self)

    def stage_outputs(self, x: mx.array) -> Iterator[tuple[str, mx.array]]:
        """Every stage's name and output [B, h, w, c]: stem, stage 0..4, conv_exp."""
        H, W = x.shape[1:3]
        if H % STRIDE or W % STRIDE:
            raise UsageError(f"an image of {W}x{H} pixels: both must be multiples of {STRIDE}")
        x = self.stem(x)
        yield "stem", x
        for index, stage in enumerate(self.stages):
            x = stage(x)
            yield f"stage {index}", x
        yield "conv_exp", self.conv_exp(x)

    def features(self, x: mx.array) -> mx.array:
        """[B, H, W, 3] -> [B, H / 64 * W / 64, C], operation by operation on every device."""
        *_, (_, features) = self.stage_outputs(x)
        return features.flatten(1, 2)  # rows first: token = row * width + column

    def _telling(self, x: mx.array, calls: list[Attended]) -> mx.array:
        """`features`, with what is told of the last stage's first and last block."""
        *_, (_, before) = islice(self.stage_outputs(x), len(self.stages))  # but the last stage's
        x, blocks = self.stages[-1].attended(before)
        features: mx.array = self.conv_exp(x).flatten(1, 2)
        first, last = blocks[0], blocks[-1]
        calls.append(replace(last, early=first.early, hidden=features))
        return features

    def __call__(self, x: mx.array) -> mx.array:
        calls = told()
        return self._features(x) if calls is None else self._telling(x, calls)
