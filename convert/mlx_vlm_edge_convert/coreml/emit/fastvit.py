"""FastViTHD as MIL: [1, 3, H, W] pixels of 0..255 -> image features [1, C, H / 64, W / 64].

The weights are the folded ones of `mlx_vlm_edge.vision.fastvit`. Sites: `stage0` to `stage4`, the
residual streams. A stream is entered by the stage's first depthwise convolution and left by the
next downsampling, or by conv_exp.
"""

import numpy as np

from mlx_vlm_edge.kernels import by_output
from mlx_vlm_edge.vision.fastvit import (
    HEAD_DIM,
    LN_EPS,
    STRIDE,
    AttentionBlock,
    DepthwiseConv,
    Downsample,
    Expansion,
    FastViTHD,
    RepMixerBlock,
    Stage,
    Stem,
)

from .network import Network, Value, affine_folded, attention, image_folded, numpy

__all__ = ["STRIDE", "emit"]


def emit(net: Network, tower: FastViTHD, image: Value) -> Value:
    """The whole tower."""
    x = _stem(net, tower.stem, image)
    for index, stage in enumerate(tower.stages):
        x = _stage(net, stage, x, f"stage{index}")
    return _expansion(net, tower.conv_exp, x)


def _depthwise(
    net: Network, layer: DepthwiseConv, x: Value, name: str, site: str | None = None
) -> Value:
    """A group's outputs side by side: channel c * multiplier + j is output j of channel c."""
    weight = np.stack([numpy(output)[..., 0] for output in layer.weights], axis=1)
    C, m, k, _ = weight.shape
    bias = numpy(layer.bias).reshape(m, C).T.reshape(-1) if "bias" in layer else None
    return net.conv(
        x, weight.reshape(C * m, 1, k, k), bias, name, site,
        stride=layer.stride, groups=C, pad=k // 2,
    )  # fmt: skip


def _stem(net: Network, stem: Stem, image: Value) -> Value:
    weight = numpy(stem.conv.weight).transpose(0, 3, 1, 2)
    weight, bias = image_folded(weight, numpy(stem.conv.bias), (0, 0, 0), (1, 1, 1))
    x = net.conv(image, weight, bias, "stem_conv", stride=2, pad=1)
    x = net.activation(x, "gelu", "stem_conv_gelu")
    x = net.activation(_depthwise(net, stem.depthwise, x, "stem_depthwise"), "gelu", "stem_gelu")
    x = net.linear(
        x, numpy(by_output(stem.pointwise)), numpy(stem.pointwise.bias), "stem_pointwise"
    )  # fmt: skip
    return net.activation(x, "gelu", "stem")


def _stage(net: Network, stage: Stage, x: Value, site: str) -> Value:
    for layer in stage.entry:
        if isinstance(layer, Downsample):
            x = _downsample(net, layer, x, f"{site}_down")
        else:
            x = _depthwise(net, layer, x, f"{site}_position", site)
    for index, block in enumerate(stage.blocks):
        name = f"{site}_block{index}"
        if isinstance(block, RepMixerBlock):
            x = _depthwise(net, block.mixer, x, f"{name}_mixer", site)
        else:
            x = _attention(net, block, x, name, site)
        y = _depthwise(net, block.ffn.depthwise, x, f"{name}_depthwise", site)
        fc1, fc2 = block.ffn.fc1, block.ffn.fc2
        y = net.linear(y, numpy(by_output(fc1)), numpy(fc1.bias), f"{name}_fc1")
        y = net.activation(y, "gelu", f"{name}_gelu")
        y = net.linear(y, numpy(by_output(fc2)), numpy(fc2.bias), f"{name}_fc2", site)
        x = net.add(x, y, name)
    return x


def _downsample(net: Network, layer: Downsample, x: Value, name: str) -> Value:
    m = len(layer.depthwise.weights)
    x = net.activation(_depthwise(net, layer.depthwise, x, f"{name}_depthwise"), "gelu", name)
    weight = numpy(by_output(layer.pointwise))  # its columns come output after output
    out = weight.shape[0]
    weight = weight.reshape(out, m, -1).transpose(0, 2, 1).reshape(out, -1)
    x = net.linear(
        x, np.ascontiguousarray(weight), numpy(layer.pointwise.bias), f"{name}_pointwise"
    )
    return net.activation(x, "gelu", f"{name}_gelu")


def _attention(net: Network, block: AttentionBlock, x: Value, name: str, site: str) -> Value:
    weight = numpy(by_output(block.attention.qkv))
    C = weight.shape[1]
    weight, bias = affine_folded(weight, None, numpy(block.norm.weight), numpy(block.norm.bias))
    weight[:C] *= HEAD_DIM**-0.5
    bias[:C] *= HEAD_DIM**-0.5
    x = _at(net, x, f"{name}_in", site)
    qkv = net.linear(net.norm(x, LN_EPS, f"{name}_norm"), weight, bias, f"{name}_qkv")
    y = attention(net, qkv, C // HEAD_DIM, f"{name}_attention")
    proj = block.attention.proj
    y = net.linear(y, numpy(by_output(proj)), numpy(proj.bias), f"{name}_proj", site)
    return net.add(x, y, f"{name}_attended")


def _at(net: Network, x: Value, name: str, site: str) -> Value:
    """The value at the site: a stage without position encoding has no convolution to enter by."""
    if x.site == site:
        return x
    ones = np.ones(x.shape[1], np.float32)
    return net.affine(x, ones, 0 * ones, name, site)


def _expansion(net: Network, layer: Expansion, x: Value) -> Value:
    x = _depthwise(net, layer.depthwise, x, "expansion_depthwise")
    y = net.average(x, x.shape[2:], "expansion_mean")  # type: ignore[arg-type]
    y = net.linear(y, numpy(by_output(layer.reduce)), numpy(layer.reduce.bias), "expansion_reduce")
    y = net.relu(y, "expansion_relu")
    y = net.linear(y, numpy(by_output(layer.expand)), numpy(layer.expand.bias), "expansion_expand")
    gate = net.sigmoid(y, "expansion_gate")
    return net.activation(net.mul(x, gate, "expansion_gated"), "gelu", "expansion")
