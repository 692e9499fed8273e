"""Cambrian-1's spatial vision aggregator: features of several towers -> visual tokens.

A grid of queries, each of which looks at its own window of every tower's grid and at nothing else,
through masks where the picture was padded. What a query sees is a row of its own, so that layers
of the language model can look at it again: `Sampler` is the same in both places.
Source: cambrian-mllm/cambrian, cambrian/model/vision_sampler.py, cambrian_arch.py;
arXiv 2406.16860.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.config import check
from ..errors import UsageError
from ..kernels import attention, gelu
from .mlp import MLP

HEADS = 16


@dataclass(frozen=True)
class SVAConfig:
    """Geometry. width: of everything inside; side: of the grid of queries; features and sides:
    each tower's channels and its grid's side; depth: of the aggregator before the language model.
    """

    width: int
    side: int
    features: tuple[int, ...]
    sides: tuple[int, ...]
    depth: int

    def __post_init__(self) -> None:
        check(self, positive=True)
        if len(self.features) != len(self.sides) or not self.sides:
            raise UsageError("config.json: towers and lengths of their features are not as many")
        if any(side % self.side for side in self.sides):
            raise UsageError(
                f"config.json: grids of {', '.join(map(str, self.sides))} features a side cannot "
                f"be cut into {self.side} windows"
            )
        if self.width % HEADS:
            raise UsageError(f"config.json: vision_hidden_size is no multiple of {HEADS}")

    @property
    def windows(self) -> list[int]:
        """The side of a query's window in every tower's grid."""
        return [side // self.side for side in self.sides]

    @property
    def keys(self) -> int:
        """How many features a query sees, of all towers together."""
        return sum(window**2 for window in self.windows)

    @property
    def seen(self) -> int:
        """Numbers in a row of what a query sees: the context that all have in common, its windows'
        features, tower after tower, and which of them have picture in them (1, else 0)."""
        return self.width * (1 + self.keys) + self.keys


def visible(size: tuple[int, int], side: int) -> tuple[slice, slice]:
    """Rows and columns that have picture in them, of a picture (width, height) that is padded to a
    square and cut into side x side.

    visible((640, 480), 24) -> rows 3 to 21, all columns. Both may be empty of one elongated so.
    """
    width, height = size
    if width > height:  # in floating point, as the original
        pad = (side - int(height * (side / width))) // 2
        return slice(pad, side - pad), slice(0, side)
    pad = (side - int(width * (side / height))) // 2
    return slice(0, side), slice(pad, side - pad)


def seen_mask(size: tuple[int, int], side: int, window: int) -> np.ndarray:
    """bool [queries, queries, window * window]: which features of every query's window have picture
    in them. A window without any is seen whole."""
    mask = np.zeros((side, side), bool)
    mask[visible(size, side)] = True
    parts = cut(mask[..., None], window)[..., 0]
    return parts | ~parts.any(axis=-1, keepdims=True)


def cut(grid: Any, window: int) -> Any:
    """An array [S, S, C] of NumPy or MLX -> [S / window, S / window, window * window, C], row after
    row of each window."""
    side, C = grid.shape[0] // window, grid.shape[-1]
    parts = grid.reshape(side, window, side, window, C).transpose(0, 2, 1, 3, 4)
    return parts.reshape(side, side, window * window, C)


class CrossAttention(nn.Module):
    """Queries [N, V] look each at its own features, [N, windows, V] of every tower."""

    def __init__(self, config: SVAConfig) -> None:
        super().__init__()
        self.q_proj = _normed(config.width)
        for index in range(len(config.sides)):
            self[f"k_proj_{index}"] = _normed(config.width)
            self[f"v_proj_{index}"] = _normed(config.width)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def __call__(self, x: mx.array, towers: Sequence[mx.array], mask: mx.array) -> mx.array:
        N, V = x.shape
        q = _run(self.q_proj, x)[:, None]
        k, v = (
            mx.concatenate(
                [_run(self[f"{name}_proj_{i}"], tower) for i, tower in enumerate(towers)], axis=1
            )
            for name in "kv"
        )
        q, k, v = (y.reshape(N, -1, HEADS, V // HEADS).swapaxes(1, 2) for y in (q, k, v))
        out = attention(q, k, v, (V // HEADS) ** -0.5, mask[:, None, None])
        return self.o_proj(out.reshape(N, V))


def _normed(width: int) -> list[nn.Module]:
    return [nn.LayerNorm(width), nn.Linear(width, width, bias=False)]


def _run(layers: Sequence[nn.Module], x: mx.array) -> mx.array:
    norm, linear = layers
    return linear(norm(x))


class Output(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, width, bias=False)
        self.linear_2 = nn.Linear(width, out, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(gelu(self.linear_1(x)))


class SamplerLayer(nn.Module):
    """One look. inputs: how wide the queries are that come in and go out, [N, inputs]."""

    def __init__(self, config: SVAConfig, inputs: int) -> None:
        super().__init__()
        width = config.width
        self._config = config
        self.proj_context = nn.Linear(width, width, bias=False)
        self.proj_in = nn.Linear(inputs + width, width, bias=False)
        for index, window in enumerate(config.windows):
            if window > 1:
                self[f"pos_embed_{index}"] = mx.zeros((window**2, width))
        self.cross_attn = CrossAttention(config)
        self.norm = nn.LayerNorm(width)
        self.proj_out = Output(width, inputs)

    def __call__(self, x: mx.array, seen: mx.array) -> mx.array:
        """Queries [N, inputs] and a row of what each sees [N, config.seen]."""
        config = self._config
        V, keys = config.width, config.keys
        common, features, mask = mx.split(seen, [V, V * (1 + keys)], axis=1)
        ends = np.cumsum([window**2 for window in config.windows])
        apart = mx.split(features.reshape(len(x), keys, V), ends[:-1].tolist(), axis=1)
        towers = [
            tower + self[name] if (name := f"pos_embed_{index}") in self else tower
            for index, tower in enumerate(apart)
        ]
        y = self.proj_in(mx.concatenate([x, self.proj_context(common)], axis=1))
        y = self.norm(y + self.cross_attn(y, towers, mask > 0.5))
        return x + self.proj_out(y)


class Sampler(nn.Module):
    def __init__(self, config: SVAConfig, inputs: int, depth: int = 1) -> None:
        super().__init__()
        self.layers = [SamplerLayer(config, inputs) for _ in range(depth)]

    def __call__(self, x: mx.array, seen: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x, seen)
        return x


class Projection(nn.Module):
    """A tower's features -> the aggregator's width: two linear layers and a norm."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.layers = [
            nn.Linear(features, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width)
        ]  # fmt: skip

    def __call__(self, x: mx.array) -> mx.array:
        first, _, second, norm = self.layers
        return norm(second(gelu(first(x))))


