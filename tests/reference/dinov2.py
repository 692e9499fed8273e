"""transformers' DINOv2, tiny, with variance-preserving random weights; torch's own resizing."""

from typing import Any

import numpy as np
import torch
from torch import nn

from . import torchvision_shim
from .variance import randomise

torchvision_shim.install()

from transformers import Dinov2Config, Dinov2Model  # noqa: E402

GEOMETRY = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "mlp_ratio": 4,
    "use_swiglu_ffn": False,
}


def build(swiglu: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The model in float64, and its config as `vision_config` has it."""
    geometry = {**GEOMETRY, "use_swiglu_ffn": swiglu}
    model = Dinov2Model(Dinov2Config(**geometry)).float().eval()
    model.set_attn_implementation("eager")
    x = pixels(7, geometry["image_size"])
    randomise(model, lambda: model(pixel_values=torch.from_numpy(x).permute(0, 3, 1, 2)))
    for name, parameter in model.named_parameters():
        if "position_embeddings" in name or "cls_token" in name:
            parameter.data.mul_(0.5 / parameter.data.std())
        if "lambda1" in name:
            parameter.data.uniform_(0.3, 1.0)
    return model.double(), {"model_type": "dinov2", **geometry}


@torch.no_grad()
def last(model: nn.Module, x: np.ndarray) -> np.ndarray:
    """[B, 1 + N, D] after the final norm, for pixels [B, H, W, 3]."""
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2).double()
    return model(pixel_values=pixels).last_hidden_state.numpy()


PUBLISHED = {  # what transformers 5 has in memory -> how facebook/dinov2-* are saved
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.down_proj": "mlp.weights_out",
}


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    """By the published names, NHWC."""
    arrays = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor
        for own, published in PUBLISHED.items():
            name = name.replace(own, published)
        arrays[name] = tensor.float().contiguous().numpy()
    for name in [name for name in arrays if "gate_proj" in name]:
        halves = [arrays.pop(name), arrays.pop(name.replace("gate", "up"))]
        arrays[name.replace("gate_proj", "weights_in")] = np.concatenate(halves)
    return arrays


def resized(table: np.ndarray, grid: int) -> np.ndarray:
    """A position embedding [1 + n * n, D] for another grid, as transformers 4.37 resizes it: by a
    scale factor that is a little more than that of the two grids."""
    side = round((len(table) - 1) ** 0.5)
    square = torch.from_numpy(table[1:]).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factor = (grid + 0.1) / side
    x = nn.functional.interpolate(
        square, scale_factor=(factor, factor), mode="bicubic", align_corners=False
    )
    assert x.shape[2:] == (grid, grid)
    return np.concatenate([table[:1], x.permute(0, 2, 3, 1).reshape(grid * grid, -1).numpy()])


def pixels(seed: int, side: int, count: int = 1) -> np.ndarray:
    """Normalised pixels float32 [count, side, side, 3]."""
    values = np.random.default_rng(seed).normal(size=(count, side, side, 3))
    return values.astype(np.float32)
