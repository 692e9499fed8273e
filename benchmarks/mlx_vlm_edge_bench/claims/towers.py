"""Vision towers that the papers measure and no alias has, by name, in their shapes only.

They are built of the runtime's own modules. Sources: facebookresearch/ConvNeXt (XXL: open_clip's
`convnext_xxlarge`), openai/CLIP.
"""

from collections.abc import Callable
from dataclasses import replace

import mlx.nn as nn

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.vision.convnext import ConvNeXt, ConvNeXtConfig
from mlx_vlm_edge.vision.vit import ViT

from ..random.weights import blueprint


def _convnext(depths: tuple[int, ...], widths: tuple[int, ...], norm_eps: float) -> nn.Module:
    return ConvNeXt(ConvNeXtConfig(widths, depths, 32, norm_eps=norm_eps))


def _clip_224() -> nn.Module:
    """CLIP ViT-L/14 with the position table of 224 px that it was first released with."""
    return ViT(replace(blueprint("llava-1.5-7b").config.vision, image_size=224))


TOWERS: dict[str, Callable[[], nn.Module]] = {
    "convnext-l": lambda: _convnext((3, 3, 27, 3), (192, 384, 768, 1536), 1e-6),
    "convnext-xxl": lambda: _convnext((3, 4, 30, 3), (384, 768, 1536, 3072), 1e-5),
    "clip-vit-l-224": _clip_224,
}


def bare_tower(name: str) -> nn.Module:
    """The tower of that name. Raises UsageError for one that is not here."""
    if name not in TOWERS:
        raise UsageError(f"no tower is called {name!r}: {', '.join(TOWERS)} are known")
    return TOWERS[name]()
