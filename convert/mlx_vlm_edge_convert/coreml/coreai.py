"""A Core ML (MIL) program -> a Core AI asset (`.aimodel`), operation by operation. Experimental.

Core AI is Apple's next format (macOS and iOS 27). The vision tower's program has about a dozen
kinds of operations, so it is translated from the MIL program rather than emitted a second time.
Anything without a translation raises. Source of the operations: coreai-core 1.0.0b3.
"""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from mlx_vlm_edge.errors import UsageError

from .check.verify import judge
from .emit.network import Network
from .names import MAIN
from .parity import Parity, distance
from .part import Say
from .parts.vision import GRAPH, HALF, Tower, VisionPart

Operation = Any  # of coremltools' MIL
Tensor = Any  # a Value of coreai.authoring


def authoring() -> Any:
    """Core AI's builder of programs. Raises UsageError without it."""
    try:
        return import_module("coreai.authoring")
    except ImportError:
        raise UsageError(
            "Core AI export needs coreai-core: pip install coremltools coreai-core==1.0.0b3 "
            "(macOS, or Linux with glibc 2.34 or newer)"
        ) from None


def _indices(values: Any) -> np.ndarray:
    return np.asarray(values, np.int32)


class _Translation:
    """One function's operations, translated in order; `values` holds what each gave."""

    def __init__(self, dtype: type[np.floating[Any]]) -> None:
        self.ca = authoring()
        self.dtype = dtype
        self.values: dict[str, Tensor] = {}

    def get(self, operation: Operation, name: str) -> Tensor:
        """An input: what an earlier operation gave, or a constant in the program's dtype."""
        return self.value(operation.inputs[name])

    def value(self, variable: Any) -> Tensor:
        """What a variable of the MIL program holds."""
        if variable.name in self.values:
            return self.values[variable.name]
        value = np.asarray(variable.val)
        return value.astype(self.dtype) if value.dtype.kind == "f" else value

    def counts(self, operation: Operation, name: str) -> np.ndarray:
        """A parameter that holds sizes."""
        return np.asarray(operation.inputs[name].val, np.uint32)

    def run(self, operation: Operation) -> None:
        results = _translation_of(operation)(self, operation)
        several = results if isinstance(results, list) else [results]
        for variable, value in zip(operation.outputs, several, strict=True):
            self.values[variable.name] = value


def _conv(t: _Translation, operation: Operation) -> Tensor:
    inputs = operation.inputs
    x, pads = t.get(operation, "x"), [0, 0, 0, 0]
    if inputs["pad_type"].val == "custom":
        pads = [int(pad) for pad in inputs["pad"].val]
    elif inputs["pad_type"].val != "valid":
        raise UsageError(f"Core AI export: padding {inputs['pad_type'].val!r} is not translated")
    if any(pads):
        x = t.ca.pad(x, np.array([0, 0, 0, 0, *pads], np.uint32), t.dtype(0))
    strides, dilations = t.counts(operation, "strides"), t.counts(operation, "dilations")
    weight, groups = t.get(operation, "weight"), np.uint32(inputs["groups"].val)
    y = t.ca.conv2d(x, weight, strides, dilations, groups)
    if inputs.get("bias") is None:
        return y
    return t.ca.broadcasting_add(y, t.get(operation, "bias").reshape(1, -1, 1, 1))


def _avg_pool(t: _Translation, operation: Operation) -> Tensor:
    inputs = operation.inputs
    kernel, strides = t.counts(operation, "kernel_sizes"), t.counts(operation, "strides")
    if inputs["pad_type"].val != "valid":
        raise UsageError("Core AI export: a padded average pool is not translated")
    x = t.get(operation, "x")
    if tuple(kernel) == tuple(inputs["x"].shape[2:]):
        return t.ca.reduce_mean(x, _indices([2, 3]))
    # sumpool2d of coreai-core 1.0.0b3 takes no constant for its dilations: a convolution does.
    channels = inputs["x"].shape[1]
    mean = np.full((channels, 1, *kernel), 1 / int(np.prod(kernel)), t.dtype)
    return t.ca.conv2d(x, mean, strides, np.ones(2, np.uint32), np.uint32(channels))


def _transposed(t: _Translation, operation: Operation, name: str) -> Tensor:
    x, flag = t.get(operation, name), operation.inputs.get(f"transpose_{name}")
    if flag is None or not flag.val:
        return x
    rank = len(operation.inputs[name].shape)
    return t.ca.transpose(x, np.array([*range(rank - 2), rank - 1, rank - 2], np.uint32))


def _matmul(t: _Translation, operation: Operation) -> Tensor:
    x, y = _transposed(t, operation, "x"), _transposed(t, operation, "y")
    return t.ca.broadcasting_batch_matmul(x, y)


