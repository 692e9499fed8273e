"""A saved package as it is on disk: its functions, their inputs, outputs and operations."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_vlm_edge.errors import UsageError

from .toolkit import tools

# MIL's numbers for types.
DTYPES = {
    1: "bool", 2: "string", 10: "fp16", 11: "fp32", 21: "int8", 22: "int16", 23: "int32",
    25: "int4", 31: "uint8", 32: "uint16", 33: "uint32", 35: "uint4", 36: "uint2", 37: "uint1",
    38: "uint6", 39: "uint3",
}  # fmt: skip
Shape = tuple[int | None, ...]


def read_spec(package: Path) -> Any:
    """The protobuf of an ML program. Raises UsageError when it cannot be read or is another."""
    try:
        manifest = json.loads((package / "Manifest.json").read_text())
        root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        content = (package / "Data" / root).read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{package.name}: not a readable Core ML package ({error})") from error
    spec = tools().model.Model()
    try:
        spec.ParseFromString(content)
    except tools().decode_error as error:
        raise UsageError(f"{package.name}: damaged model file; export it again") from error
    if spec.WhichOneof("Type") != "mlProgram":
        raise UsageError(f"{package.name}: not an ML program")
    return spec


def tensor(kind: Any) -> tuple[str, Shape]:
    """Dtype and shape of a MIL value's type, None for a dimension that is not fixed."""
    if kind.WhichOneof("type") == "stateType":
        kind = kind.stateType.wrappedType
    inner = kind.tensorType
    shape = tuple(
        dim.constant.size if dim.WhichOneof("dimension") == "constant" else None
        for dim in inner.dimensions
    )
    return DTYPES.get(inner.dataType, str(inner.dataType)), shape


def functions(spec: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, function and operations of each function of a package."""
    for name, function in spec.mlProgram.functions.items():
        yield name, function, function.block_specializations[function.opset]


def interface(package: Path) -> dict[str, Any]:
    """By function: its inputs, states and outputs, each name, kind, dtype and shape."""
    spec = read_spec(package)
    described: Mapping[str, Any] = {f.name: f for f in spec.description.functions}
    found: dict[str, Any] = {}
    for name, function, block in functions(spec):
        outer = described.get(name, spec.description)
        images = {x.name for x in outer.input if x.type.WhichOneof("Type") == "imageType"}
        types = {out.name: out.type for op in block.operations for out in op.outputs}
        entry: dict[str, list[dict[str, Any]]] = {"inputs": [], "states": [], "outputs": []}
        for value in function.inputs:
            state = value.type.WhichOneof("type") == "stateType"
            kind = "state" if state else "image" if value.name in images else "tensor"
            entry["states" if state else "inputs"].append(_entry(value.name, kind, value.type))
        entry["outputs"] = [_entry(out, "tensor", types[out]) for out in block.outputs]
        found[name] = entry
    return found


def _entry(name: str, kind: str, value_type: Any) -> dict[str, Any]:
    dtype, shape = tensor(value_type)
    return {"name": name, "kind": kind, "dtype": dtype, "shape": list(shape)}
