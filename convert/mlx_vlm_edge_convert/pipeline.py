"""A published checkpoint -> the native layout, in memory or as a folder (quantised, verified)."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.hub import locate
from mlx_vlm_edge.load import build, read_config
from mlx_vlm_edge.models import family

from . import verify as verification
from .checkpoint import read_checkpoint, read_json
from .families import fastvlm
from .quantize import cast, dequantize, quantize
from .reparam import is_training_form
from .rules import Arrays
from .save import Report, copy_files, new_folder, save_json, save_weights

FAMILIES: Mapping[str, ModuleType] = {"llava_qwen2": fastvlm, "fast_vlm": fastvlm}
_BLOCKS = ("vision_config", "text_config", "quantization", "quantization_config")


def to_native(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], Arrays]:
    """The native config and weights of a model folder in any published layout, lazily.

    Raises UsageError for what is missing, damaged, unknown or contradictory.
    """
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise UsageError(f"{folder}: model_type {kind!r} is not one of {', '.join(FAMILIES)}")
    for key in _BLOCKS:
        if not isinstance(config.get(key) or {}, Mapping):
            raise UsageError(f"{folder}/config.json: {key} is not an object")
    module, weights = FAMILIES[kind], read_checkpoint(folder)
    foreign = (config.get("quantization_config") or {}).get("quant_method")
    if foreign and not module.is_native(weights):
        raise UsageError(f"{folder}: quantised with {foreign}; convert the full-precision model")
    preprocessor = read_json(folder / "preprocessor_config.json")
    native: tuple[dict[str, Any], Arrays] = module.to_native(config, weights, preprocessor)
    return native


def convert(
    source: str | Path,
    out: str | Path,
    *,
    bits: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
    verify: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> Path:
    """Write `source` (a folder, Hub id or alias) to the folder `out` in the native layout.

    bits and group_size quantise the language model (affine); dtype casts what stays floating
    point; verify compares the written model with the source, part by part. A quantised source is
    dequantised first when bits is given. Nothing is left behind on failure.
    Raises UsageError for every mistake, and when verify fails.
    """
    say = report or (lambda _: None)
    folder, target = locate(str(source)), Path(out).expanduser()
    if target.exists() and target.samefile(folder):
        raise UsageError(f"{target} is the source; name another folder to write to")
    config, weights = to_native(folder, read_config(folder))
    config, weights = _reshape(config, weights, bits, group_size, dtype)
    build(family(config["model_type"]), config, weights)  # strict, and evaluates nothing
    say(f"{folder} -> {target}: {_count(weights)}")
    with new_folder(target, overwrite=overwrite) as partial:
        copied = copy_files(folder, partial)
        write_processor(partial, config)
        save_json(partial / "config.json", config)
        save_weights(partial, weights, report=say)
        if verify:
            say("comparing the written model with the source")
            _verify(folder, partial, verification.tolerances(bits, dtype), say)
    say(f"copied {', '.join(copied) or 'no tokenizer files: the source has none'}")
    return target


def _verify(folder: Path, written: Path, limits: Mapping[str, float], say: Report) -> None:
    config = read_config(folder)
    module = FAMILIES[str(config["model_type"])]
    weights = read_checkpoint(folder)
    unmerged: Arrays = {} if module.is_native(weights) else module.place(weights)
    del weights
    if not is_training_form(unmerged):
        unmerged = {}
    verification.verify(lambda: to_native(folder, config), written, limits, say, unmerged)


def _reshape(
    config: dict[str, Any], weights: Arrays, bits: int | None, group_size: int, dtype: str | None
) -> tuple[dict[str, Any], Arrays]:
    """Cast and quantise as asked, and say so in the config."""
    config = dict(config)
    block = config.get("quantization") or config.get("quantization_config")
    if bits is not None and block:
        weights = dequantize(weights, block)
    if dtype is not None:
        weights = cast(weights, dtype)
        config["torch_dtype"] = dtype
    if bits is not None:
        weights, block = quantize(weights, bits, group_size)
    if block:
        config["quantization"] = config["quantization_config"] = block
    return config, weights


def write_processor(folder: Path, config: Mapping[str, Any]) -> None:
    """Complete preprocessor_config.json and processor_config.json as mlx-community writes them.

    mlx-swift-lm finds FastVLM's processor by `processor_class` and reads `crop_size`; other keys
    of a source are kept.
    """
    size = config["vision_config"]["image_size"]
    published = {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [1.0, 1.0, 1.0],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 0,
        "patch_size": config["vision_config"]["patch_size"],
    }
    kind = {"processor_class": "FastVLMProcessor"}
    for name, defaults in (("preprocessor", published), ("processor", processor)):
        path = folder / f"{name}_config.json"
        save_json(path, {**defaults, **read_json(path), **kind})


def _count(weights: Mapping[str, mx.array]) -> str:
    size = sum(array.nbytes for array in weights.values())
    return f"{len(weights)} weights, {size / 1e6:,.1f} MB"
