"""MobileVLM's two connectors in torch, module names as published, with random weights in float64.

Written from the description of Meituan-AutoML/MobileVLM, mobilevlm/model/vision_projector.py.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .variance import randomise


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        reduced = -(-width // 4 // 8) * 8
        self.fc1, self.fc2 = nn.Conv2d(width, reduced, 1), nn.Conv2d(reduced, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * functional.hardsigmoid(gate)


class Block(nn.Module):
    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        deep = nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)
        self.block = nn.Sequential(
            nn.Sequential(deep, ChannelNorm(width), nn.Hardswish()),
            SqueezeExcite(width),
            nn.Sequential(nn.Conv2d(width, width, 1, bias=False), ChannelNorm(width)),
        )
        self.residual = stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x) if self.residual else self.block(x)


def to_grid(x: torch.Tensor) -> torch.Tensor:
    side = int(x.shape[1] ** 0.5)
    return x.permute(0, 2, 1).reshape(x.shape[0], -1, side, side)


class LDP(nn.Module):
    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "mlp": nn.Sequential(
                    nn.Identity(), nn.Linear(features, width), nn.GELU(), nn.Linear(width, width)
                ),
                "mb_block": nn.Sequential(nn.Identity(), Block(width, 1), Block(width, 2)),
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model["mb_block"](to_grid(self.model["mlp"](x))).flatten(2).transpose(1, 2)


class LDPv2(nn.Module):
    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        layers = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))
        self.mlp = nn.ModuleDict({"mlp": layers})
        deep = nn.Conv2d(width, width, 3, 1, 1, groups=width)
        self.peg = nn.ModuleDict({"peg": nn.Sequential(deep)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.adaptive_avg_pool2d(to_grid(self.mlp["mlp"](x)), 12)
        return (self.peg["peg"](x) + x).flatten(2).transpose(1, 2)


def build(kind: str, features: int, width: int) -> nn.Module:
    """`kind`: "ldpnet" or "ldpnetv2"."""
    torch.manual_seed(0)
    model = {"ldpnet": LDP, "ldpnetv2": LDPv2}[kind](features, width).eval()
    x = torch.randn(1, 24 * 24, features) * 2
    randomise(model, lambda: model(x))
    return model.double()


@torch.no_grad()
def run(model: nn.Module, x: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(x).double()).numpy()
