"""Rules for the Neural Engine that can be checked on a saved package, without a Mac.

They are what Apple's coreai-models (skills/model-authoring/references/neural_engine_rules.md),
ml-ane-transformers and users of the Neural Engine have written down. A package without findings is
lint-clean, which does not say where Core ML will run it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..package.interface import blocks, is_state
from ..package.saved import FLOATS, Saved, Type, type_of

NARROW = 32  # elements of the last axis that fill 64 bytes in float16
LARGE = 1 << 16  # elements from which padding a narrow axis matters
SIDE, CHANNELS, KERNEL = 16384, 65536, 13
STATES, PORTS = 8, 32  # of a function; beyond, passing them costs more than their bytes
PROGRAM_BYTES = 3 << 29  # 1.5 GB compiles, 3.4 GB does not (ANEForge, pull request 45)
SMALLEST_NORMAL = 2.0**-14  # of float16
SOME = 0.01  # of a constant's values
OFF = frozenset({
    "gather", "gather_nd", "gather_along_axis", "scatter", "scatter_nd", "scatter_along_axis",
    "topk", "argsort", "non_zero", "one_hot", "cumsum", "shape", "range_1d", "while_loop", "cond",
    "gru", "lstm", "rnn", "random_normal", "random_uniform", "fill", "band_part", "reduce_prod",
})  # fmt: skip
LAYOUT = ("transpose", "reshape")
ELSEWHERE = frozenset({"float32", "unsupported-operation", "integer-compute", "dynamic-shape"})


@dataclass(frozen=True)
class Finding:
    """One operation that breaks a rule, and why the rule is there."""

    rule: str
    function: str
    operation: str
    reason: str


@dataclass(frozen=True)
class _Operation:
    """What the rules look at: the kind, its first output, and what it reads by argument.

    sources: names of what it reads that is no constant. cached: elements of the largest of these
    that is an input of the function.
    """

    kind: str
    name: str
    dtype: str
    shape: tuple[int | None, ...]
    reads: Mapping[str, list[tuple[Type, bool]]]  # its type, and whether it is constant
    sources: frozenset[str] = frozenset()
    cached: int = 0

    @property
    def fixed(self) -> tuple[int, ...]:
        return tuple(-1 if dim is None else dim for dim in self.shape)


Rule = Callable[[_Operation], str | None]


def lint(package: Path) -> list[Finding]:
    """Every finding of every rule, in the order of the program. Raises UsageError if unreadable."""
    findings: list[Finding] = []
    saved = Saved(package)
    for name, function, block in blocks(saved):
        findings += _inputs(name, function)
        findings += _ports(name, function, block)
        findings += _constants(saved, name, block)
        findings += _groups(name, block)
        operations = [*_operations(function, block)]
        for op in operations:
            findings += [
                Finding(rule, name, f"{op.kind} {op.name}", reason)
                for rule, check in RULES.items()
                if (reason := check(op))
            ]
        findings += _crossings(name, operations)
    size = sum(path.stat().st_size for path in package.rglob("*.bin"))
    if size > PROGRAM_BYTES:
        reason = (
            f"{size / 1e9:.1f} GB of weights: programs beyond 1.6 GB are reported to be refused"
        )
        findings.append(Finding("program-size", "-", package.name, reason))
    return findings


def counts(findings: Iterable[Finding]) -> dict[str, int]:
    """How often each rule is broken."""
    return dict(sorted(Counter(finding.rule for finding in findings).items()))


def summary(findings: Iterable[Finding]) -> list[str]:
    """One line per rule: how often, an example, the reason."""
    first: dict[str, Finding] = {}
    listed = [*findings]
    for finding in listed:
        first.setdefault(finding.rule, finding)
    return [
        f"{rule} x{count}: {first[rule].operation}: {first[rule].reason}"
        for rule, count in counts(listed).items()
    ]


def _inputs(name: str, function: Any) -> Iterator[Finding]:
    for value in function.inputs:
        shape = type_of(value.type).shape
        where = f"input {value.name}"
        if None in shape:
            yield Finding("dynamic-shape", name, where, f"{shape}: only fixed shapes can be placed")
        if is_state(value):
            reason = "states are reported to keep a program off it (coremltools #2553)"
            yield Finding("state", name, where, reason)
            if shape and (shape[-1] or 0) % NARROW:
                reason = f"last axis {shape[-1]} is no multiple of 32 (coremltools #2631)"
                yield Finding("state-last-axis", name, where, reason)


def _ports(name: str, function: Any, block: Any) -> Iterator[Finding]:
    """How much goes in and out of a call."""
    states = [value.name for value in function.inputs if is_state(value)]
    if len(states) > STATES:
        reason = f"{len(states)} states: stack them, two are enough for every layer's cache"
        yield Finding("states", name, f"state {states[STATES]}", reason)
    ports = [*(value.name for value in function.inputs), *block.outputs]
    if len(ports) - len(states) > PORTS:
        reason = f"{len(ports) - len(states)} inputs and outputs are passed with every call"
        yield Finding("ports", name, f"port {ports[PORTS]}", reason)


def _groups(name: str, block: Any) -> Iterator[Finding]:
    """Weights of several scales a row."""
    for op in block.operations:
        if op.type != "constexpr_blockwise_shift_scale":
            continue
        scale = type_of(_value_type(op, block, "scale")).shape
        if any(blocks != 1 for blocks in scale[1:]):
            reason = (
                "weights in groups give wrong numbers or are not placed (apple/coreai-models #279, "
                "#205): palettes are its form"
            )
            yield Finding("groups", name, f"constant {op.outputs[0].name}", reason)


def _value_type(op: Any, block: Any, argument: str) -> Any:
    """The type of what a constexpr operation is given, as an attribute, a value or a name."""
    if argument in op.attributes:
        return op.attributes[argument].type
    bound = op.inputs[argument].arguments[0]
    if bound.WhichOneof("binding") == "value":
        return bound.value.type
    made = (out for other in block.operations for out in other.outputs)
    return next(out.type for out in made if out.name == bound.name)


def _crossings(name: str, operations: Iterable[_Operation]) -> Iterator[Finding]:
    """Where a value leaves the Neural Engine or comes back, by what the rules say of its makers."""
    elsewhere: dict[str, bool] = {}
    for op in operations:
        away = any(RULES[rule](op) for rule in ELSEWHERE)
        if any(source in elsewhere and elsewhere[source] != away for source in op.sources):
            reason = "data crosses between it and another unit, each time at the cost of a call"
            yield Finding("crossing", name, f"{op.kind} {op.name}", reason)
        elsewhere |= dict.fromkeys((op.name,), away)


def _constants(saved: Saved, name: str, block: Any) -> Iterator[Finding]:
    """Values of constants that are no numbers to it."""
    for op in block.operations:
        if op.type != "const" or type_of(op.attributes["val"].type).dtype not in FLOATS:
            continue
        values, where = saved.value(op.attributes["val"]), f"const {op.outputs[0].name}"
        if not np.isfinite(values).all():
            reason = "infinities become NaN; a mask takes -1e4"
            yield Finding("infinite-constant", name, where, reason)
        small = np.mean((values != 0) & (np.abs(values) < SMALLEST_NORMAL)) if values.size else 0
        if values.dtype == np.float16 and small > SOME:
            reason = f"{small:.0%} of its values are subnormal in float16: lost if it flushes them"
            yield Finding("subnormal-constant", name, where, reason)


@dataclass
class _Known:
    """What a function's values are: types and whether they are constant, elements of its inputs,
    and the first output of the operation that made one."""

    types: dict[str, tuple[Type, bool]]
    sizes: dict[str, int]
    first: dict[str, str]

    def operation(self, op: Any) -> _Operation:
        """One that computes something."""
        reads = {
            argument: [self.types[b.name] for b in bound.arguments if b.name in self.types]
            for argument, bound in op.inputs.items()
        }
        named = {b.name for bound in op.inputs.values() for b in bound.arguments if b.name}
        made = frozenset(self.first.get(name, name) for name in named if not self.types[name][1])
        cached = max((self.sizes.get(name, 0) for name in named), default=0)
        name = op.outputs[0].name
        declared, _ = self.types[name]
        return _Operation(op.type, name, declared.dtype, declared.shape, reads, made, cached)


def _operations(function: Any, block: Any) -> Iterator[_Operation]:
    """Operations that compute something, with what is known of their inputs."""
    taken = {value.name: type_of(value.type) for value in function.inputs}
    known = _Known(
        {name: (kind, False) for name, kind in taken.items()},
        {name: math.prod(size or 0 for size in kind.shape) for name, kind in taken.items()},
        {},
    )
    for op in block.operations:
        constant = op.type == "const" or op.type.startswith("constexpr")
        for out in op.outputs:
            known.types[out.name] = (type_of(out.type), constant)
            known.first[out.name] = op.outputs[0].name
        if op.outputs and not constant and op.type != "read_state":
            yield known.operation(op)


def _float32(op: _Operation) -> str | None:
    if op.dtype == "fp32" and op.kind != "cast":
        return "float32 is computed by the GPU or the CPU"
    return None


def _off(op: _Operation) -> str | None:
    return "the operation is not one it has" if op.kind in OFF else None


def _integer(op: _Operation) -> str | None:
    if op.dtype in ("int32", "bool") and op.kind != "cast":
        return f"computes in {op.dtype}"
    return None


def _dynamic(op: _Operation) -> str | None:
    return f"{op.shape}: only fixed shapes can be placed" if None in op.shape else None


def _rank(op: _Operation) -> str | None:
    return f"rank {len(op.shape)}; 4 is what it works in" if len(op.shape) > 4 else None


def _size(op: _Operation) -> str | None:
    shape = op.fixed
    if any(dim > SIDE for dim in shape[-2:]) or (len(shape) > 2 and shape[-3] > CHANNELS):
        return f"{shape}: sides up to {SIDE}, channels up to {CHANNELS}"
    return None


def _narrow(op: _Operation) -> str | None:
    shape = op.fixed
    if shape and 0 <= shape[-1] < NARROW and int(np.prod(shape)) >= LARGE:
        return f"last axis {shape[-1]} is padded to {NARROW} (64 bytes)"
    return None


def _single(op: _Operation) -> str | None:
    shape = op.fixed
    if len(shape) > 1 and shape[-1] == 1 and NARROW <= int(np.prod(shape)) < LARGE:
        return f"last axis 1 is padded to {NARROW} (64 bytes): {NARROW} times the traffic"
    return None


def _joined_cache(op: _Operation) -> str | None:
    if op.kind == "concat" and op.cached >= LARGE:
        return f"copies a cache of {op.cached:,} elements with every call: attend to it as it is"
    return None


def _linear(op: _Operation) -> str | None:
    factors = [value for argument in ("x", "y") for value in op.reads.get(argument, [])]
    constant = any(is_constant for _, is_constant in factors)
    if op.kind == "linear" or (op.kind == "matmul" and constant):
        return "a 1x1 convolution is what it is built for"
    return None


def _layout(op: _Operation) -> str | None:
    return "moves data between layouts" if op.kind in LAYOUT else None


def _kernel(op: _Operation) -> str | None:
    weight = op.reads.get("weight")
    if op.kind != "conv" or not weight:
        return None
    sides = [side or 0 for side in weight[0][0].shape[2:]]
    return f"a kernel of {max(sides)}, more than {KERNEL}" if max(sides) > KERNEL else None


def _in_graph_update(op: _Operation) -> str | None:
    if op.kind == "slice_update":
        return "in-graph cache writes; it wants a read-only cache and the host to write"
    return None


def _rotary(op: _Operation) -> str | None:
    return "rotary tables are inputs, not computed" if op.kind in ("cos", "sin") else None


def _fused_attention(op: _Operation) -> str | None:
    if op.kind == "scaled_dot_product_attention":
        return "attention per head by matmuls is what is reported to be placed"
    return None


def _swish(op: _Operation) -> str | None:
    return (
        "x * sigmoid(x) instead: silu is reported to become float32" if op.kind == "silu" else None
    )


RULES: dict[str, Rule] = {
    "float32": _float32,
    "unsupported-operation": _off,
    "integer-compute": _integer,
    "dynamic-shape": _dynamic,
    "rank": _rank,
    "size": _size,
    "narrow-last-axis": _narrow,
    "last-axis-1": _single,
    "joined-cache": _joined_cache,
    "linear": _linear,
    "layout": _layout,
    "kernel": _kernel,
    "in-graph-update": _in_graph_update,
    "rotary": _rotary,
    "fused-attention": _fused_attention,
    "silu": _swish,
}
