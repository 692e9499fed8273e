"""Calls of MLX -> operations and bytes, counted on their way in; nothing is evaluated.

MLX arrays know their shapes before they are computed, so a real module that is called on lazy
arrays tells what it would do.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock, get_ident
from typing import Any

import mlx.core as mx
import numpy as np

from ..kernels import plain
from ..reduction import choosing

_PATCHED = Lock()  # MLX's functions are the process's: one counts at a time


@dataclass(frozen=True)
class Work:
    """What some calls do.

    macs: multiply-accumulates of matmuls and convolutions. attention: those of queries with keys
    and values. matrices: parameters of matmuls, once for each time that several rows meet them.
    weights: bytes of parameters read. activations: bytes read and written by matmuls,
    convolutions, attention and norms, each one pass. widest: the most of these in one pass.
    Other norms, sums and softmax are not counted as operations, as in published counts.
    """

    macs: int = 0
    attention: int = 0
    matrices: int = 0
    weights: int = 0
    activations: int = 0
    widest: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.macs + other.macs,
            self.attention + other.attention,
            self.matrices + other.matrices,
            self.weights + other.weights,
            self.activations + other.activations,
            max(self.widest, other.widest),
        )

    def times(self, count: int) -> "Work":
        """This work done `count` times, one after the other."""
        return replace(
            self,
            macs=self.macs * count,
            attention=self.attention * count,
            matrices=self.matrices * count,
            weights=self.weights * count,
            activations=self.activations * count,
        )

    @property
    def flops(self) -> int:
        return 2 * (self.macs + self.attention)

    @property
    def nbytes(self) -> int:
        """Bytes that go between memory and processor."""
        return self.weights + self.activations


class Counter:
    """Adds up the work of its thread's calls."""

    def __init__(self) -> None:
        self.work = Work()
        self._thread = get_ident()

    @property
    def here(self) -> bool:
        """Whether this is the thread that is counted."""
        return get_ident() == self._thread

    def take(self) -> Work:
        """What was counted since the last time."""
        work, self.work = self.work, Work()
        return work

    def add(self, out: mx.array, x: mx.array, *weights: mx.array | None, **counts: int) -> None:
        """One pass that reads x and weights and writes `out`."""
        passed = x.nbytes + out.nbytes
        read = sum(array.nbytes for array in weights if array is not None)
        self.work += Work(weights=read, activations=passed, widest=passed, **counts)

    def matmul(self, out: mx.array, x: mx.array, y: mx.array, *more: mx.array | None) -> None:
        inner, width = x.shape[-1], out.shape[-1]
        macs, several = out.size * inner, out.size > width
        if y.ndim == 2:
            self.add(out, x, y, *more, macs=macs, matrices=inner * width * several)
        else:  # of activations with each other
            self.add(out, x, macs=macs)
            self.work += Work(
                activations=sum(array.nbytes for array in (y, *more) if array is not None)
            )

    def gathered(self, out: mx.array, x: mx.array, y: mx.array, *more: mx.array) -> None:
        """A matmul of rows [N, 1, in], each with one of E matrices: as many of these are read as
        there are rows, all where there are more."""
        rows, matrices, inner, width = out.shape[0], y.shape[0], x.shape[-1], out.shape[-1]
        several = matrices * (rows > matrices)
        self.add(out, x, macs=out.size * inner, matrices=inner * width * several)
        held = sum(part.nbytes for part in (y, *more))
        self.work += Work(weights=held * min(rows, matrices) // matrices)

    def convolution(self, out: mx.array, x: mx.array, weight: mx.array) -> None:
        """weight [C_out, ..., C_in / groups]; one that mixes channels is a matmul of patches."""
        mixes = weight.shape[-1] == x.shape[-1]
        counts = {"macs": out.size * math.prod(weight.shape[1:]), "matrices": weight.size * mixes}
        self.add(out, x, weight, **counts)

    def scaled_attention(
        self, out: mx.array, q: mx.array, k: mx.array, v: mx.array, causal: bool
    ) -> None:
        """A query meets all keys or, causal, those up to its own place; the last query sees all."""
        L, S = q.shape[2], k.shape[2]
        met = L * S - L * (L - 1) // 2 * causal
        pairs = q.shape[0] * q.shape[1] * met
        self.add(out, q, attention=pairs * (q.shape[3] + v.shape[3]))
        self.work += Work(activations=k.nbytes + v.nbytes)


@contextmanager
def counting() -> Iterator[Counter]:
    """Count what this thread asks of MLX, in the forms for GPUs; `mx.eval` does nothing.

    Other threads go on as ever.
    """
    counter = Counter()
    with _PATCHED, plain():
        originals = [(owner, name, getattr(owner, name)) for owner, name in _SEEN]
        try:
            for owner, name, original in originals:
                setattr(owner, name, _SEEN[owner, name](counter, original))
            yield counter
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)


