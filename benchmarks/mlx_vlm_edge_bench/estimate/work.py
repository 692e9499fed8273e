"""What layers cost, counted from their sizes: operations, parameters, activations.

One multiply-accumulate (MAC) is two FLOPs. Norms, activations, softmax and additions are not
counted as operations, as in published counts; their parameters are.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Work:
    """macs: of matmuls and convolutions. attention: MACs of queries with keys and values.

    matrices: parameters of the matmuls that many rows share. vectors: all other parameters.
    values: activations read and written, where a matmul or convolution with what follows it
    element by element (and an attention) is one pass that keeps nothing in between. widest: the
    most values that one such pass reads and writes.
    """

    macs: int = 0
    attention: int = 0
    matrices: int = 0
    vectors: int = 0
    values: int = 0
    widest: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.macs + other.macs,
            self.attention + other.attention,
            self.matrices + other.matrices,
            self.vectors + other.vectors,
            self.values + other.values,
            max(self.widest, other.widest),
        )

    def layers(self, count: int) -> "Work":
        """`count` layers like this one, each with its own parameters."""
        return replace(
            self.runs(count), matrices=self.matrices * count, vectors=self.vectors * count
        )

    def runs(self, count: int) -> "Work":
        """This work done `count` times with the same parameters (a tower on several tiles)."""
        return replace(
            self,
            macs=self.macs * count,
            attention=self.attention * count,
            values=self.values * count,
        )

    @property
    def flops(self) -> int:
        return 2 * (self.macs + self.attention)

    @property
    def parameters(self) -> int:
        return self.matrices + self.vectors


def linear(rows: int, inputs: int, outputs: int, *, bias: bool = True) -> Work:
    """A matmul of [rows, inputs] with [inputs, outputs]."""
    return Work(
        macs=rows * inputs * outputs,
        matrices=inputs * outputs,
        vectors=outputs if bias else 0,
        values=rows * (inputs + outputs),
        widest=rows * (inputs + outputs),
    )


def depthwise(
    positions: int, channels: int, size: int, *, stride: int = 1, outputs: int = 1
) -> Work:
    """A biased depthwise convolution of size x size, `positions` after its stride, with `outputs`
    per channel."""
    made = channels * outputs
    passed = positions * (channels * stride**2 + made)
    return Work(
        macs=positions * made * size**2,
        vectors=made * (size**2 + 1),
        values=passed,
        widest=passed,
    )


def norm(rows: int, width: int, *, bias: bool = True) -> Work:
    """A LayerNorm, or an RMSNorm without bias."""
    return Work(vectors=width * (1 + bias), values=2 * rows * width)


def attention(rows: int, width: int, *, keys: int | None = None, pairs: int | None = None) -> Work:
    """Attention of `rows` queries to `keys` keys (as many by default), heads of `width` in all.

    pairs: of a query and a key that meet, where not all do (a causal mask).
    """
    keys = rows if keys is None else keys
    met = rows * keys if pairs is None else pairs
    return Work(attention=2 * met * width, values=2 * (rows + keys) * width)
