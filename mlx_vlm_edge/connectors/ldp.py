"""MobileVLM's downsampling projectors: image features [B, N, C] -> visual tokens [B, 144, D].

LDP (V1, "ldpnet"): MLP, then two MobileNetV3 blocks, the second of stride 2. LDPv2 ("ldpnetv2"):
MLP, average pooling to 12x12, then a depthwise 3x3 with a residual (PEG). Features lie row-major on
a square grid; everything stays [B, H, W, C], so no layout changes.
Source: Meituan-AutoML/MobileVLM, mobilevlm/model/vision_projector.py.
"""

import mlx.core as mx
import mlx.nn as nn

from ..errors import UsageError
from ..kernels import depthwise_conv2d, gelu
from .mlp import MLP

POOLED = 12  # side of LDPv2's grid, fixed by its authors
LN_EPS = 1e-5


def to_grid(x: mx.array) -> mx.array:
    """[B, n * n, D] -> [B, n, n, D]. Raises UsageError when the tokens are no square."""
    side = round(x.shape[1] ** 0.5)
    if side * side != x.shape[1]:
        raise UsageError(f"{x.shape[1]} image features are no square grid, which LDP needs")
    return x.reshape(x.shape[0], side, side, -1)


def pooling_matrix(size: int, out: int) -> mx.array:
    """float[out, size] of adaptive average windows [floor(i n / out), ceil((i + 1) n / out)).

    pooling_matrix(3, 2) -> [[1/2, 1/2, 0], [0, 1/2, 1/2]]
    """
    rows = mx.arange(out)[:, None]
    columns = mx.arange(size)[None]
    inside = (columns >= rows * size // out) & (columns < -(-(rows + 1) * size // out))
    return inside / inside.sum(axis=1, keepdims=True)


def adaptive_average_pool(x: mx.array, out: int) -> mx.array:
    """[B, H, W, C] -> [B, out, out, C], PyTorch's AdaptiveAvgPool2d."""
    B, H, W, C = x.shape
    if H % out == 0 and W % out == 0:
        return x.reshape(B, out, H // out, out, W // out, C).mean(axis=(2, 4))
    rows, columns = (pooling_matrix(n, out).astype(x.dtype) for n in (H, W))
    x = mx.matmul(rows, x.reshape(B, H, W * C)).reshape(B * out, W, C)
    return mx.matmul(columns, x).reshape(B, out, out, C)


class LDPv2(nn.Module):
    """The second linear layer comes after the pooling, unlike in the source: both are linear and
    a window's weights sum to one, so the result is the same for a quarter of the work."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.mlp = MLP(features, width)
        self.peg = mx.zeros((width, 3, 3, 1))
        self.peg_bias = mx.zeros((width,))

    def __call__(self, x: mx.array) -> mx.array:
        first, _, second = self.mlp.layers
        x = second(adaptive_average_pool(to_grid(gelu(first(x))), POOLED))
        x = x + depthwise_conv2d(x, [self.peg], self.peg_bias)
        return x.flatten(1, 2)


def hard_swish(x: mx.array) -> mx.array:
    return x * mx.clip(x / 6 + 0.5, 0, 1)


class InvertedResidual(nn.Module):
    """A MobileNetV3 block without expansion: depthwise 3x3, squeeze-and-excite, 1x1. [B, H, W, D].

    The residual is around the block of stride 1 only.
    """

    def __init__(self, width: int, reduced: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.depthwise = mx.zeros((width, 3, 3, 1))
        self.norm1 = nn.LayerNorm(width, eps=LN_EPS)
        self.reduce = nn.Linear(width, reduced)
        self.expand = nn.Linear(reduced, width)
        self.pointwise = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, eps=LN_EPS)

    def __call__(self, x: mx.array) -> mx.array:
        y = depthwise_conv2d(x, [self.depthwise], None, self.stride)
        y = hard_swish(self.norm1(y))
        gate = self.expand(mx.maximum(self.reduce(y.mean(axis=(1, 2), keepdims=True)), 0))
        y = self.norm2(self.pointwise(y * mx.clip(gate / 6 + 0.5, 0, 1)))
        return x + y if self.stride == 1 else y


def _divisible(width: int) -> int:
    """The nearest multiple of 8 that is not below nine tenths of `width`, as torchvision has it.

    17 -> 16, 18 -> 24.
    """
    nearest = max(8, (width + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * width else nearest + 8


class LDP(nn.Module):
    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        reduced = _divisible(width // 4)
        self.mlp = MLP(features, width)
        self.blocks = [InvertedResidual(width, reduced, stride) for stride in (1, 2)]

    def __call__(self, x: mx.array) -> mx.array:
        x = to_grid(self.mlp(x))
        for block in self.blocks:
            x = block(x)
        return x.flatten(1, 2)
