"""A second reader and interpreter of .mlpackage folders, for the tests alone: package -> outputs.

Nothing of the exporter is used, neither its reader nor its operations: protobuf classes are
coremltools', the weight file is read by its published layout (MILBlob: StorageFormat.hpp), and each
operation is computed by torch in float64 as Apple's documentation of MIL's operations defines it
(apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html). Nothing is
rounded to float16: constants have its values, results do not.
"""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

STORED = {1: np.float16, 2: np.float32, 3: np.uint8, 4: np.int8, 6: np.int16, 7: np.uint16,
          14: np.int32, 15: np.uint32}  # fmt: skip
NARROW = {8: 4, 9: 1, 10: 2, 11: 4, 12: 3, 13: 6}  # BlobDataType -> bits
# MIL.proto's DataType -> numpy's; those of fewer than 8 bits by their bits.
NUMPY = {1: np.bool_, 10: np.float16, 11: np.float32, 21: np.int8, 22: np.int16, 23: np.int32,
         31: np.uint8, 32: np.uint16, 33: np.uint32}  # fmt: skip
UNSIGNED = {35: 4, 36: 2, 37: 1, 38: 6, 39: 3}
STRING = 2
Tensor = torch.Tensor


def unpacked(raw: bytes, bits: int, count: int) -> np.ndarray:
    """Values of so many bits, the first in the lowest bits of the first byte."""
    stream = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")
    each = stream[: count * bits].reshape(count, bits)
    return (each << np.arange(bits)).sum(1)