def _gelu(t: _Translation, operation: Operation) -> Tensor:
    names = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}
    x, mode = t.get(operation, "x"), operation.inputs["mode"].val
    if mode == "SIGMOID_APPROXIMATION":
        gate = t.ca.sigmoid(t.ca.broadcasting_mul(x, t.dtype(1.702)))
        return t.ca.broadcasting_mul(x, gate)
    if mode not in names:
        raise UsageError(f"Core AI export: GELU mode {mode!r} is not translated")
    return t.ca.gelu(x, approximate=names[mode])


def _reduce_mean(t: _Translation, operation: Operation) -> Tensor:
    axes = _indices(operation.inputs["axes"].val)
    mean = t.ca.reduce_mean(t.get(operation, "x"), axes)
    return mean if operation.inputs["keep_dims"].val else _reshaped(t, operation, mean)


def _rsqrt(t: _Translation, operation: Operation) -> Tensor:
    epsilon = t.dtype(operation.inputs["epsilon"].val)
    return t.ca.rsqrt(t.ca.broadcasting_add(t.get(operation, "x"), epsilon))


def _reshaped(t: _Translation, operation: Operation, x: Tensor) -> Tensor:
    return t.ca.reshape(x, np.array(operation.outputs[0].shape, np.uint32))


def _same_values(t: _Translation, operation: Operation) -> Tensor:
    """reshape, squeeze, expand_dims: the same values under the declared shape."""
    return _reshaped(t, operation, t.get(operation, "x"))


def _transpose(t: _Translation, operation: Operation) -> Tensor:
    order = np.array(operation.inputs["perm"].val, np.int64)
    return t.ca.transpose(t.get(operation, "x"), (order % len(order)).astype(np.uint32))


def _split(t: _Translation, operation: Operation) -> list[Tensor]:
    axis = int(operation.inputs["axis"].val)
    sizes = np.array([variable.shape[axis] for variable in operation.outputs], np.uint32)
    parts: list[Tensor] = t.ca.split(t.get(operation, "x"), sizes, np.int32(axis))
    return parts


def _concat(t: _Translation, operation: Operation) -> Tensor:
    axis = np.int32(operation.inputs["axis"].val)
    return t.ca.concat(axis, [t.value(variable) for variable in operation.inputs["values"]])


def _sigmoid_hard(t: _Translation, operation: Operation) -> Tensor:
    """min(max(alpha x + beta, 0), 1)"""
    alpha, beta = (t.dtype(operation.inputs[name].val) for name in ("alpha", "beta"))
    y = t.ca.broadcasting_add(t.ca.broadcasting_mul(t.get(operation, "x"), alpha), beta)
    return t.ca.broadcasting_minimum(t.ca.relu(y), t.dtype(1))


def _slice(t: _Translation, operation: Operation) -> Tensor:
    inputs = operation.inputs
    masks = ("begin_mask", "end_mask", "squeeze_mask")
    if any(inputs.get(mask) is not None and np.any(inputs[mask].val) for mask in masks):
        raise UsageError(f"Core AI export: a slice with masks is not translated ({operation.name})")
    begin, end = (np.asarray(inputs[name].val, np.int32) for name in ("begin", "end"))
    stride = inputs.get("stride")
    steps = np.ones_like(begin) if stride is None else np.asarray(stride.val, np.int32)
    return t.ca.slice_(t.get(operation, "x"), begin, end, steps)


def _softmax(t: _Translation, operation: Operation) -> Tensor:
    return t.ca.softmax(t.get(operation, "x"), np.int32(operation.inputs["axis"].val))


def _one(name: str) -> Callable[[_Translation, Operation], Tensor]:
    return lambda t, operation: getattr(t.ca, name)(t.get(operation, "x"))


def _two(name: str) -> Callable[[_Translation, Operation], Tensor]:
    return lambda t, operation: getattr(t.ca, name)(t.get(operation, "x"), t.get(operation, "y"))


_TRANSLATIONS: Mapping[str, Callable[[_Translation, Operation], Any]] = {
    "add": _two("broadcasting_add"),
    "avg_pool": _avg_pool,
    "concat": _concat,
    "conv": _conv,
    "expand_dims": _same_values,
    "gelu": _gelu,
    "matmul": _matmul,
    "mul": _two("broadcasting_mul"),
    "real_div": _two("broadcasting_divide"),
    "reduce_mean": _reduce_mean,
    "relu": _one("relu"),
    "reshape": _same_values,
    "rsqrt": _rsqrt,
    "sigmoid": _one("sigmoid"),
    "sigmoid_hard": _sigmoid_hard,
    "slice_by_index": _slice,
    "softmax": _softmax,
    "split": _split,
    "squeeze": _same_values,
    "sub": _two("broadcasting_sub"),
    "transpose": _transpose,
}


