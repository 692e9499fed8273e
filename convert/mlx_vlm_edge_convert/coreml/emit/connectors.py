"""Connectors as MIL: image features [1, C, h, w] -> visual tokens [1, D, h', w'].

Names of operations begin with `connector`. Features may lie at a site; tokens are true values.
"""

import mlx.nn as nn
import numpy as np

from mlx_vlm_edge.connectors.ldp import LDP, LN_EPS, POOLED, InvertedResidual, LDPv2, pooling_matrix
from mlx_vlm_edge.connectors.mlp import MLP
from mlx_vlm_edge.connectors.pixel_shuffle import PixelShuffle

from .network import Network, Value, numpy
from .toolkit import tools


def emit(net: Network, connector: nn.Module, x: Value) -> Value:
    """x: [1, C, h, w] in the grid's own shape where the connector needs it, else any."""
    if isinstance(connector, MLP):
        return mlp(net, connector, x)
    if isinstance(connector, LDP):
        x = mlp(net, connector.mlp, x)
        for index, block in enumerate(connector.blocks):
            x = _inverted_residual(net, block, x, f"connector_block{index}")
        return x
    if isinstance(connector, LDPv2):
        return _ldpv2(net, connector, x)
    if isinstance(connector, PixelShuffle):
        return _pixel_shuffle(net, connector, x)
    raise TypeError(f"no emitter for {type(connector).__name__}")


def _linear(net: Network, layer: nn.Linear, x: Value, name: str) -> Value:
    bias = numpy(layer.bias) if "bias" in layer else None
    return net.linear(x, numpy(layer.weight), bias, name)


def mlp(net: Network, connector: MLP, x: Value) -> Value:
    """Linear layers with exact GELU between them."""
    first, *rest = connector.layers[::2]
    x = _linear(net, first, x, "connector_0")
    for index, layer in enumerate(rest, 1):
        x = net.activation(x, "gelu", f"connector_gelu{index}")
        x = _linear(net, layer, x, f"connector_{index}")
    return x


def _depthwise(
    net: Network, weight: np.ndarray, bias: np.ndarray | None, x: Value, name: str, stride: int = 1
) -> Value:
    C, k = weight.shape[:2]
    kernel = weight.transpose(0, 3, 1, 2)
    return net.conv(x, kernel, bias, name, stride=stride, groups=C, pad=k // 2)


def _ldpv2(net: Network, connector: LDPv2, x: Value) -> Value:
    first, _, second = connector.mlp.layers
    x = net.activation(_linear(net, first, x, "connector_0"), "gelu", "connector_gelu")
    x = _linear(net, second, _pooled(net, x), "connector_1")
    peg = _depthwise(net, numpy(connector.peg), numpy(connector.peg_bias), x, "connector_peg")
    return net.add(x, peg, "connector")


def _pooled(net: Network, x: Value) -> Value:
    """Adaptive average pooling to POOLED x POOLED."""
    h, w = x.shape[2:]
    if h % POOLED == 0 and w % POOLED == 0:
        return net.average(x, (h // POOLED, w // POOLED), "connector_pool")
    rows, columns = (net.const(numpy(pooling_matrix(n, POOLED))) for n in (h, w))
    mb = tools().mb
    wide = mb.matmul(x=x.var, y=np.ascontiguousarray(columns.T), name="connector_pool_columns")
    return Value(mb.matmul(x=rows[None, None], y=wide, name="connector_pool"))


def _inverted_residual(net: Network, block: InvertedResidual, x: Value, name: str) -> Value:
    y = _depthwise(net, numpy(block.depthwise), None, x, f"{name}_depthwise", block.stride)
    y = _norm(net, block.norm1, y, f"{name}_norm1")
    y = net.mul(y, net.hard_sigmoid(y, f"{name}_hard"), f"{name}_swish")
    gate = net.average(y, y.shape[2:], f"{name}_mean")  # type: ignore[arg-type]
    gate = net.relu(_linear(net, block.reduce, gate, f"{name}_reduce"), f"{name}_relu")
    gate = net.hard_sigmoid(_linear(net, block.expand, gate, f"{name}_expand"), f"{name}_gate")
    y = _linear(net, block.pointwise, net.mul(y, gate, f"{name}_gated"), f"{name}_pointwise")
    y = _norm(net, block.norm2, y, f"{name}_norm2")
    return net.add(x, y, name) if block.stride == 1 else y


def _norm(net: Network, norm: nn.LayerNorm, x: Value, name: str) -> Value:
    bare = net.norm(x, LN_EPS, f"{name}_bare")
    return net.affine(bare, numpy(norm.weight), numpy(norm.bias), name)


def _pixel_shuffle(net: Network, connector: PixelShuffle, x: Value) -> Value:
    """Shuffle and matmul in one: a convolution whose kernel and stride are the scale."""
    s, weight = connector.scale, numpy(connector.proj.weight)
    out = weight.shape[0]
    kernel = weight.reshape(out, s, s, -1).transpose(0, 3, 1, 2)
    return net.conv(x, np.ascontiguousarray(kernel), None, "connector_shuffle", stride=s)
