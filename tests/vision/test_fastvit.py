"""FastViTHD against timm's, stage by stage, and proof that this would catch a fault."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map, tree_unflatten

from mlx_vlm_edge.checkpoint.weights import Weights
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.vision import fastvit
from mlx_vlm_edge.vision.fastvit import FastViTHD, VisionConfig
from mlx_vlm_edge.vision.fastvit_fold import fold

from ..parity import BFLOAT16_STAGE, FLOAT32, distance

PREFIX = "vision_tower.vision_model."
CONFIG = VisionConfig(layers=(1, 2, 1, 1, 1), embed_dims=(16, 32, 32, 64, 128))
SIZES = [(192, 192), (64, 64), (128, 192), (320, 64)]
Arrays = dict[str, np.ndarray]


def build(weights: Arrays, dtype: mx.Dtype = mx.float32) -> FastViTHD:
    arrays = {name: mx.array(array) for name, array in weights.items() if name.startswith(PREFIX)}
    source = Weights(arrays)
    tower = FastViTHD(CONFIG)
    tower.update(tree_unflatten(list(fold(source, PREFIX, CONFIG).items())))
    source.finish()
    tower.update(tree_map(lambda p: p.astype(dtype), tower.parameters()))
    return tower


def as_input(image: np.ndarray, dtype: mx.Dtype = mx.float32) -> mx.array:
    return (mx.array(image)[None].astype(mx.float32) / 255).astype(dtype)


def stages(
    tower: FastViTHD, image: np.ndarray, dtype: mx.Dtype = mx.float32
) -> dict[str, mx.array]:
    return {
        name: out[0].astype(mx.float32) for name, out in tower.stage_outputs(as_input(image, dtype))
    }


@pytest.fixture(scope="module")
def capture(reference) -> Callable[..., dict[str, np.ndarray]]:
    from ..reference import fastvlm

    return lambda image: fastvlm.capture(reference, image).tower


@pytest.fixture(scope="module")
def picture() -> Callable[..., np.ndarray]:
    from ..reference.fastvlm import picture

    return picture


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_every_stage_in_float32(capture, picture, native_weights, width, height):
    image = picture(1, width, height)
    want, got = capture(image), stages(build(native_weights), image)
    assert list(got) == ["stem", *(f"stage {i}" for i in range(5)), "conv_exp"]
    worst = {name: distance(got[name], want[name]) for name in want}
    assert max(worst.values()) < FLOAT32, worst


def test_every_stage_in_bfloat16_as_near_as_the_original(
    reference_bfloat16, capture, picture, native_weights
):
    from ..reference import fastvlm

    image = picture(1)
    want, theirs = capture(image), fastvlm.capture(reference_bfloat16, image).tower
    got = stages(build(native_weights, mx.bfloat16), image, mx.bfloat16)
    for name in want:
        allowed = BFLOAT16_STAGE * distance(theirs[name], want[name])
        assert distance(got[name], want[name]) < allowed < 0.15, name


def test_features_are_the_rows_of_the_map_in_reading_order(picture, native_weights):
    tower, image = build(native_weights), picture(2, 128, 192)
    features = tower(as_input(image))
    assert features.shape == (1, 3 * 2, 256)
    assert mx.array_equal(features[0, 2], stages(tower, image)["conv_exp"][1, 0])


def test_a_batch_is_its_images_one_by_one(picture, native_weights):
    tower = build(native_weights)
    images = [as_input(picture(seed)) for seed in (1, 2)]
    together = tower(mx.concatenate(images))
    for index, image in enumerate(images):
        assert distance(together[index], tower(image)[0]) < FLOAT32


@pytest.mark.parametrize(("width", "height"), [(100, 128), (128, 32), (65, 64)])
def test_other_sizes_are_refused(native_weights, width, height):
    with pytest.raises(UsageError, match=f"{width}x{height}.*64"):
        build(native_weights)(mx.zeros((1, height, width, 3)))


def test_signals_are_alive(capture, picture):
    """Two pictures differ at every stage by as much as the stage spreads."""
    first, second = capture(picture(1)), capture(picture(2))
    for name, stage in first.items():
        assert 0.1 < stage.std() < 10, name
        assert distance(second[name], stage) > 0.1, name


# Planted faults. Each changes code or weights; the distance must leave the tolerance far behind.


def _without(name: str, value: float) -> Callable[[Arrays], Arrays]:
    def change(weights: Arrays) -> Arrays:
        return {k: np.full_like(v, value) if name in k else v for k, v in weights.items()}

    return change


def _transposed_kernels(weights: Arrays) -> Arrays:
    square = {k: v for k, v in weights.items() if v.ndim == 4 and v.shape[1] == v.shape[2] > 1}
    return weights | {k: v.transpose(0, 2, 1, 3) for k, v in square.items()}


def _swapped_blocks(weights: Arrays) -> Arrays:
    """The two blocks of stage 1 in the other order."""
    first, second = f"{PREFIX}network.2.0.", f"{PREFIX}network.2.1."
    swapped = {}
    for name, array in weights.items():
        other = name.replace(first, "\0").replace(second, first).replace("\0", second)
        swapped[other] = array
    return swapped


def _swapped_outputs(weights: Arrays) -> Arrays:
    """conv_exp's channels as all first outputs, then all second ones."""
    name = f"{PREFIX}conv_exp.reparam_conv."
    return weights | {
        f"{name}{leaf}": np.concatenate([weights[f"{name}{leaf}"][i::2] for i in (0, 1)])
        for leaf in ("weight", "bias")
    }


