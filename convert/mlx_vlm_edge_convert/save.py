"""A native model -> a folder's files: shards of at most 5 GB, their index, config and the rest."""

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_vlm_edge.checkpoint.files import SAFETENSORS, beside, read_json
from mlx_vlm_edge.checkpoint.weights import not_finite
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.system_files import of_the_system
from mlx_vlm_edge.wording import gigabytes

from .rules import Arrays

SHARD_BYTES = 5 << 30
_SPARE_BYTES = 64 << 20

Report = Callable[[str], None]


def written_files(folder: Path) -> Collection[str]:
    """The files of a folder that `save_weights` and what went before it wrote; none elsewhere."""
    try:
        files = read_json(folder / SAFETENSORS.index).get("metadata", {}).get("files")
    except (UsageError, AttributeError):
        return ()
    return [SAFETENSORS.index, *files] if isinstance(files, list) else ()


def save_weights(
    folder: Path, weights: Arrays, *, shard_bytes: int = SHARD_BYTES, report: Report | None = None
) -> None:
    """Write shards and their index, emptying `weights` so that each shard's memory is freed.

    The index lists all files of the folder, which is what a later run may overwrite.
    An array larger than `shard_bytes` gets a shard of its own. Raises UsageError when the disk
    has too little room, and for values that are not finite, as float16 makes of large ones.
    """
    total = sum(array.nbytes for array in weights.values())
    free = shutil.disk_usage(folder).free
    if total + _SPARE_BYTES > free:
        room = f"{gigabytes(total)} to write, {gigabytes(free)} free"
        raise UsageError(f"{folder.parent}: {room}")
    shards = _shards(weights, shard_bytes)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SAFETENSORS.single
        if len(shards) > 1:
            file = f"{SAFETENSORS.stem}-{number:05}-of-{len(shards):05}{SAFETENSORS.endings[0]}"
        if report:
            size = sum(weights[name].nbytes for name in names)
            report(f"writing {file} ({size / 1e6:,.1f} MB)")
        _save(folder / file, {name: weights.pop(name) for name in names})
        index |= dict.fromkeys(names, file)
    files = sorted(path.name for path in folder.iterdir() if not of_the_system(path.name))
    metadata = {"total_size": total, "files": files}
    content = {"metadata": metadata, "weight_map": dict(sorted(index.items()))}
    save_json(folder / SAFETENSORS.index, content)


def _save(path: Path, weights: Arrays) -> None:
    for name in not_finite(weights):
        kind = str(weights[name].dtype).removeprefix("mlx.core.")
        raise UsageError(f"{name} has values that are not finite in {kind}: nothing was written")
    try:
        mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})
    except RuntimeError as error:
        raise UsageError(f"{path.name}: cannot be written ({error})") from error
    mx.clear_cache()


def _shards(weights: Mapping[str, mx.array], limit: int) -> list[list[str]]:
    """Names in order, cut before a shard passes the limit."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, array in weights.items():
        if shards[-1] and size + array.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += array.nbytes
    return shards


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file with sorted keys."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def complete_json(path: Path, defaults: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Write a JSON file: what is there goes before `defaults`, `fixed` before both."""
    save_json(path, {**defaults, **read_json(path), **fixed})


def clip_preprocessor(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    """preprocessor_config.json of transformers' CLIPImageProcessor for square images of `size`."""
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(std),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def copy_files(source: Path, folder: Path) -> list[str]:
    """Copy what a model folder has beside its config and weights; the names copied."""
    names = [name for name in beside(source) if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names
