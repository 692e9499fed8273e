"""FastViTHD's native weights -> the folded ones of `fastvit.py`, in float32.

BatchNorm goes into the convolution before it and the biases after it, layer scale into the last
matmul of its branch, a downsampling's two outputs per group into two depthwise convolutions.
"""

import mlx.core as mx

from ..checkpoint.weights import Weights
from .fastvit import VisionConfig

BN_EPS = 1e-5

Arrays = dict[str, mx.array]


def fold(weights: Weights, prefix: str, config: VisionConfig) -> Arrays:
    """Take every vision weight under `prefix` and give the parameters of FastViTHD.

    Raises UsageError for a missing or misshapen weight. `head.proj` (the CLIP head) is ignored.
    """
    folder = _Folder(weights, prefix)
    folded = _stem(folder, config)
    index = 0  # position in the published `network` list
    for stage, width in enumerate(config.embed_dims):
        out = f"stages.{stage}"
        entry = 0
        if stage:
            before = config.embed_dims[stage - 1]
            folded |= _downsample(
                folder, f"network.{index}", f"{out}.entry.0", before, width, config
            )
            index, entry = index + 1, 1
        if shape := config.pos_embs_shapes[stage]:
            name = f"network.{index}.reparam_conv"
            folded |= folder.depthwise(name, f"{out}.entry.{entry}", width, shape[0])
            index += 1
        for block in range(config.layers[stage]):
            source, target = f"network.{index}.{block}", f"{out}.blocks.{block}"
            if config.token_mixers[stage] == "attention":
                folded |= _attention_block(folder, source, target, width, config.hidden(stage))
            else:
                size = config.repmixer_kernel_size
                name = f"{source}.token_mixer.reparam_conv"
                folded |= folder.depthwise(name, f"{target}.mixer", width, size)
                scale = folder.take(f"{source}.layer_scale", 1, 1, width)
                folded |= _ffn(folder, source, target, scale, config.hidden(stage))
        index += 1
    weights.drop(f"{prefix}head.proj")
    return folded | _expansion(folder, config)


