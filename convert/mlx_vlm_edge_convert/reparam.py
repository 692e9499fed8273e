"""Training-form branches of a FastViT tower -> one convolution each (re-parameterisation).

Works on Apple's published names in PyTorch's layout [O, I / groups, kH, kW]; computes in float32
and gives the source's dtype. Formulas: apple/ml-fastvlm, mobileclip/mobileone.py and mci.py.
Names that have no branches are passed through.
"""

import re
from collections.abc import Mapping

import mlx.core as mx

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.vision.fastvit_fold import BN_EPS

from .rules import Arrays

# Apple's words, then timm's.
_BRANCH = re.compile(
    r"(rbr_conv\.\d+|rbr_scale|rbr_skip|lkb_origin|small_conv|pe"
    r"|conv_kxk\.\d+|conv_scale|large_conv|identity|pos_enc)\."
)

Kernel = tuple[mx.array, mx.array]  # weight [O, I / groups, k, k] and bias [O], float32


def merge(weights: Mapping[str, mx.array]) -> Arrays:
    """Merge every un-fused block and keep every other array. Lazy.

    Raises UsageError when a branch is incomplete.
    """
    merged = dict(weights)
    tower = _Branches(merged)
    for block in _blocks(weights, "token_mixer.mixer", "token_mixer.norm"):
        tower.put(f"{block}token_mixer.reparam_conv", _rep_mixer(tower, f"{block}token_mixer."))
    for block in _blocks(merged, "lkb_origin"):
        tower.put(f"{block}lkb_reparam", _large_kernel(tower, block))
    for block in _blocks(merged, "pe"):
        tower.put(f"{block}reparam_conv", _position_encoding(tower, block))
    for block in _blocks(merged, "rbr_conv", "rbr_scale", "rbr_skip"):
        tower.put(f"{block}reparam_conv", _mobile_one(tower, block))
    return merged


def is_training_form(weights: Mapping[str, mx.array]) -> bool:
    """Whether any block still has its branches."""
    return any(_BRANCH.search(name) for name in weights)


def _blocks(weights: Mapping[str, mx.array], *parts: str) -> list[str]:
    """The prefixes (ending in a dot) in front of any of these parts of a name."""
    inner = "|".join(re.escape(part) for part in parts)
    pattern = re.compile(rf"(.*\.|)(?:{inner})\..*")
    matches = (pattern.fullmatch(name) for name in weights)
    return sorted({match[1] for match in matches if match})


class _Branches:
    """Takes the arrays of branches out of the weights, puts merged ones in.

    A merged kernel gets the dtype of the kernels taken before it.
    """

    def __init__(self, weights: Arrays) -> None:
        self._weights = weights
        self._dtype = mx.float32

    def take(self, name: str) -> mx.array:
        if name not in self._weights:
            raise UsageError(f"the checkpoint lacks {name}, a part of an un-fused block")
        array = self._weights.pop(name)
        if array.ndim == 4:
            self._dtype = array.dtype
        return array.astype(mx.float32)

    def put(self, name: str, kernel: Kernel) -> None:
        if f"{name}.weight" in self._weights:
            raise UsageError(f"the checkpoint has {name} both merged and in branches")
        weight, bias = kernel
        self._weights[f"{name}.weight"] = weight.astype(self._dtype)
        self._weights[f"{name}.bias"] = bias.astype(self._dtype)

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self._weights)

    def norm(self, prefix: str) -> Kernel:
        """Gain and shift [C] of a BatchNorm with its running statistics."""
        gain, shift = self.take(f"{prefix}weight"), self.take(f"{prefix}bias")
        mean, var = self.take(f"{prefix}running_mean"), self.take(f"{prefix}running_var")
        gain = gain * mx.rsqrt(var + BN_EPS)
        return gain, shift - mean * gain

    def convolution(self, prefix: str) -> Kernel:
        """conv (without bias) followed by bn."""
        weight = self.take(f"{prefix}conv.weight")
        gain, shift = self.norm(f"{prefix}bn.")
        return weight * gain[:, None, None, None], shift


def _identity(channels: int, inner: int, size: int) -> mx.array:
    """The kernel [C, inner, k, k] of the identity, where inner = C / groups.

    Output channel i reads input i, which is input i mod inner of its group, at the centre.
    """
    pick = (mx.arange(channels) % inner)[:, None] == mx.arange(inner)[None, :]
    return _grow(pick.astype(mx.float32)[:, :, None, None], size)


def _grow(weight: mx.array, size: int) -> mx.array:
    """Zero-pad a kernel [O, I, k, k] around its centre to [O, I, size, size]."""
    edge = (size - weight.shape[2]) // 2
    return mx.pad(weight, [(0, 0), (0, 0), (edge, edge), (edge, edge)])


def _skip(tower: _Branches, prefix: str, like: mx.array) -> Kernel:
    """A BatchNorm-only branch as a kernel of the shape of `like`."""
    gain, shift = tower.norm(prefix)
    channels, inner, size, _ = like.shape
    return _identity(channels, inner, size) * gain[:, None, None, None], shift


def _add(left: Kernel, right: Kernel) -> Kernel:
    size = max(left[0].shape[2], right[0].shape[2])
    return _grow(left[0], size) + _grow(right[0], size), left[1] + right[1]


def _mobile_one(tower: _Branches, block: str) -> Kernel:
    """The sum of the k x k, the 1x1 and the BatchNorm-only branches."""
    kernel = tower.convolution(f"{block}rbr_conv.0.")
    index = 1
    while tower.has(f"{block}rbr_conv.{index}."):
        kernel = _add(kernel, tower.convolution(f"{block}rbr_conv.{index}."))
        index += 1
    if tower.has(f"{block}rbr_scale."):
        kernel = _add(kernel, tower.convolution(f"{block}rbr_scale."))
    if tower.has(f"{block}rbr_skip."):
        kernel = _add(kernel, _skip(tower, f"{block}rbr_skip.", kernel[0]))
    return kernel


def _rep_mixer(tower: _Branches, block: str) -> Kernel:
    """x + s * (mixer(x) - norm(x)) as one kernel; s is 1 where there is no layer scale."""
    weight, bias = _mobile_one(tower, f"{block}mixer.")
    norm_weight, norm_bias = _skip(tower, f"{block}norm.rbr_skip.", weight)
    weight, bias = weight - norm_weight, bias - norm_bias
    if tower.has(f"{block}layer_scale"):
        scale = tower.take(f"{block}layer_scale").reshape(-1)
        weight, bias = weight * scale[:, None, None, None], bias * scale
    channels, inner, size, _ = weight.shape
    return weight + _identity(channels, inner, size), bias


def _large_kernel(tower: _Branches, block: str) -> Kernel:
    kernel = tower.convolution(f"{block}lkb_origin.")
    if tower.has(f"{block}small_conv."):
        kernel = _add(kernel, tower.convolution(f"{block}small_conv."))
    return kernel


def _position_encoding(tower: _Branches, block: str) -> Kernel:
    """x + pe(x) as one kernel."""
    weight, bias = tower.take(f"{block}pe.weight"), tower.take(f"{block}pe.bias")
    channels, inner, size, _ = weight.shape
    return weight + _identity(channels, inner, size), bias
