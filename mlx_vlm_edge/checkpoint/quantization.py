"""Quantised arrays: what their shapes and the config's `quantization` block say of them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import UsageError

Block = Mapping[str, Any]
PARTS = ("weight", "scales", "biases")
LANGUAGE_MODEL = "language_model."
GROUP_SIZE = 64  # of what is quantised at load


class Form(NamedTuple):
    group_size: int
    bits: int
    mode: str


def form(
    block: Block,
    path: str,
    weight: mx.array,
    scales: mx.array,
    width: int | None = None,
    rename: Callable[[str], str] = str,
) -> Form:
    """How the layer at `path` is quantised: its bits are those that its shapes leave no choice of.

    A row of `weight` holds `width` numbers in 32-bit words, and has a scale for each group of them;
    the width of a layer that is not built is known by its group size only. So the entries of single
    layers matter for that and for the mode alone, however they are named.
    Raises UsageError for shapes that fit no quantisation.
    """
    settings = declared(block, path, rename)
    groups, words = scales.shape[-1], weight.shape[-1]
    if width is None:
        width = groups * size if type(size := settings.get("group_size")) is int else 0
    if min(width, groups) < 1 or width % groups or 32 * words % width or weight.dtype != mx.uint32:
        raise UsageError(
            f"{path}: weights {tuple(weight.shape)} and scales {tuple(scales.shape)} are those of "
            "no quantisation that config.json's block allows"
        )
    return Form(width // groups, 32 * words // width, settings.get("mode", "affine"))


def declared(block: Block, path: str, rename: Callable[[str], str] = str) -> dict[str, Any]:
    """What a block says of one layer: group_size, bits and mode, the layer's own before all's."""
    own = {rename(f"{name}."): entry for name, entry in block.items() if isinstance(entry, Mapping)}
    short = path.removeprefix(LANGUAGE_MODEL)  # some published configs leave it out
    said = {**block, **own.get(f"{path}.", own.get(f"{short}.", {}))}
    return {key: said[key] for key in ("group_size", "bits", "mode") if key in said}


def quantized_paths(names: Iterable[str]) -> set[str]:
    return {name.removesuffix(".scales") for name in names if name.endswith(".scales")}


def dequantized(
    arrays: Mapping[str, mx.array], block: Block | None, prefixes: tuple[str, ...] = ("",)
) -> dict[str, mx.array]:
    """The arrays with those under `prefixes` in full precision, in the dtype of their scales. Lazy.

    Raises UsageError where the block is missing or does not fit.
    """
    paths = {path for path in quantized_paths(arrays) if path.startswith(prefixes)}
    if paths and not block:
        raise UsageError("the weights are quantised but config.json has no quantization block")
    plain = {
        name: array
        for name, array in arrays.items()
        if name.rpartition(".")[0] not in paths or name.rpartition(".")[2] not in PARTS
    }
    for path in paths:
        if f"{path}.weight" not in arrays:
            raise UsageError(f"the checkpoint has {path}.scales and no {path}.weight")
        weight, scales = arrays[f"{path}.weight"], arrays[f"{path}.scales"]
        group_size, bits, mode = form(block or {}, path, weight, scales)
        try:
            plain[f"{path}.weight"] = mx.dequantize(
                weight, scales, arrays.get(f"{path}.biases"), group_size, bits, mode
            )
        except (ValueError, RuntimeError, TypeError) as error:
            raise UsageError(
                f"{path}: cannot be dequantised as {mode} of {bits} bits ({error})"
            ) from None
    return plain
