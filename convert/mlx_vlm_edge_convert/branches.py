"""Un-fused blocks against the kernels they were merged into, on random inputs.

Independent of `reparam`: every branch runs as it was trained, convolution then BatchNorm, and the
sum is held against one convolution by the written kernel.
"""

from collections.abc import Iterator, Mapping

import mlx.core as mx

from mlx_vlm_edge.vision.fastvit_fold import BN_EPS

SIDE = 8
_MERGED = ("reparam_conv.weight", "lkb_reparam.weight")


def outputs(
    branches: Mapping[str, mx.array], merged: Mapping[str, mx.array]
) -> Iterator[tuple[mx.array, mx.array]]:
    """For every merged kernel: its output, and that of its branches, each [1, 8, 8, O].

    `branches` has Apple's names and PyTorch's layout, `merged` native names and layout; both
    share the names of everything that is not a branch.
    """
    key = mx.random.key(0)
    for name in sorted(merged):
        if name.endswith(_MERGED) and name not in branches:
            weight = merged[name].astype(mx.float32)
            block = _Block(branches, name.rpartition(".")[0].rpartition(".")[0] + ".")
            groups = block.groups(weight)
            x = mx.random.normal((1, SIDE, SIDE, weight.shape[-1] * groups), key=key)
            got = mx.conv2d(x, weight, padding=weight.shape[1] // 2, groups=groups)
            yield got + merged[f"{name.removesuffix('weight')}bias"], block(x, weight)


class _Block:
    """One un-fused block, run branch by branch."""

    def __init__(self, weights: Mapping[str, mx.array], prefix: str) -> None:
        self._weights, self._prefix = weights, prefix

    def groups(self, kernel: mx.array) -> int:
        """Groups of a merged kernel [O, k, k, I]: dense when no branch keeps a channel apart."""
        out, inner = kernel.shape[0], kernel.shape[-1]
        return int(out // inner) if inner == 1 or self._has("rbr_skip.") else 1

    def __call__(self, x: mx.array, kernel: mx.array) -> mx.array:
        groups = self.groups(kernel)
        if self._has("pe."):
            pe = self._convolve("pe.weight", x, groups)
            return x + pe + self._take("pe.bias")
        if self._has("mixer."):
            scale = self._take("layer_scale").reshape(-1) if self._has("layer_scale") else 1.0
            mixed = self._sum("mixer.", x, groups) - self._norm("norm.rbr_skip.", x)
            return x + scale * mixed
        return self._sum("", x, groups)

    def _sum(self, part: str, x: mx.array, groups: int) -> mx.array:
        """The sum of all branches below `part`."""
        start = len(self._prefix + part)
        below = [name for name in self._weights if name.startswith(self._prefix + part)]
        stems = {name[start:].removesuffix("conv.weight") for name in below if "conv.w" in name}
        total = mx.array(0.0)
        if self._has(f"{part}rbr_skip."):
            total = self._norm(f"{part}rbr_skip.", x)
        for stem in sorted(stems):
            y = self._convolve(f"{part}{stem}conv.weight", x, groups)
            total = total + self._norm(f"{part}{stem}bn.", y)
        return total

    def _convolve(self, name: str, x: mx.array, groups: int) -> mx.array:
        weight = self._take(name).transpose(0, 2, 3, 1)
        return mx.conv2d(x, weight, padding=weight.shape[1] // 2, groups=groups)

    def _norm(self, name: str, x: mx.array) -> mx.array:
        gain, shift = self._take(f"{name}weight"), self._take(f"{name}bias")
        mean, var = self._take(f"{name}running_mean"), self._take(f"{name}running_var")
        return (x - mean) * mx.rsqrt(var + BN_EPS) * gain + shift

    def _has(self, part: str) -> bool:
        return any(name.startswith(self._prefix + part) for name in self._weights)

    def _take(self, name: str) -> mx.array:
        return self._weights[self._prefix + name].astype(mx.float32)
