"""A model folder's weights -> named arrays, whatever files hold them: safetensors or PyTorch's."""

from pathlib import Path

import mlx.core as mx

from mlx_vlm_edge.checkpoint.files import SAFETENSORS, weight_files
from mlx_vlm_edge.checkpoint.weights import read_safetensors
from mlx_vlm_edge.errors import UsageError

from .torch_zip import read_torch


def read_checkpoint(folder: Path) -> dict[str, mx.array]:
    """Every weight of a folder by its own name; safetensors go before PyTorch files.

    Safetensors stay on disk until an array is evaluated; PyTorch files are copied into memory
    once. Raises UsageError when there are no weights or a file is damaged, missing or hostile.
    """
    paths = weight_files(folder)
    if paths and paths[0].name.endswith(SAFETENSORS.endings):
        return read_safetensors(paths)
    weights: dict[str, mx.array] = {}
    for path in paths:
        arrays = read_torch(path)
        if doubled := weights.keys() & arrays.keys():
            raise UsageError(f"{path}: {min(doubled)} is in another shard as well")
        weights.update(arrays)
    if not weights:
        raise UsageError(f"{folder}: no weights (*.safetensors, pytorch_model*.bin, *.pth) in it")
    return weights