def counted(run: Callable[[], Any]) -> Work:
    """The work of a function that calls modules on lazy arrays."""
    with counting() as counter:
        run()
        return counter.take()


Call = Callable[..., Any]


def _after(note: Callable[..., None]) -> Callable[[Counter, Call], Call]:
    """Wrap a function so that `note(counter, result, *arguments)` follows each counted call."""

    def wrap(counter: Counter, original: Call) -> Call:
        def call(*arguments: Any, **named: Any) -> Any:
            out = original(*arguments, **named)
            if counter.here:
                note(counter, out, *arguments, **named)
            return out

        return call

    return wrap


def _unless_counting(counter: Counter, original: Call) -> Call:
    return lambda *arrays: None if counter.here else original(*arrays)


def _addmm(
    counter: Counter, out: mx.array, c: mx.array, a: mx.array, b: mx.array, *_: Any, **__: Any
) -> None:
    counter.matmul(out, a, b, c)


def _matmul(counter: Counter, out: mx.array, a: mx.array, b: mx.array, **_: Any) -> None:
    counter.matmul(out, a, b)


def _quantized(
    counter: Counter, out: mx.array, x: mx.array, w: mx.array, *more: Any, **named: Any
) -> None:
    groups = [part for part in (*more, *named.values()) if isinstance(part, mx.array)]
    counter.matmul(out, x, w, *groups)


def _gathered(counter: Counter, out: mx.array, x: mx.array, y: mx.array, **_: Any) -> None:
    counter.gathered(out, x, y)


def _gathered_quantized(
    counter: Counter, out: mx.array, x: mx.array, w: mx.array, *more: Any, **_: Any
) -> None:
    counter.gathered(out, x, w, *(part for part in more if part is not None))


def _convolution(
    counter: Counter, out: mx.array, x: mx.array, w: mx.array, *_: Any, **__: Any
) -> None:
    counter.convolution(out, x, w)


def _attention(
    counter: Counter,
    out: mx.array,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    mask: Any = None,
    **_: Any,
) -> None:
    counter.scaled_attention(out, q, k, v, isinstance(mask, str))


def _norm(counter: Counter, out: mx.array, x: mx.array, *more: Any, **_: Any) -> None:
    counter.add(out, x, *(part for part in more if isinstance(part, mx.array)))


def _blank(counter: Counter, original: Call) -> Call:
    """Values that nothing computes: any will do to choose as many as were asked for."""

    def call(arrays: list[mx.array]) -> list[np.ndarray]:
        if not counter.here:
            read: list[np.ndarray] = original(arrays)
            return read
        return [np.zeros(array.shape, np.float32) for array in arrays]

    return call


_SEEN: dict[tuple[Any, str], Callable[[Counter, Call], Call]] = {
    (mx.array, "__matmul__"): _after(_matmul),
    (mx, "matmul"): _after(_matmul),
    (mx, "addmm"): _after(_addmm),
    (mx, "quantized_matmul"): _after(_quantized),
    (mx, "gather_mm"): _after(_gathered),
    (mx, "gather_qmm"): _after(_gathered_quantized),
    (mx, "conv2d"): _after(_convolution),
    (mx, "conv_general"): _after(_convolution),
    (mx.fast, "scaled_dot_product_attention"): _after(_attention),
    (mx.fast, "rms_norm"): _after(_norm),
    (mx.fast, "layer_norm"): _after(_norm),
    (mx, "eval"): _unless_counting,
    (mx, "async_eval"): _unless_counting,
    (choosing, "on_host"): _blank,
}
