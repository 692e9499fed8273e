"""The demo model in PyTorch, un-fused: FastViTHD, a two-layer connector and a Qwen2 decoder.

pixels[B, 3, 512, 512] in [0, 1] -> vision tower -> features[B, 64, 768] -> connector
-> visual tokens[B, 64, H] -> decoder -> logits. Attribute names are the checkpoint's names
(Apple's train-time layout), so a state dict is the checkpoint.

While BatchNorm collects statistics the branches are computed one by one. Where its statistics
stand (`fix_statistics`, or evaluation) a block's branches are merged into one convolution first,
with gradients: the same values in half the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The sizes of the demo model; the block types are FastVLM's."""

    dims: tuple[int, ...] = (24, 48, 96, 192, 384)
    layers: tuple[int, ...] = (1, 2, 4, 3, 2)
    mlp_ratio: int = 4
    layer_scale: float = 0.5
    image_size: int = 512
    hidden: int = 256
    intermediate: int = 512
    decoder_layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 512
    rope_theta: float = 10000.0
    rms_eps: float = 1e-6

    @property
    def vision_dim(self) -> int:
        return 2 * self.dims[-1]

    @property
    def visual(self) -> int:
        """Visual tokens of a picture."""
        return (self.image_size // 64) ** 2


LOWER, MIDDLE = 5, 8  # layers of `network` up to the stride-16, and to the stride-32 map
Kernel = tuple[Tensor, Tensor | None]  # weight[out, in / groups, k, k] and bias[out]


def convolve(x: Tensor, kernel: Kernel, stride: int, groups: int) -> Tensor:
    """A padded convolution in the form that is fastest on a CPU with channels-last pixels."""
    weight, bias = kernel
    size = weight.shape[-1]
    if size == stride == groups == 1:
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    if groups > 1 and len(weight) == 2 * x.shape[1]:
        halves = [
            F.conv2d(x, weight[i::2], None, stride, size // 2, 1, groups).permute(0, 2, 3, 1)
            for i in (0, 1)
        ]
        y = torch.stack(halves, -1).flatten(3)  # channel 2i+j is output j of group i
        return (y if bias is None else y + bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, stride, size // 2, 1, groups)


def affine(bn: nn.BatchNorm2d) -> Kernel:
    """Factor and bias of a BatchNorm whose statistics stand."""
    factor = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    return factor, bn.bias - bn.running_mean * factor


def enlarged(weight: Tensor, size: int) -> Tensor:
    """A kernel with a rim of zeros."""
    return F.pad(weight, [(size - weight.shape[-1]) // 2] * 4)


def pass_through(like: Tensor, groups: int) -> Tensor:
    """The kernel, of the shape of `like`, that changes nothing."""
    same = torch.zeros(like.shape)
    channel = torch.arange(len(like))
    middle = like.shape[-1] // 2
    same[channel, channel % like.shape[1] if groups == 1 else 0, middle, middle] = 1
    return same


class Conv(nn.Conv2d):
    """Conv2d in the form that is fastest on a CPU; same values."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, (self.weight, self.bias), self.stride[0], self.groups)


class ConvBN(nn.Module):
    """A convolution without bias, then BatchNorm."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = Conv(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)

    def merged(self) -> Kernel:
        factor, bias = affine(self.bn)
        return self.conv.weight * factor.view(-1, 1, 1, 1), bias

    def forward(self, x: Tensor) -> Tensor:
        if not self.bn.training:
            return convolve(x, self.merged(), self.conv.stride[0], self.conv.groups)
        return self.bn(self.conv(x))


def summed(branches: list[ConvBN], skip: nn.BatchNorm2d | None) -> Kernel:
    """One kernel for branches that are added; all their BatchNorms' statistics stand."""
    weight, bias = branches[0].merged()
    for branch in branches[1:]:
        more, more_bias = branch.merged()
        weight, bias = weight + enlarged(more, weight.shape[-1]), bias + more_bias
    if skip is not None:
        factor, more_bias = affine(skip)
        same = pass_through(weight, branches[0].conv.groups)
        weight, bias = weight + same * factor.view(-1, 1, 1, 1), bias + more_bias
    return weight, bias


class SqueezeExcite(nn.Module):
    def __init__(self, dim: int, ratio: int = 16) -> None:
        super().__init__()
        self.reduce = Conv(dim, dim // ratio, 1)
        self.expand = Conv(dim // ratio, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        w = x.mean((2, 3), keepdim=True)
        return x * self.expand(F.relu(self.reduce(w))).sigmoid()


class MobileOne(nn.Module):
    """k x k conv + BN, with a 1x1 `scale` branch and a BN-only `skip` branch where they apply."""

    def __init__(
        self, cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1,
        conv: bool = True, scale: bool = True, se: bool = False, act: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rbr_conv = nn.ModuleList([ConvBN(cin, cout, kernel, stride, groups)] * conv)
        self.rbr_scale = ConvBN(cin, cout, 1, stride, groups) if scale and kernel > 1 else None
        self.rbr_skip = nn.BatchNorm2d(cout) if cin == cout and stride == 1 else None
        self.se = SqueezeExcite(cout) if se else nn.Identity()
        self.act = nn.GELU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.rbr_conv and not self.rbr_conv[0].bn.training:
            first = self.rbr_conv[0].conv
            y = convolve(x, self.merged(), first.stride[0], first.groups)
        else:
            branches = [*self.rbr_conv, self.rbr_scale, self.rbr_skip]
            y = sum(branch(x) for branch in branches if branch is not None)
        return self.act(self.se(y))

    def merged(self) -> Kernel:
        scale = [] if self.rbr_scale is None else [self.rbr_scale]
        return summed([*self.rbr_conv, *scale], self.rbr_skip)


class RepMixer(nn.Module):
    """x + s * (mixer(x) - norm(x))."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.norm = MobileOne(dim, dim, 3, conv=False, scale=False, act=False)
        self.mixer = MobileOne(dim, dim, 3, groups=dim, act=False)
        self.layer_scale = nn.Parameter(torch.full((dim, 1, 1), init))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm.rbr_skip
        assert norm is not None
        if norm.training:
            return x + self.layer_scale * (self.mixer(x) - self.norm(x))
        weight, bias = self.mixer.merged()
        factor, less = affine(norm)
        same, scale = pass_through(weight, len(weight)), self.layer_scale.unsqueeze(-1)
        weight = same + scale * (weight - same * factor.view(-1, 1, 1, 1))
        return convolve(x, (weight, scale.flatten() * (bias - less)), 1, len(weight))


class ConvFFN(nn.Module):
    """Depthwise 7x7 + BN, then a two-layer MLP per pixel."""

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.conv = ConvBN(dim, dim, 7, groups=dim)
        self.fc1 = Conv(dim, dim * ratio, 1)
        self.fc2 = Conv(dim * ratio, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.conv(x))))


class RepMixerBlock(nn.Module):
    def __init__(self, dim: int, ratio: int, init: float) -> None:
        super().__init__()
        self.token_mixer = RepMixer(dim, init)
        self.convffn = ConvFFN(dim, ratio)
        self.layer_scale = nn.Parameter(torch.full((dim, 1, 1), init))

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        return x + self.layer_scale * self.convffn(x)


class Attention(nn.Module):
    """Global attention over the pixels, heads of 32 channels, q/k/v without bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, C // 32, 32).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, N, C))


class AttentionBlock(nn.Module):
    def __init__(self, dim: int, ratio: int, init: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.token_mixer = Attention(dim)
        self.convffn = ConvFFN(dim, ratio)
        self.layer_scale_1 = nn.Parameter(torch.full((dim, 1, 1), init))
        self.layer_scale_2 = nn.Parameter(torch.full((dim, 1, 1), init))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        y = self.token_mixer(self.norm(x.permute(0, 2, 3, 1).reshape(B, H * W, C)))
        x = x + self.layer_scale_1 * y.view(B, H, W, C).permute(0, 3, 1, 2)
        return x + self.layer_scale_2 * self.convffn(x)


class LargeKernel(nn.Module):
    """Strided 7x7 and 3x3 convolutions with two outputs per input channel, each with BN."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.lkb_origin = ConvBN(cin, cout, 7, 2, groups=cin)
        self.small_conv = ConvBN(cin, cout, 3, 2, groups=cin)

    def forward(self, x: Tensor) -> Tensor:
        if self.lkb_origin.bn.training:
            return F.gelu(self.lkb_origin(x) + self.small_conv(x))
        kernel = summed([self.lkb_origin, self.small_conv], None)
        return F.gelu(convolve(x, kernel, 2, x.shape[1]))


class PatchEmbed(nn.Module):
    """Halve the grid, double the channels."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(LargeKernel(cin, cout), MobileOne(cout, cout, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class RepCPE(nn.Module):
    """Conditional position encoding: x + depthwise 7x7 of x."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pe = Conv(dim, dim, 7, padding=3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.pe(x) + x


class VisionTower(nn.Module):
    """FastViTHD, in two parts: up to the stride-16 map, and from there; training supervises the
    maps on the way too."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        dims, ratio, init = shape.dims, shape.mlp_ratio, shape.layer_scale
        first = dims[0]
        self.patch_embed = nn.Sequential(
            MobileOne(3, first, 3, 2, scale=False),
            MobileOne(first, first, 3, 2, groups=first, scale=False),
            MobileOne(first, first, 1),
        )
        network: list[nn.Module] = []
        for stage, (dim, depth) in enumerate(zip(dims, shape.layers, strict=True)):
            block = RepMixerBlock if stage < 3 else AttentionBlock
            if stage:
                network.append(PatchEmbed(dims[stage - 1], dim))
            if stage >= 3:
                network.append(RepCPE(dim))
            network.append(nn.Sequential(*[block(dim, ratio, init) for _ in range(depth)]))
        self.network = nn.Sequential(*network)
        self.conv_exp = MobileOne(dims[-1], 2 * dims[-1], 3, groups=dims[-1], se=True)

    @property
    def lower_part(self) -> nn.Sequential:
        return nn.Sequential(self.patch_embed, *self.network[:LOWER])

    def lower(self, pixels: Tensor) -> Tensor:
        """pixels[B, 3, H, W] -> the stride-16 map[B, dims[2], H/16, W/16]."""
        return self.lower_part(pixels)

    def upper(self, fine: Tensor) -> tuple[Tensor, Tensor]:
        """The stride-16 map -> conv_exp's map, and the stride-32 map."""
        middle = self.network[LOWER:MIDDLE](fine)
        return self.conv_exp(self.network[MIDDLE:](middle)), middle

    def forward(self, pixels: Tensor) -> Tensor:
        """Features[B, 2 * dims[4], H/64, W/64]."""
        return self.upper(self.lower(pixels))[0]

    def fix_statistics(self) -> None:
        """Let every BatchNorm's statistics stand; `train()` would set them moving again."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
