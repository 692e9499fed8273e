"""A model folder's weights -> named arrays, whatever files hold them: safetensors or PyTorch's."""

from pathlib import Path

import mlx.core as mx

from mlx_vlm_edge.checkpoint.weights import find_shards, read_index, read_safetensors
from mlx_vlm_edge.errors import UsageError

from .torch_zip import read_torch

_TORCH_SUFFIXES = (".bin", ".pth", ".pt")
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "mm_projector")


def read_checkpoint(folder: Path) -> dict[str, mx.array]:
    """Every weight of a folder by its own name; safetensors go before PyTorch files.

    Safetensors stay on disk until an array is evaluated; PyTorch files are copied into memory
    once. Raises UsageError when there are no weights or a file is damaged, missing or hostile.
    """
    if shards := find_shards(folder):
        return read_safetensors(shards)
    weights: dict[str, mx.array] = {}
    for path in find_torch_files(folder):
        arrays = read_torch(path)
        if doubled := weights.keys() & arrays.keys():
            raise UsageError(f"{path}: {min(doubled)} is in another shard as well")
        weights.update(arrays)
    if not weights:
        raise UsageError(f"{folder}: no weights (*.safetensors, pytorch_model*.bin, *.pth) in it")
    return weights


def find_torch_files(folder: Path) -> list[Path]:
    """The PyTorch files of a model folder, by its index where it has one; [] when none."""
    index = folder / "pytorch_model.bin.index.json"
    if index.is_file():
        return read_index(index)
    named = sorted(folder.glob("pytorch_model*.bin"))
    if named:
        return named
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in _TORCH_SUFFIXES and not path.name.startswith(_NOT_WEIGHTS)
    )
