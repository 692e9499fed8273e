"""Vision towers that the papers measure and no alias has, by name, in their shapes only.

They are built of the runtime's own modules. Sources: facebookresearch/ConvNeXt (XXL: open_clip's
`convnext_xxlarge`), openai/CLIP, facebookresearch/dinov2.
"""

from collections.abc import Callable
from dataclasses import replace

import mlx.nn as nn

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.vision.convnext import ConvNeXt, ConvNeXtConfig
from mlx_vlm_edge.vision.dinov2 import Dinov2, Dinov2Config
from mlx_vlm_edge.vision.vit import ViT

from ..random.weights import blueprint


def _convnext(depths: tuple[int, ...], widths: tuple[int, ...], norm_eps: float) -> nn.Module:
    return ConvNeXt(ConvNeXtConfig(widths, depths, 32, norm_eps=norm_eps))


def _clip_224() -> nn.Module:
    """CLIP ViT-L/14 with the position table of 224 px that it was first released with."""
    return ViT(replace(blueprint("llava-1.5-7b").config.vision, image_size=224))


def _dinov2(width: int, layers: int, heads: int, side: int, gated: bool) -> nn.Module:
    described = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "input_size": side, "use_swiglu_ffn": gated,
    }  # fmt: skip
    return Dinov2(Dinov2Config.from_dict(described))


TOWERS: dict[str, Callable[[], nn.Module]] = {
    "convnext-l": lambda: _convnext((3, 3, 27, 3), (192, 384, 768, 1536), 1e-6),
    "convnext-xxl": lambda: _convnext((3, 4, 30, 3), (384, 768, 1536, 3072), 1e-5),
    "clip-vit-l-224": _clip_224,
    "dinov2-l-518": lambda: _dinov2(1024, 24, 16, 518, gated=False),
    "dinov2-g-378": lambda: _dinov2(1536, 40, 24, 378, gated=True),
}


def bare_tower(name: str) -> nn.Module:
    """The tower of that name. Raises UsageError for one that is not here."""
    if name not in TOWERS:
        raise UsageError(f"no tower is called {name!r}: {', '.join(TOWERS)} are known")
    return TOWERS[name]()
