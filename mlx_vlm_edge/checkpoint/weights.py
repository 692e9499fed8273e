"""Checkpoint files -> named arrays, read lazily, checked first: bytes, names and shapes.

Nothing here converts: a folder in the native layout is read as it stands.
"""

import json
import operator
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ..errors import UsageError
from ..wording import first_line, some

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorInfo:
    """dtype as safetensors names it ("BF16"), shape, and where in the file its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of one .safetensors file, without reading the data.

    Raises UsageError when the file is truncated, not safetensors, or has an unknown dtype.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise UsageError(f"{path}: not a complete safetensors file; download it again")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}: damaged safetensors header; download it again") from error
    if not isinstance(header, dict):
        raise UsageError(f"{path}: damaged safetensors header; download it again")
    header.pop("__metadata__", None)
    return {name: _checked(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _checked(path: Path, name: str, entry: Any, data: int, size: int) -> TensorInfo:
    """data: where in the file the tensors begin. size: the file's."""
    try:
        dtype, shape = str(entry["dtype"]), tuple(map(operator.index, entry["shape"]))
        begin, end = map(operator.index, entry["data_offsets"])
        if min(begin, *shape, 0) < 0:
            raise ValueError("a negative number")
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path}: damaged safetensors header at {name} ({error}); download it again"
        ) from error
    if dtype not in _BYTES:
        raise UsageError(f"{path}: {name} has type {dtype}, which MLX cannot hold")
    nbytes = _BYTES[dtype]
    for dim in shape:
        nbytes *= dim
    if end - begin != nbytes:
        raise UsageError(f"{path}: {name} says {shape} {dtype} but holds {end - begin} bytes")
    if data + end > size:
        missing = data + end - size
        raise UsageError(f"{path}: truncated, {missing:,} bytes are missing; download it again")
    return TensorInfo(dtype, shape, nbytes, data + begin)


def read_safetensors(paths: Iterable[Path]) -> dict[str, mx.array]:
    """All arrays of the given shards, lazily: the data is read when an array is first evaluated."""
    weights: dict[str, mx.array] = {}
    for path in paths:
        doubled = read_header(path).keys() & weights.keys()
        if doubled:
            raise UsageError(f"{path}: {min(doubled)} is in another shard as well")
        try:
            weights.update(cast(dict[str, mx.array], mx.load(str(path))))
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"{path}: MLX cannot read it ({first_line(error)})") from error
    return weights


def not_finite(arrays: Mapping[str, mx.array]) -> Iterator[str]:
    """Names of arrays that have infinities or NaN; the arrays are read one after the other."""
    for name, array in arrays.items():
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            yield name


def check_finite(arrays: Mapping[str, mx.array]) -> None:
    """The same of small arrays, with one wait for the device. Raises UsageError naming some."""
    floats = [a for a in arrays.values() if mx.issubdtype(a.dtype, mx.floating) and a.size]
    if floats and not mx.stack([mx.isfinite(a).all() for a in floats]).all().item():
        raise UsageError(
            f"{some(not_finite(arrays))} has values that are not finite: the checkpoint is "
            "damaged, or the dtype cannot hold its weights; take bfloat16 or float32"
        )


def _kind(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


class Weights:
    """Named arrays handed out once each, so that none is used twice, missed or left over.

    w = Weights({"a.weight": array}); w.take("a.weight", 3, 4); w.finish()
    """

    def __init__(self, arrays: Mapping[str, mx.array]) -> None:
        self._left = dict(arrays)
        self._packed = {n.removesuffix("scales") for n in arrays if n.endswith(".scales")}

    def take(self, name: str, *shape: int) -> mx.array:
        """The array of that name. Raises UsageError when it is missing or has another shape."""
        if name not in self._left:
            raise UsageError(f"the checkpoint lacks {name}; it is incomplete or of another model")
        array = self._pop(name)
        if tuple(array.shape) != shape:
            raise UsageError(
                f"{name} is {tuple(array.shape)} in the checkpoint, {shape} by its config"
            )
        return array

    def pair(self, source: str, target: str, *shape: int) -> dict[str, mx.array]:
        """A layer's weight of that shape and its bias of the first dimension, under `target`."""
        return {
            f"{target}.weight": self.take(f"{source}.weight", *shape),
            f"{target}.bias": self.take(f"{source}.bias", shape[0]),
        }

    def _pop(self, name: str) -> mx.array:
        """Raises UsageError for whole numbers, which only a quantised layer is made of."""
        array = self._left.pop(name)
        whole = not mx.issubdtype(array.dtype, mx.floating)
        if whole and name.removesuffix("scales").removesuffix("weight") not in self._packed:
            raise UsageError(f"{name} holds {_kind(array)} in the checkpoint, not weights")
        return array

    def drop(self, name: str) -> None:
        """Leave out an array that the model does not use, if it is there."""
        self._left.pop(name, None)

    def take_prefix(self, prefix: str) -> dict[str, mx.array]:
        """Every array whose name starts with `prefix`, under its full name."""
        names = [name for name in self._left if name.startswith(prefix)]
        return {name: self._pop(name) for name in names}

    def finish(self) -> None:
        """Raises UsageError when arrays are left that no part of the model asked for."""
        if self._left:
            raise UsageError(f"the checkpoint has weights no model part uses: {some(self._left)}")


def check_names(expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, mx.array]) -> None:
    """Raises UsageError unless both have the same names with the same shapes."""
    if missing := expected.keys() - weights.keys():
        raise UsageError(f"the checkpoint lacks {some(missing)}")
    if extra := weights.keys() - expected.keys():
        raise UsageError(f"the checkpoint has weights no model part uses: {some(extra)}")
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise UsageError(
                f"{name} is {tuple(weights[name].shape)} in the checkpoint, {shape} by its config"
            )
