"""A family's native config and weights -> its model; every weight used, every parameter filled."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoint.config import check, reading_values, says_tied
from ..checkpoint.files import SAFETENSORS, weight_files
from ..checkpoint.quantization import dequantized, form, quantized_paths
from ..checkpoint.weights import DTYPES, Weights, check_names, read_safetensors
from ..errors import UsageError
from ..kernels import on_cpu
from ..wording import first_line
from . import family
from .base import VisionLanguageModel
from .contract import Family

Quantization = Mapping[str, Any]
TOWERS = ("vision_tower.", "vision_model.")  # folded, so never run quantised


def read_native(folder: Path, config: Mapping[str, Any]) -> dict[str, mx.array] | None:
    """The weights of a folder in the native layout, lazily; None where its layout is another."""
    shards = weight_files(folder, [SAFETENSORS])
    if not shards:
        return None
    arrays = read_safetensors(shards)
    return arrays if family(config).is_native(arrays) else None


def build(
    kind: Family[Any], config: Mapping[str, Any], arrays: Mapping[str, mx.array]
) -> VisionLanguageModel:
    """A family's model from its native config and weights; nothing is evaluated yet."""
    with reading_values("config.json"):
        tied = "language_model.lm_head.weight" not in arrays and says_tied(config)
        parsed = kind.Config.from_dict({**config, "tie_word_embeddings": tied})
        check(parsed)
        plain = dequantized(arrays, config.get("quantization"), TOWERS)
        model = kind.Model(parsed)
    native = Weights({kind.rename(name): array for name, array in plain.items()})
    weights = kind.fold(native, parsed)
    native.finish()
    if paths := quantized_paths(weights):
        settings = _by_shapes(kind.rename, config.get("quantization"), weights)
        place_quantized_layers(model, paths, settings)
    expected = {name: tuple(p.shape) for name, p in tree_flatten(model.parameters())}
    check_names(expected, weights)
    model.update(tree_unflatten(list(weights.items())))
    model.eval()
    return model


def place_quantized_layers(
    model: nn.Module, paths: Collection[str], settings: Callable[[str, nn.Module], Any]
) -> None:
    """Turn the layers at `paths` into quantised ones of the group size, bits and mode that
    `settings` tells for each. Raises UsageError for what MLX does not have."""

    def kind(path: str, layer: nn.Module) -> Any:
        return path in paths and hasattr(layer, "to_quantized") and settings(path, layer)

    try:
        nn.quantize(model, class_predicate=kind)
    except (ValueError, RuntimeError, TypeError) as error:
        raise UsageError(f"config.json: this quantization cannot be: {first_line(error)}") from None


def _by_shapes(
    rename: Callable[[str], str], block: Any, weights: Mapping[str, mx.array]
) -> Callable[[str, nn.Module], dict[str, Any]]:
    """The settings of a checkpoint's layers. Raises UsageError without a quantization block."""
    if not isinstance(block, Mapping) or not block:
        raise UsageError("the weights are quantised but config.json has no quantization block")

    def settings(path: str, layer: nn.Module) -> dict[str, Any]:
        if f"{path}.weight" not in weights:
            raise UsageError(f"the checkpoint has {path}.scales and no {path}.weight")
        weight, scales = weights[f"{path}.weight"], weights[f"{path}.scales"]
        return form(block, path, weight, scales, layer.weight.shape[-1], rename)._asdict()

    return settings


def cast(model: VisionLanguageModel, dtype: str | None) -> None:
    """Give the floating-point parameters their dtype; packed quantised weights stay.

    dtype: by default the language model's own, float32 on the CPU back end, and the vision tower
    never in float16.
    """

    def give(part: nn.Module, wanted: mx.Dtype) -> None:
        part.apply(lambda p: p.astype(wanted) if mx.issubdtype(p.dtype, mx.floating) else p)

    own = model.language_model.model.norm.weight.dtype
    text = DTYPES[dtype] if dtype else (mx.float32 if on_cpu() else own)
    vision = text if dtype or text != mx.float16 else mx.float32
    for name, part in model.children().items():
        if isinstance(part, nn.Module):
            give(part, text if name == "language_model" else vision)