class Reader:
    """A package and the states of one conversation with it, by function name."""

    def __init__(self, package: Path) -> None:
        from coremltools.proto import Model_pb2

        listed = json.loads((package / "Manifest.json").read_text())
        item = listed["itemInfoEntries"][listed["rootModelIdentifier"]]
        self.model = package / "Data" / item["path"]
        spec = Model_pb2.Model()
        spec.ParseFromString(self.model.read_bytes())
        self.spec, self.functions = spec, spec.mlProgram.functions
        self._files: dict[str, bytes] = {}
        self.states: dict[str, Tensor] = {}

    def _file(self, name: str) -> bytes:
        path = self.model.parent / name.replace("@model_path/", "")
        return self._files.setdefault(name, path.read_bytes())

    def _shape(self, kind: Any) -> tuple[int, list[int]]:
        """Its DataType and its sizes."""
        tensor = kind.stateType.wrappedType.tensorType if kind.HasField("stateType") else (
            kind.tensorType
        )  # fmt: skip
        return tensor.dataType, [size.constant.size for size in tensor.dimensions]

    def constant(self, value: Any) -> Any:
        """A string, or a tensor: of float64 for floats, of int64 for the rest."""
        data_type, shape = self._shape(value.type)
        count = int(np.prod(shape))
        if value.HasField("blobFileValue"):
            whole, at = self._file(value.blobFileValue.fileName), value.blobFileValue.offset
            sentinel, stored, size, start = struct.unpack_from("<IIQQ", whole, at)
            if sentinel != 0xDEADBEEF:
                raise ValueError("no record where one is named")
            raw = whole[start : start + size]
            if stored in NARROW:
                return torch.from_numpy(unpacked(raw, NARROW[stored], count).reshape(shape))
            return _tensor(np.frombuffer(raw, STORED[stored])[:count].reshape(shape))
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        values = getattr(tensor, field).values if field else []
        if data_type == STRING:
            return values[0]
        if field == "bytes" and data_type in UNSIGNED:
            return torch.from_numpy(unpacked(values, UNSIGNED[data_type], count).reshape(shape))
        if field == "bytes":
            return _tensor(np.frombuffer(values, NUMPY[data_type]).reshape(shape))
        array = np.array([*values], NUMPY[data_type])
        return _tensor((array if array.size else np.zeros(count, array.dtype)).reshape(shape))

    def run(self, function: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; states stay for the next call, and begin as zeros."""
        code = self.functions[function]
        block = code.block_specializations[code.opset]
        values: dict[str, Any] = {}
        for item in code.inputs:
            _, shape = self._shape(item.type)
            if item.type.HasField("stateType"):
                self.states.setdefault(item.name, torch.zeros(shape, dtype=torch.float64))
                values[item.name] = item.name
                continue
            values[item.name] = _tensor(np.asarray(inputs[item.name]))
            if [*values[item.name].shape] != shape:
                raise ValueError(f"{item.name} is {values[item.name].shape}, declared {shape}")
        for op in block.operations:
            self._step(op, values)
        return {name: values[name].numpy() for name in block.outputs}

    def _step(self, op: Any, values: dict[str, Any]) -> None:
        arguments: dict[str, Any] = {}
        for name, bound in op.inputs.items():
            several = [
                values[b.name] if b.HasField("name") else self.constant(b.value)
                for b in bound.arguments
            ]
            arguments[name] = several if name == "values" else several[0]
        if op.type == "const" or op.type.startswith("constexpr"):
            fixed = {n: self.constant(v) for n, v in op.attributes.items() if n != "name"}
            fixed |= arguments
            results = [fixed["val"] if op.type == "const" else CONSTANTS[op.type](**fixed)]
        elif op.type == "read_state":
            results = [self.states[arguments["input"]]]
        elif op.type == "write_state":
            self.states[arguments["input"]] = arguments["data"]
            return
        else:
            given = OPERATIONS[op.type](**arguments)
            results = [*given] if isinstance(given, list | tuple) else [given]
        for output, result in zip(op.outputs, results, strict=True):
            data_type, shape = self._shape(output.type)
            if data_type != STRING and [*result.shape] != shape:
                raise ValueError(f"{op.type} {output.name}: {[*result.shape]}, declared {shape}")
            values[output.name] = result


def _tensor(array: np.ndarray) -> Tensor:
    kind = np.float64 if array.dtype.kind == "f" else np.int64
    return torch.from_numpy(np.ascontiguousarray(array.astype(kind)).reshape(array.shape))


def _list(values: Tensor) -> list[int]:
    return [int(value) for value in values.reshape(-1)]


def _blocks(x: Tensor, shape: torch.Size) -> Tensor:
    """Each value repeated over its block."""
    for axis, size in enumerate(shape):
        x = x.repeat_interleave(size // x.shape[axis], axis)
    return x


def _shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """scale * (data - offset)."""
    shifted = data.double() if offset is None else data - _blocks(offset, data.shape)
    return _blocks(scale, data.shape) * shifted


def _look_up(indices: Tensor, lut: Tensor) -> Tensor:
    """lut [*blocks, entries, 1]: each index is of its block's table."""
    entries = lut.shape[-2]
    whole = [size // n for size, n in zip(indices.shape, lut.shape[:-2], strict=True)]
    place = torch.zeros(indices.shape, dtype=torch.int64)
    for axis, (size, each) in enumerate(zip(indices.shape, whole, strict=True)):
        along = (torch.arange(size) // each).reshape(
            [-1 if a == axis else 1 for a in range(indices.ndim)]
        )
        place = place * lut.shape[axis] + along
    return lut.reshape(-1)[place * entries + indices]


CONSTANTS: dict[str, Callable[..., Tensor]] = {
    "constexpr_blockwise_shift_scale": _shift_scale,
    "constexpr_lut_to_dense": _look_up,
}


def _conv(
    x: Tensor, weight: Tensor, strides: Tensor, pad_type: str, dilations: Tensor, groups: Tensor,
    bias: Tensor | None = None, pad: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """pad: before and after, axis by axis from the first spatial one."""
    if pad_type == "custom" and pad is not None:
        top, bottom, left, right = _list(pad)
        x = F.pad(x, (left, right, top, bottom))
    elif pad_type != "valid":
        raise ValueError(f"padding {pad_type}")
    return F.conv2d(x, weight, bias, _list(strides), 0, _list(dilations), int(groups))


def _average(x: Tensor, kernel_sizes: Tensor, strides: Tensor, pad_type: str, **_: Any) -> Tensor:
    if pad_type != "valid":
        raise ValueError(f"padding {pad_type}")
    return F.avg_pool2d(x, _list(kernel_sizes), _list(strides))


def _gelu(x: Tensor, mode: str) -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode])


def _matmul(x: Tensor, y: Tensor, transpose_x: Tensor, transpose_y: Tensor) -> Tensor:
    return (x.mT if bool(transpose_x) else x) @ (y.mT if bool(transpose_y) else y)


def _reduced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, axes, keep_dims: function(x, _list(axes), bool(keep_dims))


def _split(
    x: Tensor, axis: Tensor, num_splits: Tensor | None = None, split_sizes: Tensor | None = None
) -> list[Tensor]:
    sizes = None if split_sizes is None else _list(split_sizes)
    if sizes is None and num_splits is not None:
        sizes = [x.shape[int(axis)] // int(num_splits)] * int(num_splits)
    return [*torch.split(x, sizes, int(axis))]


def _where(x: Tensor, begin: Tensor, end: Tensor, **masks: Tensor) -> tuple[slice, ...]:
    from_start, to_end = masks.get("begin_mask"), masks.get("end_mask")
    if "squeeze_mask" in masks and bool(masks["squeeze_mask"].any()):
        raise ValueError("squeezed axes")
    steps = _list(masks["stride"]) if "stride" in masks else [1] * x.ndim
    return tuple(
        slice(
            None if from_start is not None and bool(from_start[axis]) else first,
            None if to_end is not None and bool(to_end[axis]) else last,
            step,
        )
        for axis, (first, last, step) in enumerate(
            zip(_list(begin), _list(end), steps, strict=True)
        )
    )


def _updated(x: Tensor, update: Tensor, begin: Tensor, end: Tensor, **masks: Tensor) -> Tensor:
    y = x.clone()
    y[_where(x, begin, end, **masks)] = update
    return y


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
    scores = query @ key.mT / query.shape[-1] ** 0.5 + attn_mask
    return torch.softmax(scores, -1) @ value


def _squeezed(x: Tensor, axes: Tensor) -> Tensor:
    return x.reshape(
        [n for i, n in enumerate(x.shape) if i not in {a % x.ndim for a in _list(axes)}]
    )


def _cast(x: Tensor, dtype: str) -> Tensor:
    return x.double() if dtype.startswith("fp") else x.long()


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "maximum": lambda x, y: torch.maximum(x, y),
    "abs": lambda x: x.abs(),
    "exp": lambda x: x.exp(),
    "sqrt": lambda x: x.sqrt(),
    "relu": lambda x: x.clamp(min=0),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "sigmoid_hard": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "gelu": _gelu,
    "rsqrt": lambda x, epsilon: 1 / torch.sqrt(x + epsilon),
    "inverse": lambda x, epsilon: 1 / (x + epsilon),
    "softmax": lambda x, axis: torch.softmax(x, int(axis)),
    "reduce_mean": _reduced(lambda x, axes, keep: x.mean(axes, keep)),
    "reduce_sum": _reduced(lambda x, axes, keep: x.sum(axes, keep)),
    "reduce_max": _reduced(lambda x, axes, keep: x.amax(axes, keep)),
    "reduce_argmax": lambda x, axis, keep_dims, **_: x.argmax(int(axis), bool(keep_dims)),
    "matmul": _matmul,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "conv": _conv,
    "avg_pool": _average,
    "scaled_dot_product_attention": _attention,
    "identity": lambda x: x,
    "cast": _cast,
    "reshape": lambda x, shape: x.reshape(_list(shape)),
    "transpose": lambda x, perm: x.permute(_list(perm)),
    "squeeze": _squeezed,
    "expand_dims": lambda x, axes: x.reshape(np.expand_dims(np.empty(x.shape), _list(axes)).shape),
    "concat": lambda values, axis, interleave: torch.cat([*values], int(axis)),
    "split": _split,
    "tile": lambda x, reps: x.repeat(_list(reps)),
    "slice_by_index": lambda x, begin, end, **masks: x[_where(x, begin, end, **masks)],
    "slice_update": _updated,
}  # fmt: skip
