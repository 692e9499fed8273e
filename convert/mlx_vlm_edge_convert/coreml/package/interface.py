"""What goes in and out of a saved package, as the package itself declares it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .malformed import reading
from .saved import Saved, Type, type_of


def blocks(saved: Saved) -> Iterator[tuple[str, Any, Any]]:
    """Name, function and operations of each function of a package."""
    for name, function in saved.functions.items():
        yield name, function, function.block_specializations[function.opset]


def is_state(value: Any) -> bool:
    """Whether a function's input is a state."""
    return bool(value.type.WhichOneof("type") == "stateType")


def interface(package: Path) -> dict[str, Any]:
    """By function: its inputs, states and outputs, each with name, kind, dtype and shape.

    Raises UsageError when the folder is not a whole package.
    """
    saved = Saved(package)
    with reading(package.name):
        return {name: _ports(saved, name, *parts) for name, *parts in blocks(saved)}


def _ports(saved: Saved, name: str, function: Any, block: Any) -> dict[str, Any]:
    described = {f.name: f for f in saved.spec.description.functions}
    outer = described.get(name, saved.spec.description)
    images = {x.name for x in outer.input if x.type.WhichOneof("Type") == "imageType"}
    types = {out.name: type_of(out.type) for op in block.operations for out in op.outputs}
    entry: dict[str, list[dict[str, Any]]] = {"inputs": [], "states": [], "outputs": []}
    for value in function.inputs:
        kind = "state" if is_state(value) else "image" if value.name in images else "tensor"
        where = entry["states" if kind == "state" else "inputs"]
        where.append(_entry(value.name, kind, type_of(value.type)))
    entry["outputs"] = [_entry(out, "tensor", types[out]) for out in block.outputs]
    return entry


def _entry(name: str, kind: str, declared: Type) -> dict[str, Any]:
    return {"name": name, "kind": kind, "dtype": declared.dtype, "shape": list(declared.shape)}