@pytest.mark.parametrize(
    "fault",
    [
        _without("layer_scale", 1.0),
        _without("running_mean", 0.0),
        _without("running_var", 1.0),
        _without("se.expand.bias", 0.0),
        _without("token_mixer.proj.bias", 0.0),
        _transposed_kernels,
        _swapped_blocks,
        _swapped_outputs,
    ],
    ids=[
        "layer scale",
        "bn mean",
        "bn var",
        "se bias",
        "proj bias",
        "transposed",
        "blocks",
        "outputs",
    ],
)
def test_a_fault_in_the_weights_is_caught(capture, picture, native_weights, fault):
    image = picture(1)
    got = stages(build(fault(native_weights)), image)["conv_exp"]
    assert distance(got, capture(image)["conv_exp"]) > 50 * FLOAT32


def _tanh_gelu(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.tanh(0.7978845608 * (x + 0.044715 * x**3)))


CODE_FAULTS = {
    "tanh gelu": ("gelu", _tanh_gelu),
    "no gelu": ("gelu", lambda x: x),
    "eps of the layer norm": ("LN_EPS", 1e-2),
    "missing residual": ("RepMixerBlock.__call__", lambda self, x: self.ffn(self.mixer(x))),
    "doubled residual": (
        "RepMixerBlock.__call__",
        lambda self, x: (y := x + self.mixer(x)) + self.ffn(y),
    ),
    "missing attention": ("AttentionBlock.__call__", lambda self, x: x + self.ffn(x)),
    "missing position encoding": ("Stage.__call__", None),
}


def _stage_without_position_encoding(self: fastvit.Stage, x: mx.array) -> mx.array:
    for layer in (*self.entry[:1], *self.blocks):
        x = layer(x)
    return x


@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_a_fault_in_the_code_is_caught(capture, picture, native_weights, monkeypatch, fault):
    target, replacement = CODE_FAULTS[fault]
    image = picture(1)
    monkeypatch.setattr(
        f"{fastvit.__name__}.{target}", replacement or _stage_without_position_encoding
    )
    got = stages(build(native_weights), image)["conv_exp"]
    assert distance(got, capture(image)["conv_exp"]) > 10 * FLOAT32


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("missing", lambda w, k: w.pop(k), "lacks"),
        ("misshapen", lambda w, k: w.update({k: w[k][:-1]}), "by its config"),
        (
            "extra",
            lambda w, k: w.update({f"{PREFIX}network.0.7.layer_scale": w[k]}),
            "no model part",
        ),
    ],
)
def test_wrong_weights_are_refused(native_weights, name, change, message):
    weights = dict(native_weights)
    change(weights, f"{PREFIX}network.0.0.convffn.fc1.bias")
    with pytest.raises(UsageError, match=message):
        build(weights)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": (1, 2)},
        {"token_mixers": ("repmixer",) * 4 + ("pool",)},
        {"embed_dims": (16, 32, 32, 64, 120)},
        {"embed_dims": (16, 24, 32, 64, 128)},
    ],
)
def test_wrong_geometry_is_refused(wrong):
    with pytest.raises(UsageError, match="vision_config"):
        VisionConfig(**wrong)