class Aggregator(nn.Module):
    """Features of one picture by every tower -> visual tokens and what each of them sees."""

    def __init__(self, config: SVAConfig, hidden: int) -> None:
        super().__init__()
        self._config = config
        self.projections = [Projection(features, config.width) for features in config.features]
        self.query = mx.zeros((1, config.width))
        self.sampler = Sampler(config, config.width, config.depth)
        self.projector = MLP(config.width, hidden)
        self.image_newline = mx.zeros((hidden,))

    def seen(self, features: Sequence[mx.array], size: tuple[int, int]) -> mx.array:
        """Rows [h, w, config.seen] of what the queries see whose windows have picture in them.

        features: [S * S, C] of every tower. size: the picture's (width, height). The common context
        is the mean of the first tower's, padding included, as in the original.
        """
        config = self._config
        rows, columns = visible(size, config.side)
        common: mx.array | None = None
        windows, masks = [], []
        for project, x, side, window in zip(
            self.projections, features, config.sides, config.windows, strict=True
        ):
            if common is None:  # of all there is
                x = project(x)
                common = x.mean(axis=0)
                part = cut(x.reshape(side, side, -1), window)[rows, columns]
            else:
                part = project(cut(x.reshape(side, side, -1), window)[rows, columns])
            windows.append(part.flatten(2))
            masks.append(mx.array(seen_mask(size, side, window)[rows, columns]).astype(x.dtype))
        assert common is not None
        shared = mx.broadcast_to(common, (*windows[0].shape[:2], config.width))
        return mx.concatenate([shared, *windows, *masks], axis=-1)

    def aggregate(self, seen: mx.array) -> mx.array:
        """What the queries [h, w] gather, [h * w, config.width]."""
        rows = seen.flatten(0, 1)
        return self.sampler(mx.broadcast_to(self.query, (len(rows), self._config.width)), rows)

    def __call__(self, features: Sequence[mx.array], size: tuple[int, int]) -> mx.array:
        """[h * (w + 1), D + config.seen]: visual tokens, row after row with a newline at each end,
        and beside each what it sees, which of a newline is nothing."""
        seen = self.seen(features, size)
        h, w, width = seen.shape
        tokens = self.projector(self.aggregate(seen)).reshape(h, w, -1)
        newline = mx.concatenate([self.image_newline, mx.zeros((width,), seen.dtype)])
        ends = mx.broadcast_to(newline, (h, 1, len(newline)))
        return mx.concatenate([mx.concatenate([tokens, seen], -1), ends], axis=1).flatten(0, 1)
