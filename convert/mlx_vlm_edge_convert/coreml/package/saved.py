"""A saved .mlpackage: its protobuf, the types it declares, and the constants it holds."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .blob import NUMPY, WIDTHS, Blob, unpack
from .malformed import reading
from .messages import parse

DTYPES = {  # MIL_pb2.DataType
    1: "bool", 2: "string", 10: "fp16", 11: "fp32", 21: "int8", 22: "int16", 23: "int32",
    25: "int4", 31: "uint8", 32: "uint16", 33: "uint32", 35: "uint4", 36: "uint2", 37: "uint1",
    38: "uint6", 39: "uint3",
}  # fmt: skip
FLOATS = ("fp16", "fp32")
MANIFEST = "Manifest.json"  # of a package
PREFIX = "@model_path/"  # what a weight file's name begins with


class Type(NamedTuple):
    """shape: None stands for a size that is not fixed."""

    dtype: str
    shape: tuple[int | None, ...]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape is of the type."""
        return len(shape) == len(self.shape) and all(
            due in (None, size) for due, size in zip(self.shape, shape, strict=True)
        )


def type_of(declared: Any) -> Type:
    """A MIL ValueType, a state's being that of what it holds."""
    if declared.WhichOneof("type") == "stateType":
        return type_of(declared.stateType.wrappedType)
    if declared.WhichOneof("type") != "tensorType":
        raise ValueError(f"a value of type {declared.WhichOneof('type')}")
    tensor = declared.tensorType
    sizes = [
        d.constant.size if d.WhichOneof("dimension") == "constant" else None
        for d in tensor.dimensions
    ]
    return Type(DTYPES[tensor.dataType], tuple(sizes))


class Saved:
    """Raises UsageError when the folder is not a whole ML program."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        with reading(path.name, "is not a whole Core ML package"):
            model = model_file(path, json.loads((path / MANIFEST).read_text()))
            content = model.read_bytes()
        with reading(path.name, f"{model.name} is damaged"):
            self.spec = parse(content)
            if self.spec.WhichOneof("Type") != "mlProgram":
                raise ValueError("it has no ML program")
        self.functions = self.spec.mlProgram.functions
        self._folder = model.parent
        self._blobs: dict[str, Blob] = {}

    def value(self, value: Any) -> Any:
        """A constant: a string, or an array of its declared dtype and shape.

        Types below a byte come as 8 bits; float16 stays float16.
        """
        kind = type_of(value.type)
        shape = tuple(size or 0 for size in kind.shape)
        if value.WhichOneof("value") == "blobFileValue":
            stored = value.blobFileValue
            blob = self._blob(stored.fileName.removeprefix(PREFIX))
            return blob.read(stored.offset, kind.dtype, math.prod(shape)).reshape(shape)
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        values = getattr(tensor, field).values if field else []
        if kind.dtype == "string":
            return values[0] if not shape else list(values)
        return _array(values, kind.dtype, math.prod(shape)).reshape(shape)

    def _blob(self, name: str) -> Blob:
        if name not in self._blobs:
            self._blobs[name] = Blob(_within(self._folder, name))
        return self._blobs[name]


def model_file(package: Path, manifest: Any) -> Path:
    """The file of a package's program, by the package's manifest."""
    entry = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
    return _within(package / "Data", entry["path"])


def _within(folder: Path, name: str) -> Path:
    """A file of a folder. Raises ValueError for a name that leads out of it."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} is outside of it")
    return path


def _array(values: Any, dtype: str, count: int) -> np.ndarray:
    if isinstance(values, bytes):
        if dtype in WIDTHS:
            return unpack(values, count, dtype)
        return np.frombuffer(values, NUMPY[dtype])
    array = np.array(list(values), NUMPY[dtype])
    return np.zeros(count, NUMPY[dtype]) if count and not array.size else array  # all default
