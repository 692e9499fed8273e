"""Element by element: arithmetic, comparisons, activations."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from .parallel import each

BLOCK = 1 << 15  # elements: chains run block by block, in the cache

# erf(x) = x P(x^2) / Q(x^2) for |x| < EDGE: a least-squares fit of relative weight 1, whose largest
# error is 2e-8 in float64 and 4e-7 in float32; beyond EDGE erf is 1 to 3e-8.
EDGE = 3.925
P = (1.12837904, 1.92540126e-1, 5.30261488e-2, 3.85742822e-3, 2.87006413e-4, 2.03344614e-6)
Q = (1.0, 5.03966032e-1, 1.14987710e-1, 1.51506881e-2, 1.18504660e-3, 3.80326235e-5)


class Blocked(Protocol):
    def __call__(self, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray: ...


def by_blocks(function: Callable[[np.ndarray], np.ndarray]) -> Blocked:
    """The same function of an array of any size, without temporary arrays of that size.

    out: where the result goes, x itself maybe; contiguous.
    """

    def blocked(x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        source = np.ascontiguousarray(x).reshape(-1)
        target = np.empty_like(source) if out is None else out.reshape(-1)

        def one(start: int) -> None:
            target[start : start + BLOCK] = function(source[start : start + BLOCK])

        each(one, range(0, source.size, BLOCK))
        return target.reshape(x.shape)

    return blocked


def _polynomial(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    y = np.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        y *= x
        y += np.float32(c)
    return y


def _erf(x: np.ndarray) -> np.ndarray:
    held = np.clip(x, -EDGE, EDGE)  # keeps NaN
    square = held * held
    held *= _polynomial(P, square)
    held /= _polynomial(Q, square)
    return held


def _sigmoid(x: np.ndarray) -> np.ndarray:
    y = np.exp(-x)
    y += 1
    return np.reciprocal(y, out=y)


def _gelu(x: np.ndarray) -> np.ndarray:
    y = _erf(x * np.float32(math.sqrt(0.5)))
    y += 1
    y *= x
    y *= np.float32(0.5)
    return y


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))


_GELU = {
    "EXACT": by_blocks(_gelu),
    "TANH_APPROXIMATION": by_blocks(_gelu_tanh),
    "SIGMOID_APPROXIMATION": by_blocks(lambda x: x * _sigmoid(np.float32(1.702) * x)),
}


def gelu(x: np.ndarray, mode: str = "EXACT") -> np.ndarray:
    return _GELU[mode](x)


def divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of integers, Core ML's real_div rounds down."""
    return x / y if x.dtype.kind == "f" else x // y


def clip(x: np.ndarray, alpha: Any, beta: Any) -> np.ndarray:
    return np.clip(x, alpha, beta)


def _shifted(
    function: Callable[[np.ndarray], np.ndarray],
) -> Callable[..., np.ndarray]:
    """A function that adds `epsilon` to its argument first."""
    return lambda x, epsilon=0.0: function(x + np.float32(epsilon))


def _unary(function: Any) -> Callable[..., np.ndarray]:
    return lambda x: function(x)


def _binary(function: Any) -> Callable[..., np.ndarray]:
    return lambda x, y: function(x, y)


def cast(x: np.ndarray, dtype: str) -> np.ndarray:
    """To whole numbers towards zero; float16 is the interpreter's matter."""
    return x.astype(CASTS[dtype])


CASTS = {
    "fp16": np.float32,
    "fp32": np.float32,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "bool": np.bool_,
}
OPERATIONS: dict[str, Callable[..., Any]] = {
    "cast": cast,
    **{
        name: _binary(function)
        for name, function in {
            "add": np.add,
            "sub": np.subtract,
            "mul": np.multiply,
            "real_div": divide,
            "floor_div": np.floor_divide,
            "mod": np.mod,
            "pow": np.power,
            "maximum": np.maximum,
            "minimum": np.minimum,
            "greater": np.greater,
            "greater_equal": np.greater_equal,
            "less": np.less,
            "less_equal": np.less_equal,
            "equal": np.equal,
            "not_equal": np.not_equal,
            "logical_and": np.logical_and,
            "logical_or": np.logical_or,
        }.items()
    },
    **{
        name: _unary(function)
        for name, function in {
            "relu": lambda x: np.maximum(x, 0),
            "sigmoid": by_blocks(_sigmoid),
            "silu": by_blocks(lambda x: x * _sigmoid(x)),
            "erf": by_blocks(_erf),
            "tanh": np.tanh,
            "exp": np.exp,
            "cos": np.cos,
            "sin": np.sin,
            "sqrt": np.sqrt,
            "abs": np.abs,
            "square": np.square,
            "floor": np.floor,
            "logical_not": np.logical_not,
            "softplus": lambda x: np.logaddexp(x, np.float32(0)),
        }.items()
    },
    "rsqrt": _shifted(lambda x: 1 / np.sqrt(x)),
    "inverse": _shifted(lambda x: 1 / x),
    "log": _shifted(np.log),
    "gelu": gelu,
    "clip": clip,
    "sigmoid_hard": lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1),
}