def refuse_untranslated(part: VisionPart) -> None:
    """Raises UsageError for a tower with an operation that has no translation, before any work."""
    for operation in part.segment.emit(Network(half=False)).functions[MAIN].operations:
        if operation.op_type != "const":
            _translation_of(operation)


def _translation_of(operation: Operation) -> Callable[[_Translation, Operation], Any]:
    if translate := _TRANSLATIONS.get(operation.op_type):
        return translate
    raise UsageError(
        f"Core AI export: no translation of the operation {operation.op_type!r} "
        f"({operation.name}): export this part with --format mlpackage"
    )


def save_asset(program: Any, path: Path, dtype: type[np.floating[Any]] = np.float32) -> None:
    """Translate the `main` function of a MIL program and write it to `path` (`*.aimodel`).

    Weights, activations, inputs and outputs are of `dtype`. Raises UsageError when coreai-core is
    missing and for an operation that has no translation.
    """
    ca = authoring()
    translation, function = _Translation(dtype), program.functions[MAIN]
    names, outputs = list(function.inputs), list(function.outputs)

    def body(*tensors: Tensor) -> Tensor:
        translation.values.update(zip(names, tensors, strict=True))
        for operation in function.operations:
            if operation.op_type != "const":
                translation.run(operation)
        results = tuple(translation.values[variable.name] for variable in outputs)
        return results[0] if len(results) == 1 else results

    def tensor(shape: Sequence[int], name: str) -> Any:
        return Annotated[ca.Value, ca.TensorType(tuple(shape), dtype, name=name)]

    module = ca.Module.create()
    with module:
        ca.graph(
            _signed(
                body,
                {name: tensor(function.inputs[name].shape, name) for name in names},
                [tensor(variable.shape, variable.name) for variable in outputs],
            )
        )
    ca.AIProgram(module).save_asset(path)


def _signed(body: Callable[..., Any], inputs: Mapping[str, Any], outputs: list[Any]) -> Any:
    """`body` under the name `main`, with the parameters and annotations that Core AI reads."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=a) for name, a in inputs.items()]
    result = outputs[0] if len(outputs) == 1 else tuple[tuple(outputs)]  # type: ignore[misc]

    def main(*tensors: Tensor) -> Any:
        return body(*tensors)

    main.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    main.__annotations__ = {**inputs, "return": result}
    return main


def predict(path: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run an asset's `main` with Core AI's own runtime (on Linux: its CPU interpreter)."""
    ca = authoring()
    runtime = import_module("coreai.runtime")

    async def run() -> dict[str, np.ndarray]:
        async with ca.AIModelAsset.load(path).executable() as model:
            arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
            results = await model.load_function(MAIN)(
                {name: runtime.NDArray(array) for name, array in arrays.items()}
            )
            return {name: result.numpy() for name, result in results.items()}

    return asyncio.run(run())


def write_asset(part: VisionPart, path: Path, verify: bool, say: Say) -> dict[str, Any]:
    """The program of a vision part as an asset that takes a tensor; what the manifest says of it.

    verify: run it on the part's first picture and compare with the MLX model.
    Raises UsageError for islands of float32, and when the asset is not what MLX computes.
    """
    if not isinstance(part.segment, Tower):
        raise TypeError("only a vision tower's program is translated")
    if part.islands:
        raise UsageError("Core AI export takes one precision: use --precision fp32")
    half = part.options.precision != "fp32"
    tensor_input = replace(part.options, image_input=False)
    tower = Tower(part.segment.encoder, tensor_input)
    split_heads = part.options.compute == "cpu-ne"
    program = tower.emit(Network(half, part.powers, split_heads))
    say(f"{part.name}: translating {path.name} (Core AI, experimental)")
    save_asset(program, path, np.float16 if half else np.float32)
    entry: dict[str, Any] = {
        "package": path.name,
        "minimum_os": {"ios": "27.0", "macos": "27.0"},
        "parity": None,
    }
    if verify:
        say("  running it with Core AI's runtime, which takes minutes for large pictures on Linux")
        entry["parity"] = [_compared(part, tower, path, half, say)]
    return entry


def _compared(part: VisionPart, tower: Tower, path: Path, half: bool, say: Say) -> dict[str, Any]:
    case, limit = part.cases[0], HALF if half else GRAPH
    dtype = np.float16 if half else np.float32
    inputs = {name: array.astype(dtype) for name, array in tower.inputs(case, half).items()}
    outputs = predict(path, inputs)
    worst = max(distance(outputs[name], case.reference[name]) for name in outputs)
    judge("the Core AI asset", [Parity(part.name, f"{case.name} (Core AI)", worst, limit)], say)
    return {"inputs": case.name, "error": worst, "limit": limit}
