"""One of several towers as MIL: [1, 3, H, W] pixels of 0..255 -> features [1, C, side, side].

Grids of another size are resized by two matmuls, of which each turns the picture over.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_vlm_edge.kernels import resize_bilinear
from mlx_vlm_edge.vision.convnext import ConvNeXtConfig
from mlx_vlm_edge.vision.dinov2 import Dinov2Config
from mlx_vlm_edge.vision.several import Tower, TowerConfig

from . import convnext, dinov2, vit
from .network import Network, Value
from .toolkit import tools


def emit(
    net: Network,
    tower: Tower,
    config: TowerConfig,
    image: Value,
    mean: Sequence[float],
    std: Sequence[float],
) -> Value:
    """The tower's features on the grid that is wanted."""
    geometry, model = config.geometry, tower.model
    if isinstance(geometry, ConvNeXtConfig):
        stages = convnext.stages(net, model, image, mean, std)
        maps = [net.true(x, f"stage{index}_true") for index, x in enumerate(stages)]
    elif isinstance(geometry, Dinov2Config):
        maps = [_grid(net, dinov2.emit(net, model, image, mean, std), geometry.grid)]
    else:
        hidden = vit.emit(net, model, geometry, image, mean, std)
        maps = [_grid(net, net.true(hidden, "hidden_true"), geometry.grid)]
    resized = [_resized(net, x, config.side, f"map{index}") for index, x in enumerate(maps)]
    return resized[0] if len(resized) == 1 else net.concat(resized, 1, "maps")


def _grid(net: Network, x: Value, grid: int) -> Value:
    """Hidden states [1, C, 1, N] without a class token -> [1, C, grid, grid]."""
    _, C, _, N = x.shape
    if grid * grid < N:
        begin, end = [0, 0, 0, N - grid * grid], list(x.shape)
        cut = tools().mb.slice_by_index(x=x.var, begin=begin, end=end, name="patches_only")
        x = net.value(cut, x.site)
    return net.reshape(x, (1, C, grid, grid), "grid")


def _resized(net: Network, x: Value, side: int, name: str) -> Value:
    size = x.shape[2]
    if size == side:
        return x
    matrix = Value(net.const(bilinear_matrix(size, side).T))
    turned = net.matmul(x, matrix, f"{name}_rows", x_t=True)  # [1, C, w, side]
    return net.matmul(turned, matrix, f"{name}_resized", x_t=True)


def bilinear_matrix(size: int, out: int) -> np.ndarray:
    """float32[out, size]: what a line of `size` samples is multiplied with to be resized."""
    return np.array(resize_bilinear(mx.eye(size)[:, None], out, 1)[:, 0])
