"""A published checkpoint -> the native layout, in memory or as a folder (quantised, verified)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_vlm_edge.checkpoint.adapter import Adapter, check_values, read_adapter
from mlx_vlm_edge.checkpoint.adapter_choice import choices
from mlx_vlm_edge.checkpoint.config import PREPROCESSOR, read_config, reading_values, says_tied
from mlx_vlm_edge.checkpoint.files import CONFIG, PREPROCESSOR_CONFIG, read_whole
from mlx_vlm_edge.checkpoint.quantization import dequantized
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.hub.models import expanded, obtain
from mlx_vlm_edge.models import family
from mlx_vlm_edge.models.adapted import Adapted, adapt
from mlx_vlm_edge.models.build import build, read_native
from mlx_vlm_edge.text import saved_tokenizer
from mlx_vlm_edge.wording import gigabytes

from . import verify as verification
from .adapters import native_names
from .checkpoint import read_checkpoint
from .families import fastvlm, source_family
from .new_folder import check_target, new_folder
from .quantize import cast, quantize
from .reparam import is_training_form
from .rules import Arrays
from .save import Report, copy_files, save_json, save_weights, written_files
from .torch_zip import read_torch

_PACKED = ("quantization", "quantization_config")
_BLOCKS = ("vision_config", "text_config", "quantization", "quantization_config")


def native_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The native config of a published one, where there are no weights to hold it against.

    What only these could tell is taken to be as published; the output head is tied where
    `says_tied` has it so. Raises UsageError for a model that is not known or not whole.
    """
    family = source_family(config)
    with reading_values("config.json"):
        native = family.config_alone(config)
        return {**native, "tie_word_embeddings": says_tied(native)}


def tower_repositories(config: Mapping[str, Any]) -> list[str]:
    """The Hub's names of the vision towers that a published config's model leaves out and names."""
    named = getattr(source_family(config), "tower_repositories", None)
    return [] if named is None else list(named(config))


def native_checkpoint(folder: Path) -> tuple[dict[str, Any], Arrays]:
    """Config and native weights of a folder in any layout; see `to_native`."""
    config = read_config(folder)
    arrays = read_native(folder, config)
    return to_native(folder, config) if arrays is None else (config, arrays)


def to_native(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], Arrays]:
    """The native config and weights of a model folder in any published layout, lazily.

    config: as `read_config` gives it, with what the folder says about preprocessing.
    Raises UsageError for what is missing, damaged, unknown or contradictory.
    """
    for key in _BLOCKS:
        if not isinstance(config.get(key) or {}, Mapping):
            raise UsageError(f"{folder}/config.json: {key} is not an object")
    module, weights = source_family(config), read_checkpoint(folder)
    foreign = (config.get("quantization_config") or {}).get("quant_method")
    if foreign and not family(config).is_native(weights):
        raise UsageError(f"{folder}: quantised with {foreign}; convert the full-precision model")
    preprocessor = config.get(PREPROCESSOR) or {}
    with reading_values(f"{folder}/config.json"):
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
    adapter: Any = None,
    report: Report | None = None,
) -> Path:
    """Write `source` (a folder, Hub id or alias) to the folder `out` in the native layout.

    bits and group_size quantise the language model (affine); dtype casts what stays floating
    point; verify compares the written model with the source, part by part. A quantised source is
    dequantised first when bits is given. adapter: what `load` takes as one; the written model has
    it fused. Nothing is left behind on failure.
    Raises UsageError for every mistake, and when verify fails.
    """
    say = report or (lambda _: None)
    target = expanded(str(out))
    _check_apart(target, expanded(str(source)))
    check_target(target, overwrite=overwrite, listed=written_files)  # before anything is fetched
    chosen = choices(adapter)
    adapters = [read_adapter(choice.path, choice.scale, read_torch) for choice in chosen]
    for one in adapters:
        check_values(one)
        if one.note:
            say(one.note)
    folder = obtain(str(source))
    _check_apart(target, folder)
    read = read_config(folder)

    def whole() -> tuple[dict[str, Any], Arrays]:
        return _with_adapters(*to_native(folder, read_config(folder)), adapters, bits)

    if size := read_whole(folder):
        say(f"PyTorch's files are read whole: they take {gigabytes(size)} of memory")
    config, weights = to_native(folder, read_config(folder))
    note = _requantised(config, bits)  # of the source: adapters may have it dequantised
    config, weights = _with_adapters(config, weights, adapters, bits)
    module = source_family(config)
    if note:
        say(note)
    config, weights = _reshape(config, weights, bits, group_size, dtype)
    build(family(config), config, weights)  # strict, and evaluates nothing
    say(f"{folder} -> {target}: {_count(weights)}")
    with new_folder(target, overwrite=overwrite, listed=written_files) as partial:
        copied = copy_files(folder, partial)
        _write_tokenizer(folder, partial, say)
        if read[PREPROCESSOR]:  # wherever it stood: a file of its own is what all readers know
            save_json(partial / PREPROCESSOR_CONFIG, read[PREPROCESSOR])
        module.write_files(partial, config)
        beside = {key: value for key, value in config.items() if key != PREPROCESSOR}
        save_json(partial / CONFIG, beside)
        save_weights(partial, weights, report=say)
        if verify:
            say("comparing the written model with the source")
            verification.verify(
                whole, partial, module.probe(config),
                verification.tolerances(bits, dtype), say, {} if adapters else _unmerged(folder),
            )  # fmt: skip
    say(f"copied {', '.join(copied) or 'no tokenizer files: the source has none'}")
    return target


