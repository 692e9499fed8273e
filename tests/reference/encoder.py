"""timm's FastViT in its training form: every branch apart, BatchNorm with statistics of its own."""

import torch
from torch import nn

from . import torchvision_shim
from .fastvlm import DIMS, LAYERS, as_pixels, picture, spread
from .variance import randomise

torchvision_shim.install()

import timm  # noqa: E402


def build(seed: int = 0) -> nn.Module:
    """An un-fused `fastvit_mci3` of tiny width without its CLIP head, in eval mode."""
    torch.manual_seed(seed)
    model = timm.create_model("fastvit_mci3", embed_dims=DIMS, layers=LAYERS, num_classes=0)
    model = model.float().eval()
    pixels = as_pixels(picture(98))
    randomise(model, lambda: model.forward_features(pixels), seed, spread)
    return model


@torch.no_grad()
def features(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Image features [N, C] of pixels [1, 3, H, W]."""
    return model.forward_features(pixels)[0].flatten(1).T.contiguous()
