"""Runs a saved .mlpackage on any machine: inputs by name -> outputs by name, as declared.

It reads what Core ML would read (protobuf and weight file) and computes in float32. "declared"
rounds every result to the dtype the program declares, "fp32" leaves float16 out. Every result is
held against its declared shape and dtype. What it is not: bit-exact to a device, or a compiler.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlx_vlm_edge.errors import UsageError

from ..names import MAIN
from ..package.blob import NUMPY
from ..package.interface import is_state
from ..package.malformed import reading
from ..package.saved import FLOATS, Saved, Type, type_of
from .constants import DECOMPRESS
from .operations import MOVES, OPERATIONS
from .operations.layout import updated
from .rounding import to_half

Mode = Literal["declared", "fp32"]
State = dict[str, np.ndarray]
RGB, BGR = 20, 30  # FeatureTypes_pb2.ImageFeatureType.ColorSpace
_LISTS = {"concat": "values", "stack": "values"}  # inputs that are several values
# Operations whose float result need not have the dtype of their float inputs.
_STATES = frozenset({"read_state", "slice_update"})
_FREE = frozenset({"cast", "fill", "shape", "range_1d", "select", "gather"})


class Package:
    """One package. track: keep the largest |x| of every operation's output, in `ranges`.

    Raises UsageError where the package is damaged or has an operation that is not known.
    """

    def __init__(self, path: Path, mode: Mode = "declared", track: bool = False) -> None:
        self.mode, self.track = mode, track
        self.ranges: dict[str, float] = {}  # by operation, over all runs, inf and NaN kept
        self.summed: dict[str, float] = {}  # of a mean, how many values it is of
        self._saved = Saved(Path(path))
        self.functions = tuple(self._saved.functions)
        self._constants: dict[Any, Any] = {}

    @property
    def spec(self) -> Any:
        """The model's protobuf message."""
        return self._saved.spec

    def _function(self, name: str) -> Any:
        if name not in self.functions:
            raise UsageError(
                f"{self._saved.name} has no function {name!r}, only {', '.join(self.functions)}"
            )
        return self._saved.functions[name]

    def inputs(self, function: str = MAIN) -> dict[str, Type]:
        """What a function takes, its states left out."""
        declared = self._function(function).inputs
        return {i.name: type_of(i.type) for i in declared if not is_state(i)}

    def new_state(self, function: str = MAIN) -> State:
        """Zeros for every state of a function; functions with the same states can share it."""
        kinds = {i.name: type_of(i.type) for i in self._function(function).inputs if is_state(i)}
        return {
            name: np.zeros([size or 0 for size in kind.shape], np.float32)
            for name, kind in kinds.items()
        }

    def read(self, state: State, name: str) -> np.ndarray:
        """What a state holds under a name."""
        return state[name]

    def write(self, state: State, name: str, values: np.ndarray) -> None:
        """Put values at the start of a state, along each of its axes."""
        state[name][tuple(map(slice, values.shape))] = values

    def run(
        self,
        function: str = MAIN,
        inputs: Mapping[str, np.ndarray] | None = None,
        state: State | None = None,
    ) -> dict[str, np.ndarray]:
        """Outputs by name; `state` is updated in place (without one the states start at zero).

        A picture is an array [1, 3, H, W] of 0..255, red first. Raises UsageError for wrong inputs.
        """
        declared = self._function(function)
        with reading(self._saved.name), np.errstate(all="ignore"):
            block = declared.block_specializations[declared.opset]
            frame = _Frame(self, self.new_state(function) if state is None else state)
            frame.values.update(self._entered(function, inputs or {}))
            for item in declared.inputs:
                if is_state(item):
                    self._check_state(item, frame.state)
                    frame.types[item.name] = type_of(item.type)
            frame.types.update(self.inputs(function))
            last = _last_uses(block)
            replacing = _replacing(block, last)
            for index, op in enumerate(block.operations):
                frame.replaces = index in replacing
                frame.step(op)
                for name in last.get(index, ()):
                    frame.values.pop(name, None)
            return {
                name: self._leaving(frame.values[name], frame.types[name]) for name in block.outputs
            }

    def _entered(self, function: str, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        kinds = self.inputs(function)
        if unlike := kinds.keys() ^ inputs.keys():
            raise UsageError(f"{self._saved.name}, {function}: input {min(unlike)!r} is unmatched")
        entered = {}
        for name, kind in kinds.items():
            array = np.asarray(inputs[name])
            if not kind.fits(array.shape) or not self._allowed(function, name, array.shape):
                raise UsageError(
                    f"{self._saved.name}, {function}: input {name!r} is {array.shape}, "
                    f"declared {kind.shape}"
                )
            if kind.dtype not in FLOATS and array.dtype.kind == "f":
                raise UsageError(f"{self._saved.name}, {function}: input {name!r} takes integers")
            entered[name] = self.stored(self._coloured(function, name, array), kind.dtype)
        return entered

    def _described(self, function: str, name: str) -> Any:
        """What the model's description says of an input beside its program; None for nothing."""
        described = self.spec.description
        several = {f.name: f for f in described.functions}
        features = several.get(function, described).input
        return next((feature.type for feature in features if feature.name == name), None)

    def _coloured(self, function: str, name: str, array: np.ndarray) -> np.ndarray:
        """A picture's channels, which come as RGB, in the order that the package asks for."""
        described = self._described(function, name)
        if described is None or described.WhichOneof("Type") != "imageType":
            return array
        picture = described.imageType
        size = (picture.height, picture.width)
        if picture.colorSpace not in (RGB, BGR) or size != array.shape[2:]:
            raise UsageError(
                f"{self._saved.name}, {function}: input {name!r} is no colour picture of its size"
            )
        return array if picture.colorSpace == RGB else array[:, ::-1]

    def _allowed(self, function: str, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the description's list or ranges of shapes, if it has any, hold this one."""
        described = self._described(function, name)
        if described is None or described.WhichOneof("Type") != "multiArrayType":
            return True
        array = described.multiArrayType
        kind = array.WhichOneof("ShapeFlexibility")
        if kind == "enumeratedShapes":
            return shape in {tuple(s.shape) for s in array.enumeratedShapes.shapes}
        return kind != "shapeRange" or all(
            r.lowerBound <= size and (r.upperBound < 0 or size <= r.upperBound)
            for r, size in zip(array.shapeRange.sizeRanges, shape, strict=True)
        )

    def _check_state(self, item: Any, state: State) -> None:
        if item.name not in state or not type_of(item.type).fits(state[item.name].shape):
            raise UsageError(f"{self._saved.name}: the state {item.name!r} is missing or misshapen")

    def stored(self, array: np.ndarray, dtype: str) -> np.ndarray:
        """As a dtype keeps it; float16 as float32 with float16's values."""
        if dtype == "fp16" and self.mode == "declared":
            return to_half(array.astype(np.float32, copy=False))
        return array.astype(np.float32 if dtype in FLOATS else NUMPY[dtype], copy=False)

    def _leaving(self, array: np.ndarray, kind: Type) -> np.ndarray:
        half = kind.dtype == "fp16" and self.mode == "declared"
        return np.array(
            array, np.float16 if half else None, order="C"
        )  # a state may go on to change

    def constant(self, value: Any) -> Any:
        """A constant as operations take it; from the weight file only once."""
        if value.WhichOneof("value") != "blobFileValue":
            return _wide(self._saved.value(value))
        key = (value.blobFileValue.fileName, value.blobFileValue.offset)
        if key not in self._constants:
            self._constants[key] = _wide(self._saved.value(value))
        return self._constants[key]

    def decompressed(self, op: Any, results: Mapping[str, Any]) -> np.ndarray:
        """What a constexpr operation holds; functions that share its data share the result."""
        values = {name: value for name, value in op.attributes.items() if name != "name"}
        values |= {
            name: a.arguments[0].value for name, a in op.inputs.items() if name not in results
        }
        stored = tuple(
            (n, v.blobFileValue.offset) for n, v in sorted(values.items()) if _in_file(v)
        )
        key = (op.type, stored, *sorted((n, id(v)) for n, v in results.items()))
        if not stored or key not in self._constants:
            whole = DECOMPRESS[op.type](
                **{n: self._saved.value(v) for n, v in values.items()}, **results
            )
            dtype, own = type_of(op.outputs[0].type).dtype, whole.dtype == np.float32
            if own and dtype == "fp16" and self.mode == "declared" and whole.flags.c_contiguous:
                dense = to_half(whole, whole)  # of which there may be half a gigabyte
            else:
                dense = self.stored(whole, dtype)
            if not stored:
                return dense
            self._constants[key] = dense
        return self._constants[key]

    def error(self, op: Any, what: str) -> UsageError:
        name = op.outputs[0].name if op.outputs else op.attributes["name"]
        return UsageError(f"{self._saved.name}: {op.type} {name!r}: {what}")


class _Frame:
    """The values of one run."""

    def __init__(self, package: Package, state: State) -> None:
        self.package, self.state = package, state
        self.values: dict[str, Any] = {}
        self.types: dict[str, Type] = {}
        self.replaces = False  # the operation at hand makes the state of what it was read as

    def step(self, op: Any) -> None:
        """Run one operation and check what it gives against what it declares."""
        try:
            results = self._results(op)
        except (ValueError, IndexError, TypeError, KeyError) as error:
            raise self.package.error(op, f"cannot be run ({error})") from error
        if len(results) != len(op.outputs):
            raise self.package.error(op, f"gives {len(results)} results, not {len(op.outputs)}")
        for output, result in zip(op.outputs, results, strict=True):
            self._keep(op, output, result)

    def _results(self, op: Any) -> list[Any]:
        if op.type == "const":
            return [self.package.constant(op.attributes["val"])]
        if op.type in DECOMPRESS:
            results = {n: self._argument(a.arguments[0]) for n, a in op.inputs.items() if _named(a)}
            return [self.package.decompressed(op, results)]
        if op.type == "read_state":
            return [self.state[_state_name(op)]]
        if op.type == "write_state":
            name = _state_name(op)
            new = self._argument(op.inputs["data"].arguments[0])
            if new.shape != self.state[name].shape:
                raise ValueError(f"{new.shape} for a state of {self.state[name].shape}")
            given, kept = self._given_type(op, "data"), self.types[name].dtype
            self.state[name] = new if given == kept else self.package.stored(new, kept)
            return []
        if op.type not in OPERATIONS:
            raise self.package.error(op, "the interpreter does not know this operation")
        inputs = self._inputs(op)
        if self.replaces and self._alone(inputs["x"]):
            return [updated(**inputs)]  # of megabytes, some positions
        result = OPERATIONS[op.type](**inputs)
        return result if isinstance(result, list) else [result]

    def _alone(self, array: np.ndarray) -> bool:
        """Whether no other value is in an array's memory than a state of its own and itself."""
        others = [*self.values.values(), *self.state.values()]
        sharing = (
            isinstance(other, np.ndarray) and np.may_share_memory(other, array) for other in others
        )
        return bool(array.flags.writeable) and sum(sharing) == 2

    def _given_type(self, op: Any, argument: str) -> str | None:
        """The declared dtype of an argument that is a result."""
        name = op.inputs[argument].arguments[0].name
        return self.types[name].dtype if name in self.types else None

    def _inputs(self, op: Any) -> dict[str, Any]:
        inputs = {}
        for name, argument in op.inputs.items():
            values = [self._argument(binding) for binding in argument.arguments]
            inputs[name] = values if _LISTS.get(op.type) == name else values[0]
        return inputs

    def _argument(self, binding: Any) -> Any:
        if binding.WhichOneof("binding") == "name":
            return self.values[binding.name]
        return self.package.constant(binding.value)

    def _keep(self, op: Any, output: Any, result: Any) -> None:
        kind = type_of(output.type)
        self.types[output.name] = kind
        if kind.dtype == "string":
            self.values[output.name] = result
            return
        result = np.asarray(result)
        if not kind.fits(result.shape):
            raise self.package.error(op, f"gives {result.shape}, declared {kind.shape}")
        self._check_dtype(op, kind, result)
        if op.type == "const" or op.type in DECOMPRESS:
            self.values[output.name] = result
            return
        read = op.type == "read_state" and self.types[_state_name(op)].dtype == kind.dtype
        moved = read or (op.type in MOVES and self._same_float(op, kind))
        result = result if moved else self.package.stored(result, kind.dtype)
        self.values[output.name] = result
        whole = op.type in _STATES  # whose new values have a name of their own
        if self.package.track and result.dtype.kind == "f" and result.size and not whole:
            before = self.package.ranges.get(output.name, 0.0)
            self.package.ranges[output.name] = _larger(before, result)
            if op.type == "reduce_mean":
                values = self._argument(op.inputs["x"].arguments[0])
                self.package.summed[output.name] = values.size / result.size

    def _float_dtypes(self, op: Any) -> set[str]:
        """Of an operation's inputs that are results."""
        names = [b.name for a in op.inputs.values() for b in a.arguments if b.name]
        dtypes = {self.types[name].dtype for name in names if name in self.types}
        return dtypes & set(FLOATS)

    def _same_float(self, op: Any, kind: Type) -> bool:
        return self._float_dtypes(op) <= {kind.dtype}

    def _check_dtype(self, op: Any, kind: Type, result: np.ndarray) -> None:
        is_float = kind.dtype in FLOATS
        if is_float != (result.dtype.kind == "f") and op.type not in _FREE:
            raise self.package.error(op, f"gives {result.dtype}, declared {kind.dtype}")
        if is_float and op.type not in _FREE and op.type not in DECOMPRESS:
            taken = self._float_dtypes(op)
            if taken and taken != {kind.dtype}:
                raise self.package.error(
                    op, f"takes {' and '.join(sorted(taken))}, declared {kind.dtype}"
                )


def _in_file(value: Any) -> bool:
    return bool(value.WhichOneof("value") == "blobFileValue")


def _named(argument: Any) -> bool:
    return bool(argument.arguments[0].WhichOneof("binding") == "name")


def _state_name(op: Any) -> str:
    return str(op.inputs["input"].arguments[0].name)


def _wide(value: Any) -> Any:
    half = isinstance(value, np.ndarray) and value.dtype == np.float16
    return value.astype(np.float32) if half else value


def _larger(before: float, x: np.ndarray) -> float:
    size = max(float(x.max()), -float(x.min()))
    return size if np.isnan(size) else max(before, size)


def _uses(op: Any) -> Iterator[str]:
    for argument in op.inputs.values():
        for binding in argument.arguments:
            if binding.WhichOneof("binding") == "name":
                yield binding.name


def _replacing(block: Any, last: Mapping[int, Sequence[str]]) -> set[int]:
    """Updates of what was read from a state, by their index, when the state is written with them
    before it is read again and nobody needs what it was."""
    states: dict[str, str] = {}  # by what was read of them
    pending: dict[str, tuple[int, str]] = {}  # by state, an update and its name
    places: set[int] = set()
    for index, op in enumerate(block.operations):
        if op.type == "read_state":
            states[op.outputs[0].name] = _state_name(op)
            pending.pop(_state_name(op), None)
        elif op.type == "write_state":
            update = pending.pop(_state_name(op), None)
            if update is not None and op.inputs["data"].arguments[0].name == update[1]:
                places.add(update[0])
        elif op.type == "slice_update":
            read = op.inputs["x"].arguments[0].name
            if read in states and read in last.get(index, ()):
                pending[states[read]] = (index, op.outputs[0].name)
    return places


def _last_uses(block: Any) -> dict[int, list[str]]:
    """Which values nobody needs after an operation, by its index."""
    last = {name: index for index, op in enumerate(block.operations) for name in _uses(op)}
    done: dict[int, list[str]] = {}
    for name, index in last.items():
        if name not in block.outputs:
            done.setdefault(index, []).append(name)
    return done
