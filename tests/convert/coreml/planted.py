"""Faults planted in saved packages, and weights whose activations leave float16."""

import struct
from pathlib import Path

import mlx.core as mx
from mlx_vlm_edge_convert.coreml.check.interpreter import BGR, RGB
from mlx_vlm_edge_convert.coreml.package.interface import blocks
from mlx_vlm_edge_convert.coreml.package.saved import Saved

from mlx_vlm_edge.vision.fastvit import AttentionBlock, DepthwiseConv, FastViTHD

DATA = Path("Data/com.apple.CoreML")
WEIGHTS = DATA / "weights" / "weight.bin"


def blue_first(package):
    """The picture is declared to be BGR."""
    saved = Saved(package)
    (picture,) = saved.spec.description.input
    assert picture.type.imageType.colorSpace == RGB
    picture.type.imageType.colorSpace = BGR
    (package / DATA / "model.mlmodel").write_bytes(saved.spec.SerializeToString())


def _operations(saved):
    ((_, _, block),) = blocks(saved)
    return block.operations


def gelu_to_relu(package):
    """The first activation that has a mode."""
    saved = Saved(package)
    op = next(op for op in _operations(saved) if op.type == "gelu")
    op.type = "relu"
    del op.inputs["mode"]
    (package / DATA / "model.mlmodel").write_bytes(saved.spec.SerializeToString())


def bias_zeroed(package):
    """The bias of the last convolution that has one in the weight file."""
    saved = Saved(package)
    convolutions = [op for op in _operations(saved) if op.type == "conv"]
    biases = {value.name for op in convolutions for value in op.inputs["bias"].arguments}
    stored = [
        op.attributes["val"].blobFileValue.offset
        for op in _operations(saved)
        if op.type == "const" and op.outputs[0].name in biases
        and op.attributes["val"].WhichOneof("value") == "blobFileValue"
    ]  # fmt: skip
    path = package / WEIGHTS
    content = bytearray(path.read_bytes())
    _, _, size, start = struct.unpack_from("<IIQQ", content, stored[-1])
    assert any(content[start : start + size])
    content[start : start + size] = bytes(size)
    path.write_bytes(content)


def blob_truncated(package):
    """The last kilobyte of the weight file."""
    path = package / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1024])


def transposed(package):
    """The features' channels and positions stay as they are."""
    saved = Saved(package)
    op = next(op for op in _operations(saved) if op.type == "transpose")
    name = op.inputs["perm"].arguments[0].name
    const = next(op for op in _operations(saved) if op.outputs and op.outputs[0].name == name)
    values = const.attributes["val"].immediateValue.tensor.ints.values
    values[1], values[2] = values[2], values[1]
    (package / DATA / "model.mlmodel").write_bytes(saved.spec.SerializeToString())


def amplify(tower: FastViTHD, index: int, gain: float) -> None:
    """Make a stage's residual stream larger by `gain` without changing what the tower computes
    (the epsilon of the norms aside): its values leave float16, its function does not change."""
    stage = tower.stages[index]
    first = next((x for x in stage.entry if "pointwise" not in x), None)
    entering = [first] if first is not None else []
    for block in stage.blocks:
        if isinstance(block, AttentionBlock):
            _grow(block.attention.proj, gain)
        elif entering:
            block.mixer.bias = block.mixer.bias * gain
        else:
            entering.append(block.mixer)
        block.ffn.fc1.weight = block.ffn.fc1.weight / gain
        _grow(block.ffn.fc2, gain)
    _grow(entering[0], gain)
    last = index + 1 == len(tower.stages)
    leaving = tower.conv_exp if last else tower.stages[index + 1].entry[0]
    leaving.depthwise.weights = [weight / gain for weight in leaving.depthwise.weights]
    mx.eval(tower.parameters())


def _grow(layer, gain: float) -> None:
    if isinstance(layer, DepthwiseConv):
        layer.weights = [weight * gain for weight in layer.weights]
    else:
        layer.weight = layer.weight * gain
    layer.bias = layer.bias * gain
