"""Quantised layers -> the same numbers, laid out and multiplied the way a CPU does it fast.

MLX keeps the inputs of an output row together in a 32-bit word. Its CPU kernel then adds up one
product after the other, and for a prompt it unpacks every weight again for every position. Here a
word holds one input of several output rows, so that a row of inputs meets many outputs at once (a
third of the time), and for many rows the weights are unpacked once, a part at a time.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

BITS = (2, 4, 8)  # the others' values lie across the words' borders
ROWS = 6  # from more rows than this on, unpacking costs less than multiplying packed weights
PART = 1 << 20  # words that are turned at once
GROUPS = (128, 64, 32)  # outputs that share the kernel's scale, which is always 1: few are read


def for_cpu(model: nn.Module, but: str = "none") -> None:
    """Replace the quantised layers of `model`, one after the other, where their kind allows it.

    but: a part of the names of those that stay.
    """
    replaced = [(name, layer) for name, layer in model.named_modules() if _fits(layer)]
    replaced = [(name, layer) for name, layer in replaced if but not in name.split(".")]
    while replaced:  # popped, so that no layer but one is held twice
        name, layer = replaced.pop()
        new = Linear(layer) if isinstance(layer, nn.QuantizedLinear) else Embedding(layer)
        mx.eval(new.parameters())
        model.update_modules(tree_unflatten([(name, new)]))


def _fits(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return False
    rows = layer.weight.shape[0]
    return bool(layer.mode == "affine" and layer.bits in BITS and rows % GROUPS[-1] == 0)


def turned(words: mx.array, bits: int) -> mx.array:
    """uint32 [N, K / n], n inputs a word -> uint32 [K, N / n], n outputs a word.

    Word i of the result holds outputs i, i + N / n, i + 2 N / n, ... In n words, n at a time, that
    turns a matrix of n x n values: first its quarters, then theirs (Hacker's Delight, 7-3).
    """
    count = 32 // bits
    N, columns = words.shape
    parts = list(words.reshape(count, N // count, columns))
    width = count // 2
    while width:
        low = sum((2**bits - 1) << (bits * i) for i in range(count) if not i & width)
        keep, other, shift = (
            mx.array(n, mx.uint32) for n in (low, low ^ (2**32 - 1), width * bits)
        )
        for i in (i for i in range(count) if not i & width):
            a, b = parts[i], parts[i + width]
            parts[i] = (a & keep) | ((b & keep) << shift)
            parts[i + width] = ((a & other) >> shift) | (b & other)
        width //= 2
    return mx.stack([part.T for part in parts], axis=1).reshape(columns * count, N // count)


def _turned_by_parts(words: mx.array, bits: int) -> mx.array:
    """`turned` of some inputs after the other: no more than these are held three times over."""
    count, (N, columns) = 32 // bits, words.shape
    codes = mx.zeros((columns * count, N // count), mx.uint32)
    size = max(1, PART // N)
    for start in range(0, columns, size):
        codes[start * count : (start + size) * count] = turned(words[:, start : start + size], bits)
        mx.eval(codes)
    return codes


class Weight(nn.Module):
    """A matrix [N, K]: codes uint32 [G, K / G, N / n] as `turned` leaves them; scales and biases
    [G, N], in the order of the codes (n of a word side by side), for G groups of inputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.bits = layer.bits
        groups = layer.scales.shape[1]
        codes = _turned_by_parts(layer.weight, layer.bits)
        self.codes = codes.reshape(groups, -1, codes.shape[1])
        self.scales, self.biases = (self._packed(x.T) for x in (layer.scales, layer.biases))
        self.freeze()

    @property
    def _words(self) -> int:
        return int(self.codes.shape[2])

    def _packed(self, x: mx.array) -> mx.array:
        """[..., N] outputs -> in the order of the words, those of one word side by side."""
        return mx.contiguous(x.reshape(*x.shape[:-1], -1, self._words).swapaxes(-1, -2)).reshape(
            x.shape
        )

    def _ordered(self, x: mx.array) -> mx.array:
        """The inverse of `_packed`."""
        return x.reshape(*x.shape[:-1], self._words, -1).swapaxes(-1, -2).reshape(x.shape)

    def times(self, x: mx.array) -> mx.array:
        """x [..., K] -> x W^T [..., N]."""
        rows = x.reshape(-1, x.shape[-1])
        form = self._packed_rows if rows.shape[0] <= ROWS else self._unpacked
        return form(rows).reshape(*x.shape[:-1], -1)

    def _packed_rows(self, x: mx.array) -> mx.array:
        """Sums of codes by groups of inputs, then their scales; MLX's kernel works along N."""
        groups, size, _ = self.codes.shape
        N = self.scales.shape[1]
        x = x.reshape(-1, groups, size).swapaxes(0, 1)
        shared = next(count for count in GROUPS if N % count == 0)
        one = mx.ones((groups, size, N // shared), x.dtype)
        sums = mx.quantized_matmul(x, self.codes, one, mx.zeros_like(one), False, shared, self.bits)
        y = (sums * self.scales[:, None]).sum(axis=0) + x.sum(axis=-1).T @ self.biases
        return self._ordered(y)

    def _unpacked(self, x: mx.array) -> mx.array:
        """A matmul for each place in a word: what is unpacked at once is an n-th of the matrix."""
        scales, biases = (self._places(y) for y in (self.scales, self.biases))
        parts: list[mx.array] = []
        for place in range(32 // self.bits):
            # No sooner than the part before is multiplied, or all would be unpacked at once.
            codes = mx.depends(self.codes, parts[-1]) if parts else self.codes
            weight = self._values(codes, place).astype(x.dtype) * scales[place] + biases[place]
            parts.append(x @ weight.reshape(x.shape[-1], -1))
        return mx.concatenate(parts, axis=-1)

    def _places(self, x: mx.array) -> mx.array:
        """[G, N] -> for each place in a word [n, G, 1, N / n]."""
        return mx.contiguous(x.reshape(x.shape[0], 1, self._words, -1).transpose(3, 0, 1, 2))

    def _values(self, codes: mx.array, place: int) -> mx.array:
        """int32 [G, K / G, N / n]: what all words hold in one place."""
        return (codes.view(mx.int32) >> (place * self.bits)) & (2**self.bits - 1)

    def rows(self, ids: mx.array) -> mx.array:
        """Row n of W for every n in ids [...] -> [..., K]."""
        flat = ids.reshape(-1)
        word, place = flat % self._words, flat // self._words
        shift = (place * self.bits).astype(mx.uint32)
        values = (self.codes[:, :, word] >> shift) & (2**self.bits - 1)
        packed = word * (32 // self.bits) + place
        scales, biases = (y[:, packed][:, None] for y in (self.scales, self.biases))
        unpacked = (values.astype(scales.dtype) * scales + biases).reshape(-1, flat.shape[0])
        return unpacked.T.reshape(*ids.shape, -1)


class Linear(nn.Module):
    """In the place of nn.QuantizedLinear."""

    def __init__(self, layer: nn.QuantizedLinear) -> None:
        super().__init__()
        self.bits, self.weight = layer.bits, Weight(layer)
        if "bias" in layer:
            self.bias = layer.bias

    def __call__(self, x: mx.array) -> mx.array:
        y = self.weight.times(x)
        return y + self.bias if "bias" in self else y


class Embedding(nn.Module):
    """In the place of nn.QuantizedEmbedding."""

    def __init__(self, layer: nn.QuantizedEmbedding) -> None:
        super().__init__()
        self.bits, self.weight = layer.bits, Weight(layer)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.weight.rows(ids)

    def as_linear(self, x: mx.array) -> mx.array:
        return self.weight.times(x)
