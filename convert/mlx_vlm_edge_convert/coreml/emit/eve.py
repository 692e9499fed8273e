"""EVE's patch embeddings as MIL: [1, 3, H, W] of 0..255 -> features [1, C, 1, 1 + h (w + 1)].

Windows attend to their own patches without leaving the grid: the patches at one place of every
window are a strided slice. Source of the layers: `mlx_vlm_edge.vision.eve`.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_vlm_edge.vision.eve import HEADS, ConvPatchEmbedding, CrossAttention, PatchEmbedding

from .network import Network, Value, affine_folded, image_folded, numpy
from .toolkit import tools


def emit(
    net: Network,
    tower: PatchEmbedding | ConvPatchEmbedding,
    image: Value,
    mean: Sequence[float],
    std: Sequence[float],
) -> Value:
    """Tokens of either version, in reading order."""
    if isinstance(tower, ConvPatchEmbedding):
        patches, _, dense = tower.patch_embedding
        x = _first(net, numpy(patches.weight), numpy(patches.bias), image, mean, std)
        kernel, bias = numpy(dense.weight).transpose(0, 3, 1, 2), numpy(dense.bias)
        x = net.activation(x, "gelu", "patches_gelu")
        tokens = net.conv(x, kernel, bias, "dense", stride=kernel.shape[2])
        first = Value(net.const(numpy(tower.class_embedding).reshape(1, -1, 1, 1)))
    else:
        patches = _first(net, numpy(tower.patch_embedding.weight), None, image, mean, std)
        tokens = _local(net, tower.local_attention, patches, tower.window)
        first = _global(net, tower.global_attention, tower.class_embedding, tokens)
    return _in_rows(net, tokens, first, numpy(tower.split_embedding))


def _first(
    net: Network,
    weight: np.ndarray,
    bias: np.ndarray | None,
    image: Value,
    mean: Sequence[float],
    std: Sequence[float],
) -> Value:
    folded, shift = image_folded(weight.transpose(0, 3, 1, 2), bias, mean, std)
    return net.conv(image, folded, shift, "patches", stride=weight.shape[1])


def _keys_values(net: Network, layer: CrossAttention, x: Value, name: str) -> list[Value]:
    norm, linear = layer.kv
    weight, bias = affine_folded(
        numpy(linear.weight), None, numpy(norm.weight), numpy(norm.bias)
    )  # fmt: skip
    kv = net.linear(net.norm(x, norm.eps, f"{name}_kv_norm"), weight, bias, f"{name}_kv")
    return net.split(kv, 2, 1, f"{name}_kv_split")


def _local(net: Network, layer: CrossAttention, patches: Value, n: int) -> Value:
    """One query per window, the mean of its patches, over these patches."""
    query = net.average(patches, (n, n), "local_mean")
    _, C, h, w = query.shape
    norm, linear = layer.q
    weight, bias = affine_folded(
        numpy(linear.weight), None, numpy(norm.weight), numpy(norm.bias)
    )  # fmt: skip
    scale = C**-0.5
    bare = net.norm(query, norm.eps, "local_q_norm")
    q = net.linear(bare, weight * scale, bias * scale, "local_q")
    key, value = _keys_values(net, layer, patches, "local")
    sums = np.ones((HEADS, C // HEADS, 1, 1), np.float32)  # adds a head's channels up
    scores, values = [], []
    for place in range(n * n):
        k = net.mul(q, _every(key, place, n, f"local_k{place}"), f"local_qk{place}")
        score = net.conv(k, sums, None, f"local_score{place}", groups=HEADS)
        scores.append(net.reshape(score, (1, HEADS, 1, h * w), f"local_score{place}_row"))
        v = _every(value, place, n, f"local_v{place}")
        values.append(net.reshape(v, (HEADS, C // HEADS, 1, h * w), f"local_v{place}_heads"))
    weights = net.softmax(net.concat(scores, 2, "local_scores"), 2, "local_softmax")
    mixed: list[Value] = []
    for place, part in enumerate(net.split(weights, n * n, 2, "local_weights")):
        share = net.reshape(part, (HEADS, 1, 1, h * w), f"local_weight{place}")
        mixed.append(net.mul(values[place], share, f"local_mix{place}"))
    total = mixed[0]
    for place, more in enumerate(mixed[1:], 1):
        total = net.add(total, more, f"local_sum{place}")
    out = net.reshape(total, (1, C, h, w), "local_out")
    y = net.linear(out, numpy(layer.proj.weight), numpy(layer.proj.bias), "local_proj")
    return net.add(query, y, "local")


def _every(x: Value, place: int, n: int, name: str) -> Value:
    """Of [1, C, n h, n w], the values at one place of every n x n window: [1, C, h, w]."""
    begin, end = [0, 0, place // n, place % n], list(x.shape)
    return Value(
        tools().mb.slice_by_index(x=x.var, begin=begin, end=end, stride=[1, 1, n, n], name=name)
    )


def _global(net: Network, layer: CrossAttention, query: mx.array, tokens: Value) -> Value:
    """The class token over all tokens: its query does not depend on the picture. [1, C, 1, 1]"""
    _, C, h, w = tokens.shape
    q = numpy(layer.q[1](layer.q[0](query[None]))).reshape(HEADS, C // HEADS, 1, 1) * C**-0.5
    key, value = _keys_values(net, layer, tokens, "global")
    scores = net.conv(key, q, None, "global_scores", groups=HEADS)
    row = net.reshape(scores, (1, HEADS, 1, h * w), "global_scores_row")
    weights = net.softmax(row, -1, "global_softmax")
    v = net.reshape(value, (1, HEADS, C // HEADS, h * w), "global_v")
    mixed = net.matmul(v, weights, "global_mix", y_t=True)
    out = net.reshape(mixed, (1, C, 1, 1), "global_out")
    bias = numpy(layer.proj.bias) + numpy(query)  # the residual is constant as well
    return net.linear(out, numpy(layer.proj.weight), bias, "global")


def _in_rows(net: Network, tokens: Value, first: Value, last: np.ndarray) -> Value:
    """The class token, then rows that each end in the split token: [1, C, 1, N]."""
    _, C, h, w = tokens.shape
    ends = np.broadcast_to(last.reshape(1, C, 1, 1), (1, C, h, 1))
    rows = net.concat([tokens, Value(net.const(ends))], 3, "rows")
    row = net.reshape(rows, (1, C, 1, h * (w + 1)), "row")
    return net.concat([first, row], 3, "features")
