"""CLIP and SigLIP against transformers' towers, layer by layer."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_vlm_edge.checkpoint.weights import Weights
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.vision import vit
from mlx_vlm_edge.vision.vit import ViT, ViTConfig, fold

from ..parity import FLOAT32, distance
from ..reference import vit as theirs

PREFIX = "vision_model."


@pytest.fixture(scope="module", params=["clip", "siglip"])
def tower(request):
    return theirs.build(request.param)


def ours(tower, layer, *, post_norm=False):
    config = ViTConfig.from_dict(tower.config, layer, post_norm=post_norm)
    weights = Weights({k: mx.array(v) for k, v in tower.weights().items()})
    model = ViT(config)
    folded = fold(weights, PREFIX, config)
    weights.finish()
    expected = {name: p.shape for name, p in tree_flatten(model.parameters())}
    assert expected == {name: array.shape for name, array in folded.items()}
    model.update(tree_unflatten(list(folded.items())))
    return model


def side(tower):
    return tower.config["image_size"]


@pytest.mark.parametrize("layer", [0, 1, 2, 3, 4])
def test_every_layer_is_transformers(tower, layer):
    x = theirs.pixels(1, side(tower), 2)
    model = ours(tower, layer)
    assert len(model.layers) == layer
    assert distance(model(mx.array(x)), tower.hidden_states(x)[layer]) < FLOAT32


def test_layers_are_counted_from_the_end_as_well(tower):
    assert ViTConfig.from_dict(tower.config, -1).layers == 4
    assert ViTConfig.from_dict(tower.config, -2).layers == 3
    for layer in (5, -6):
        with pytest.raises(UsageError, match="has 4"):
            ViTConfig.from_dict(tower.config, layer)


def test_the_final_norm_when_it_is_asked_for():
    tower = theirs.build("siglip")
    x = theirs.pixels(2, side(tower))
    model = ours(tower, -1, post_norm=True)
    assert distance(model(mx.array(x)), tower.last(x)) < FLOAT32


def test_given_positions_and_a_patch_mask():
    """As Idefics3 uses them: patches of a smaller picture, the rest of the canvas hidden."""
    tower = theirs.build("siglip", image_size=56)
    model = ours(tower, -1)
    x = theirs.pixels(3, 56)
    whole = model(mx.array(x), positions=mx.arange(16)[None])
    assert distance(whole, tower.hidden_states(x)[-1]) < FLOAT32
    backwards = mx.arange(16)[::-1]
    turned = model(mx.array(x), positions=backwards[None])
    model.position_embedding = model.position_embedding[backwards]
    assert distance(turned, model(mx.array(x))) < FLOAT32 < distance(turned, whole)
    order = np.array([0, 1, 4, 5, 8, 9, 12, 13])  # the left half of the grid
    mask = np.zeros((1, 1, 1, 16), bool)
    mask[..., order] = True
    hidden = x.copy()
    hidden[:, :, 28:] = 9
    a, b = (
        model(mx.array(image), mask=mx.array(mask))[:, mx.array(order)] for image in (x, hidden)
    )
    assert distance(a, b) < FLOAT32
    assert distance(model(mx.array(hidden))[:, mx.array(order)], b) > 0.1


def test_bfloat16_is_no_further_off_than_transformers(tower):
    import copy

    import torch

    x = theirs.pixels(4, side(tower))
    want = tower.hidden_states(x)[3]
    half = copy.deepcopy(tower.model).to(torch.bfloat16)
    with torch.no_grad():
        pixels = torch.from_numpy(x).permute(0, 3, 1, 2).to(torch.bfloat16)
        states = half(pixel_values=pixels, output_hidden_states=True).hidden_states
    model = ours(tower, 3)
    model.apply(lambda p: p.astype(mx.bfloat16))
    got = model(mx.array(x).astype(mx.bfloat16))
    assert got.dtype == mx.bfloat16
    assert distance(got.astype(mx.float32), want) < 1.4 * distance(states[3].float(), want)


@pytest.mark.parametrize("other", ["quick_gelu", "gelu_pytorch_tanh"])
def test_the_other_activation_is_caught(tower, monkeypatch, other):
    right = vit.KINDS[tower.config["model_type"]].hidden_act
    monkeypatch.setitem(vit.ACTIVATIONS, right, vit.ACTIVATIONS[other])
    x = theirs.pixels(1, side(tower))
    off = distance(ours(tower, 3)(mx.array(x)), tower.hidden_states(x)[3])
    assert (off < FLOAT32) == (right == other)
    assert right == other or off > 5 * FLOAT32


@pytest.mark.parametrize("fault", ["layer", "norm eps", "patch order", "q and k", "out bias"])
def test_a_fault_is_caught(tower, fault):
    x = theirs.pixels(1, side(tower))
    model = ours(tower, 4 if fault == "layer" else 3)
    if fault == "norm eps":
        for layer in model.layers:
            layer.layer_norm1.eps = 1e-2
    elif fault == "patch order":
        weight = model.patch_embedding.proj.weight
        shape = weight.shape
        model.patch_embedding.proj.weight = (
            weight.reshape(-1, 14, 14, 3).swapaxes(1, 2).reshape(shape)
        )
    elif fault == "q and k":
        for layer in model.layers:
            q, k, v = mx.split(layer.self_attn.qkv.bias, 3)
            layer.self_attn.qkv.bias = mx.concatenate([k, q, v])
    elif fault == "out bias":
        model.layers[1].self_attn.out_proj.bias = mx.zeros(64)
    assert distance(model(mx.array(x)), tower.hidden_states(x)[3]) > 5 * FLOAT32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "'relu'"),
        ({"model_type": "vit"}, "'vit'"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(change, message):
    config = {"model_type": "clip_vision_model", **theirs.GEOMETRY, **change}
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(UsageError, match=message):
        ViTConfig.from_dict(config, -2)


def test_a_misshapen_or_missing_weight_is_refused(tower):
    config = ViTConfig.from_dict(tower.config, -2)
    name = f"{PREFIX}encoder.layers.1.mlp.fc1.weight"
    for change, message in (
        (lambda w: w.pop(name), "lacks"),
        (lambda w: w.update({name: w[name][:-1]}), "by its config"),
    ):
        weights = {k: mx.array(v) for k, v in tower.weights().items()}
        change(weights)
        with pytest.raises(UsageError, match=message):
            fold(Weights(weights), PREFIX, config)


def test_what_is_not_wanted_is_not_loaded(tower):
    """Of 4 layers, 3 are run: nothing of the last one, nor a final norm, is a parameter."""
    names = {name for name, _ in tree_flatten(ours(tower, -2).parameters())}
    assert not any("layers.3" in name or "post" in name for name in names)


@pytest.mark.parametrize(
    ("kind", "eps", "activation"),
    [("clip_vision_model", 1e-5, "quick_gelu"), ("siglip_vision_model", 1e-6, "gelu_pytorch_tanh")],
)
def test_what_a_config_leaves_out_is_its_kind_s(kind, eps, activation):
    config = {
        "model_type": kind, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    parsed = ViTConfig.from_dict(config, -2)
    assert (parsed.layer_norm_eps, parsed.hidden_act) == (eps, activation)
    assert ViTConfig.from_dict(config | {"layer_norm_eps": 0.5}, -2).layer_norm_eps == 0.5
