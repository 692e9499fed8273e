"""Adapters that a user named -> read, and taken up by a model's native weights."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoint.adapter import Adapter, check_values, read_adapter
from ..checkpoint.adapter_choice import AdapterChoice
from ..models.adapted import Adapted, adapt
from ..wording import say_once


def read_adapters(chosen: Sequence[AdapterChoice]) -> list[Adapter]:
    """The adapters, each checked by itself before a model is looked for.

    Evaluated: another thread takes them up, which cannot use an array that this one leaves lazy.
    """
    adapters = [read_adapter(choice.path, choice.scale, _read_torch) for choice in chosen]
    for adapter in adapters:
        check_values(adapter)
        if adapter.note:
            say_once(adapter.note)
    return adapters


def check_folders(chosen: Sequence[AdapterChoice]) -> None:
    """Raises UsageError for what is no adapter. No numbers of a safetensors file are read."""
    for choice in chosen:
        read_adapter(choice.path, choice.scale, _read_torch)


def _read_torch(path: Path) -> dict[str, mx.array]:
    from mlx_vlm_edge_convert.torch_zip import read_torch

    arrays: dict[str, mx.array] = read_torch(path)
    return arrays


def adapted(
    config: Mapping[str, Any], arrays: Mapping[str, mx.array], adapters: Sequence[Adapter]
) -> Adapted:
    """Native weights with the adapters in them. Nothing is evaluated."""
    weights = Adapted(dict(arrays))
    return onto(config, weights, adapters) if adapters else weights


def onto(
    config: Mapping[str, Any],
    before: Adapted,
    adapters: Sequence[Adapter],
    shared: Collection[str] = (),
) -> Adapted:
    """`models.adapted.adapt` with the converter's names."""
    from mlx_vlm_edge_convert.adapters import native_names

    return adapt(config, before, adapters, native_names, shared)