class _Folder:
    """Takes weights by their published names, in float32."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self._weights, self._prefix = weights, prefix

    def take(self, name: str, *shape: int) -> mx.array:
        return self._weights.take(self._prefix + name, *shape).astype(mx.float32)

    def depthwise(
        self, name: str, target: str, channels: int, size: int, multiplier: int = 1
    ) -> Arrays:
        """Grouped [m * C, k, k, 1] -> m arrays [C, k, k, 1], each one output of all groups."""
        out = channels * multiplier
        weight = self.take(f"{name}.weight", out, size, size, 1)
        bias = self.take(f"{name}.bias", out)
        parts = enumerate(mx.contiguous(part) for part in _by_output(weight, multiplier))
        return {
            **{f"{target}.weights.{index}": part for index, part in parts},
            f"{target}.bias": _by_output(bias, multiplier).flatten(),
        }

    def pointwise(self, name: str, inner: int, out: int) -> tuple[mx.array, mx.array]:
        """A 1x1 convolution as the weight [out, in] and bias [out] of a matmul."""
        weight = self.take(f"{name}.weight", out, 1, 1, inner).reshape(out, inner)
        return weight, self.take(f"{name}.bias", out)


def _by_output(array: mx.array, multiplier: int) -> mx.array:
    """[C * m, ...] with a group's outputs side by side -> [m, C, ...].

    m = 2: channels 0 1 2 3 4 5 -> (0 2 4), (1 3 5).
    """
    grouped = array.reshape(-1, multiplier, *array.shape[1:])
    return mx.contiguous(mx.moveaxis(grouped, 1, 0))


def _linear(target: str, weight: mx.array, bias: mx.array) -> Arrays:
    """A Dense layer of a weight [out, in]."""
    return {f"{target}.weight": weight.T, f"{target}.bias": bias}


def _stem(folder: _Folder, config: VisionConfig) -> Arrays:
    width, blocks = config.embed_dims[0], "patch_embed.blocks"
    return {
        "stem.conv.weight": folder.take(f"{blocks}.0.reparam_conv.weight", width, 3, 3, 3),
        "stem.conv.bias": folder.take(f"{blocks}.0.reparam_conv.bias", width),
        **folder.depthwise(f"{blocks}.1.reparam_conv", "stem.depthwise", width, 3),
        **_linear("stem.pointwise", *folder.pointwise(f"{blocks}.2.reparam_conv", width, width)),
    }


def _downsample(
    folder: _Folder, source: str, target: str, before: int, width: int, config: VisionConfig
) -> Arrays:
    multiplier, size = width // before, config.down_patch_size
    name = f"{source}.proj.0.lkb_reparam"
    depthwise = folder.depthwise(name, f"{target}.depthwise", before, size, multiplier)
    weight, bias = folder.pointwise(f"{source}.proj.1.reparam_conv", width, width)
    columns = mx.contiguous(_by_output(weight.T, multiplier).reshape(width, width).T)
    return depthwise | _linear(f"{target}.pointwise", columns, bias)


def _ffn(folder: _Folder, source: str, target: str, scale: mx.array, hidden: int) -> Arrays:
    """ConvFFN with its BatchNorm and the branch's layer scale [1, 1, C] folded."""
    width, conv = scale.size, f"{source}.convffn.conv"
    weight = folder.take(f"{conv}.conv.weight", width, 7, 7, 1)
    gain, shift = (folder.take(f"{conv}.bn.{name}", width) for name in ("weight", "bias"))
    mean, var = (folder.take(f"{conv}.bn.running_{name}", width) for name in ("mean", "var"))
    gain = gain * mx.rsqrt(var + BN_EPS)
    fc1, fc1_bias = folder.pointwise(f"{source}.convffn.fc1", width, hidden)
    fc2, fc2_bias = _scaled(*folder.pointwise(f"{source}.convffn.fc2", hidden, width), scale)
    return {
        f"{target}.ffn.depthwise.weights.0": weight * gain[:, None, None, None],
        **_linear(f"{target}.ffn.fc1", fc1, fc1_bias + fc1 @ (shift - mean * gain)),
        **_linear(f"{target}.ffn.fc2", fc2, fc2_bias),
    }


def _scaled(weight: mx.array, bias: mx.array, scale: mx.array) -> tuple[mx.array, mx.array]:
    row = scale.reshape(-1)
    return weight * row[:, None], bias * row


def _attention_block(folder: _Folder, source: str, target: str, width: int, hidden: int) -> Arrays:
    scale_1 = folder.take(f"{source}.layer_scale_1", 1, 1, width)
    scale_2 = folder.take(f"{source}.layer_scale_2", 1, 1, width)
    mixer, attention = f"{source}.token_mixer", f"{target}.attention"
    proj = folder.take(f"{mixer}.proj.weight", width, width)
    proj, proj_bias = _scaled(proj, folder.take(f"{mixer}.proj.bias", width), scale_1)
    return {
        f"{target}.norm.weight": folder.take(f"{source}.norm.weight", width),
        f"{target}.norm.bias": folder.take(f"{source}.norm.bias", width),
        f"{attention}.qkv.weight": folder.take(f"{mixer}.qkv.weight", 3 * width, width).T,
        **_linear(f"{attention}.proj", proj, proj_bias),
        **_ffn(folder, source, target, scale_2, hidden),
    }


def _expansion(folder: _Folder, config: VisionConfig) -> Arrays:
    width, out = config.embed_dims[-1], config.out_dim
    se = "conv_exp.se"
    return {
        **folder.depthwise("conv_exp.reparam_conv", "conv_exp.depthwise", width, 3, out // width),
        **_linear("conv_exp.reduce", *folder.pointwise(f"{se}.reduce", out, out // 16)),
        **_linear("conv_exp.expand", *folder.pointwise(f"{se}.expand", out // 16, out)),
    }
