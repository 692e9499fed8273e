"""ConvNeXt as MIL: [1, 3, H, W] pixels of 0..255 -> image features [1, C, H / s, W / s].

The weights are the folded ones of `mlx_vlm_edge.vision.convnext`. Sites: `stage0`, `stage1`, ...,
the residual streams, entered by the stem's norm or a downsampling.
"""

from collections.abc import Sequence

import numpy as np

from mlx_vlm_edge.kernels import by_output
from mlx_vlm_edge.vision.convnext import KERNEL, Block, ConvNeXt, Patches, Stage

from .network import Network, Value, affine_folded, image_folded, numpy


def emit(
    net: Network, tower: ConvNeXt, image: Value, mean: Sequence[float], std: Sequence[float]
) -> Value:
    """The whole tower."""
    return stages(net, tower, image, mean, std)[-1]


def stages(
    net: Network, tower: ConvNeXt, image: Value, mean: Sequence[float], std: Sequence[float]
) -> list[Value]:
    """Every stage's output [1, C, h, w]."""
    stem, norm = tower.stem, tower.norm
    weight, bias = image_folded(_kernel(stem), numpy(stem.proj.bias), mean, std)
    x = net.conv(image, weight, bias, "stem", stride=stem.size)
    bare = net.norm(x, norm.eps, "stem_norm")
    x = net.affine(bare, numpy(norm.weight), numpy(norm.bias), "stem_affine", "stage0")
    outputs: list[Value] = []
    for index, stage in enumerate(tower.stages):
        x = _stage(net, stage, x, f"stage{index}")
        outputs.append(x)
    return outputs


def _kernel(patches: Patches) -> np.ndarray:
    """A matmul over whole patches as a convolution's weight [out, in, size, size]."""
    weight, size = numpy(by_output(patches.proj)), patches.size
    return weight.reshape(weight.shape[0], size, size, -1).transpose(0, 3, 1, 2)


def _stage(net: Network, stage: Stage, x: Value, site: str) -> Value:
    if "downsample" in stage:
        norm, weight = stage.norm, _kernel(stage.downsample)
        gain, offset = numpy(norm.weight)[None, :, None, None], numpy(norm.bias)
        bias = numpy(stage.downsample.proj.bias) + (weight.sum((2, 3)) @ offset)
        bare = net.norm(x, norm.eps, f"{site}_norm")
        x = net.conv(bare, weight * gain, bias, f"{site}_down", site, stride=stage.downsample.size)
    for index, block in enumerate(stage.blocks):
        x = _block(net, block, x, f"{site}_block{index}", site)
    return x


def _block(net: Network, block: Block, x: Value, name: str, site: str) -> Value:
    kernel = np.ascontiguousarray(numpy(block.depthwise).transpose(0, 3, 1, 2))
    y = net.conv(
        x, kernel, numpy(block.bias), f"{name}_depthwise", groups=kernel.shape[0], pad=KERNEL // 2
    )
    fc1, fc2, norm = block.fc1, block.fc2, block.norm
    weight, bias = affine_folded(
        numpy(by_output(fc1)), numpy(fc1.bias), numpy(norm.weight), numpy(norm.bias)
    )
    y = net.linear(net.norm(y, norm.eps, f"{name}_norm"), weight, bias, f"{name}_fc1")
    y = net.activation(y, "gelu", f"{name}_gelu")
    y = net.linear(y, numpy(by_output(fc2)), numpy(fc2.bias), f"{name}_fc2", site)
    return net.add(x, y, name)