def _with_adapters(
    config: dict[str, Any], weights: Arrays, adapters: Sequence[Adapter], bits: int | None
) -> tuple[dict[str, Any], Arrays]:
    """The native config and weights with adapters fused.

    Raises UsageError for packed weights that are to stay as they are: they take nothing up.
    """
    block = config.get("quantization") or config.get("quantization_config")
    if not adapters:
        return config, weights
    if block and bits is not None:
        weights = dequantized(weights, block)
        config = {key: value for key, value in config.items() if key not in _PACKED}
    fused = adapt(config, Adapted(weights), adapters, native_names)
    if fused.branches:
        raise UsageError(
            f"{adapters[0].called}: the source's weights are quantised and cannot take it up; "
            "convert the full-precision model, or say --bits to quantise these anew"
        )
    return _untied(config) if fused.untied else config, fused.arrays


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model whose output head is no longer its table: all that read it ask the root
    or the text_config."""
    said, text = {"tie_word_embeddings": False}, config.get("text_config")
    return {**config, **said, **({"text_config": {**text, **said}} if text else {})}


def _check_apart(target: Path, folder: Path) -> None:
    """Raises UsageError when the target is the source, or has it in it."""
    if target.exists() and folder.exists() and target.samefile(folder):
        raise UsageError(f"{target} is the source; name another folder to write to")
    if target.resolve() in folder.resolve().parents:
        raise UsageError(f"{target} has the source in it; name another folder to write to")


def _write_tokenizer(folder: Path, partial: Path, say: Report) -> None:
    """tokenizer.json beside a tokenizer.model or a tiktoken file that can be read here."""
    try:
        if saved_tokenizer.write_json(folder, partial):
            say("wrote tokenizer.json, which is read faster than the tokenizer's own file")
    except UsageError as error:  # weights are converted all the same
        say(f"no tokenizer.json: {error}")


def _unmerged(folder: Path) -> Arrays:
    """The source's weights with their branches apart, {} where it is not in the training form."""
    weights = read_checkpoint(folder)
    return fastvlm.place(weights) if is_training_form(weights) else {}


def _reshape(
    config: dict[str, Any], weights: Arrays, bits: int | None, group_size: int, dtype: str | None
) -> tuple[dict[str, Any], Arrays]:
    """Cast and quantise as asked, and say so in the config."""
    config = dict(config)
    block = config.get("quantization") or config.get("quantization_config")
    if bits is not None and block:
        weights = dequantized(weights, block)
    if dtype is not None:
        weights = cast(weights, dtype)
        config["torch_dtype"] = dtype
    if bits is not None:
        weights, block = quantize(weights, bits, group_size)
    if block:
        config["quantization"] = config["quantization_config"] = block
    return config, weights


def _requantised(config: Mapping[str, Any], bits: int | None) -> str:
    """What is lost when a quantised source is quantised anew; "" where nothing is."""
    before = {
        int(kind["bits"])
        for block in [config.get("quantization") or config.get("quantization_config") or {}]
        for kind in (block, *block.values())
        if isinstance(kind, Mapping) and kind.get("bits")
    }
    if bits is None or not before:
        return ""
    shown = " and ".join(map(str, sorted(before)))
    return (
        f"note: the source has {shown} bits already: rounding it to {bits} again loses more, and "
        "brings nothing back; a full-precision source is better"
    )


def _count(weights: Mapping[str, mx.array]) -> str:
    size = sum(array.nbytes for array in weights.values())
    return f"{len(weights)} weights, {size / 1e6:,.1f} MB"
