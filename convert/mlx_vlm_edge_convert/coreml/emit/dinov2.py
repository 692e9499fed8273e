"""DINOv2 as MIL: [1, 3, H, W] pixels of 0..255 -> hidden states [1, C, 1, 1 + N].

The class token comes first. The weights are the folded ones of `mlx_vlm_edge.vision.dinov2`. Site:
`stream`, all of the residual stream.
"""

from collections.abc import Sequence

from mlx_vlm_edge.vision.dinov2 import Dinov2, Layer, SwiGLU

from .network import Network, Value, numpy
from .vit import SITE, attended, behind, embedding


def emit(
    net: Network, tower: Dinov2, image: Value, mean: Sequence[float], std: Sequence[float]
) -> Value:
    """The whole tower."""
    table = numpy(tower.position_embedding)
    first = tower.class_embedding
    x = embedding(net, tower.patch_embedding, first, image, table, mean, std, SITE)
    for index, layer in enumerate(tower.layers):
        x = _layer(net, layer, x, f"layer{index}")
    norm = tower.norm
    bare = net.norm(x, norm.eps, "last_norm")
    return net.affine(bare, numpy(norm.weight), numpy(norm.bias), "last_norm_affine")


def _layer(net: Network, layer: Layer, x: Value, name: str) -> Value:
    x = attended(net, layer.norm1, layer.attention, x, name)
    y, mlp = net.norm(x, layer.norm2.eps, f"{name}_norm2"), layer.mlp
    if isinstance(mlp, SwiGLU):
        weight, bias = behind(layer.norm2, mlp.weights_in)
        both = net.linear(y, weight, bias, f"{name}_in")
        gate, up = net.split(both, 2, 1, f"{name}_halves")
        silu = net.mul(gate, net.sigmoid(gate, f"{name}_sigmoid"), f"{name}_silu")
        y, last = net.mul(silu, up, f"{name}_gated"), mlp.weights_out
    else:
        weight, bias = behind(layer.norm2, mlp.fc1)
        y = net.activation(net.linear(y, weight, bias, f"{name}_fc1"), "gelu", f"{name}_gelu")
        last = mlp.fc2
    y = net.linear(y, numpy(last.weight), numpy(last.bias), f"{name}_out", SITE)
    return net.add(x, y, name)
