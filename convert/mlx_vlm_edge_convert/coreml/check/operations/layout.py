"""Where values lie: shapes, slices, joins, gathers. None of these computes a float."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .reduction import axes_of

Ints = np.ndarray | None


def _ints(values: Any) -> list[int]:
    return [int(value) for value in np.ravel(values)]


def reshape(x: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """A 0 keeps the size of that axis."""
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(_ints(shape))])


def expand_dims(x: np.ndarray, axes: np.ndarray) -> np.ndarray:
    return np.expand_dims(x, tuple(_ints(axes)))


def squeeze(x: np.ndarray, axes: Ints = None) -> np.ndarray:
    return np.squeeze(x, axes_of(axes))


def concat(values: Sequence[np.ndarray], axis: Any, interleave: Any = False) -> np.ndarray:
    """Interleaved, the values alternate along the axis."""
    if bool(interleave):
        stacked = np.stack(values, int(axis) + 1)
        shape = list(values[0].shape)
        shape[int(axis)] *= len(values)
        return stacked.reshape(shape)
    return np.concatenate([np.atleast_1d(value) for value in values], int(axis))


def split(
    x: np.ndarray, axis: Any, num_splits: Any = None, split_sizes: Ints = None
) -> list[np.ndarray]:
    if split_sizes is not None:
        return np.split(x, np.cumsum(_ints(split_sizes))[:-1], int(axis))
    return np.split(x, int(num_splits), int(axis))


def _where(
    x: np.ndarray, begin: np.ndarray, end: np.ndarray, stride: Ints,
    begin_mask: Ints, end_mask: Ints, squeeze_mask: Ints,
) -> tuple[slice | int, ...]:  # fmt: skip
    """MIL's slice as numpy's: a set mask means from the start, to the end, or one index."""
    none = [False] * x.ndim
    steps = [1] * x.ndim if stride is None else _ints(stride)
    rows = zip(
        _ints(begin), _ints(end), steps,
        none if begin_mask is None else begin_mask,
        none if end_mask is None else end_mask,
        none if squeeze_mask is None else squeeze_mask,
        x.shape, strict=True,
    )  # fmt: skip
    index: list[slice | int] = []
    for first, last, step, from_start, to_end, one, size in rows:
        for place, free in ((first, from_start), (last, to_end)):
            if not (free or one) and not -size <= place <= size:
                raise ValueError(f"a slice to {place} of an axis of {size}")
        if one:
            index.append(first)
            continue
        start = None if from_start else first
        index.append(slice(start, None if to_end else last, step))
    return tuple(index)


def slice_by_index(
    x: np.ndarray, begin: np.ndarray, end: np.ndarray, stride: Ints = None,
    begin_mask: Ints = None, end_mask: Ints = None, squeeze_mask: Ints = None,
) -> np.ndarray:  # fmt: skip
    return x[_where(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


def slice_update(
    x: np.ndarray, update: np.ndarray, begin: np.ndarray, end: np.ndarray, stride: Ints = None,
    begin_mask: Ints = None, end_mask: Ints = None, squeeze_mask: Ints = None,
) -> np.ndarray:  # fmt: skip
    return updated(x.copy(), update, begin, end, stride, begin_mask, end_mask, squeeze_mask)


def updated(
    x: np.ndarray, update: np.ndarray, begin: np.ndarray, end: np.ndarray, stride: Ints = None,
    begin_mask: Ints = None, end_mask: Ints = None, squeeze_mask: Ints = None,
) -> np.ndarray:  # fmt: skip
    """The same in x itself."""
    place = _where(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if x[place].shape != update.shape:
        raise ValueError(f"an update of {update.shape} for a place of {x[place].shape}")
    x[place] = update
    return x


def slice_by_size(x: np.ndarray, begin: np.ndarray, size: np.ndarray) -> np.ndarray:
    """A size of -1 means to the end."""
    pairs = zip(_ints(begin), _ints(size), strict=True)
    return x[tuple(slice(b, None if n == -1 else b + n) for b, n in pairs)]


def gather(
    x: np.ndarray, indices: np.ndarray, axis: Any = 0, batch_dims: Any = 0,
    validate_indices: Any = False,
) -> np.ndarray:  # fmt: skip
    """Negative indices count from the end, as in numpy."""
    if int(batch_dims):
        raise ValueError("gather with batch_dims")
    return np.take(x, indices, axis=int(axis))


def pad(
    x: np.ndarray, pad: np.ndarray, mode: str = "constant", constant_val: Any = 0.0
) -> np.ndarray:
    """`pad` has two sizes for each of the last axes."""
    if mode != "constant":
        raise ValueError(f"pad in mode {mode}")
    sizes = np.reshape(pad, (-1, 2)).tolist()
    widths = [[0, 0]] * (x.ndim - len(sizes)) + sizes
    return np.pad(x, widths, constant_values=constant_val)


def select(cond: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(cond, a, b)


def shape_of(x: np.ndarray) -> np.ndarray:
    return np.array(x.shape, np.int32)


def fill(shape: np.ndarray, value: np.ndarray) -> np.ndarray:
    return np.full(_ints(shape), value, value.dtype)


def range_1d(start: np.ndarray, end: np.ndarray, step: np.ndarray) -> np.ndarray:
    return np.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


def band_part(x: np.ndarray, lower: Any = -1, upper: Any = -1) -> np.ndarray:
    """The band of the last two axes; a negative width means all on that side."""
    below = np.arange(x.shape[-2])[:, None] - np.arange(x.shape[-1])
    inside = ((int(lower) < 0) | (below <= lower)) & ((int(upper) < 0) | (-below <= upper))
    return np.where(inside, x, np.zeros((), x.dtype))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "reshape": reshape,
    "transpose": lambda x, perm: np.transpose(x, _ints(perm)),
    "expand_dims": expand_dims,
    "squeeze": squeeze,
    "concat": concat,
    "stack": lambda values, axis: np.stack(values, int(axis)),
    "split": split,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "gather": gather,
    "pad": pad,
    "tile": lambda x, reps: np.tile(x, _ints(reps)),
    "select": select,
    "shape": shape_of,
    "fill": fill,
    "range_1d": range_1d,
    "band_part": band_part,
    "identity": lambda x: x,
}
MOVES = frozenset(OPERATIONS) - {"pad", "fill"}
