"""A family's native config and weights -> its model; every weight used, every parameter filled."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoint.config import says_tied
from ..checkpoint.files import SAFETENSORS, weight_files
from ..checkpoint.weights import Weights, check_names, read_safetensors
from ..errors import UsageError
from . import family
from .base import VisionLanguageModel
from .contract import Family

Quantization = Mapping[str, Any]


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
    native = Weights({kind.rename(name): array for name, array in arrays.items()})
    tied = "language_model.lm_head.weight" not in arrays and says_tied(config)
    parsed = kind.Config.from_dict({**config, "tie_word_embeddings": tied})
    weights = kind.fold(native, parsed)
    native.finish()
    model = kind.Model(parsed)
    place_quantized_layers(model, kind.rename, config.get("quantization"), weights)
    expected = {name: tuple(p.shape) for name, p in tree_flatten(model.parameters())}
    check_names(expected, weights)
    model.update(tree_unflatten(list(weights.items())))
    model.eval()
    return model


def place_quantized_layers(
    model: nn.Module,
    rename: Callable[[str], str],
    quantization: Quantization | None,
    weights: Iterable[str],
) -> None:
    """Turn the layers that have scales among a checkpoint's names into quantised ones."""
    quantised = {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}
    if not quantised:
        return
    if not quantization:
        raise UsageError("the weights are quantised but config.json has no quantization block")
    defaults = {
        key: quantization[key] for key in ("group_size", "bits", "mode") if key in quantization
    }
    own = {rename(f"{path}."): kind for path, kind in quantization.items()}

    def kind(path: str, _: nn.Module) -> bool | dict[str, Any]:
        if path not in quantised:
            return False
        short = path.removeprefix("language_model.")  # some published configs leave it out
        named = own.get(f"{path}.", own.get(f"{short}."))
        return named if isinstance(named, dict) else defaults

    nn.quantize(model, class_predicate=kind)
