"""Merging training-form branches gives the weights of the fused model, and the same function."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_vlm_edge_convert import reparam
from mlx_vlm_edge_convert.families import fastvlm

from mlx_vlm_edge.errors import UsageError

TOWER = fastvlm.TOWER


@pytest.fixture
def unfused(golden):
    return mx.load(str(golden / "encoder_timm_trainform.safetensors"))


@pytest.fixture
def fused(golden):
    """Apple's fused tower of the golden model, under native names."""
    weights = mx.load(str(golden / "model_apple_llava.safetensors"))
    return {k: v for k, v in fastvlm.rename(weights).items() if k.startswith(TOWER)}


def renamed(tower):
    """timm's tower by the way that transformers' checkpoints take, -> native names."""
    return fastvlm.rename({f"{fastvlm.TIMM_TOWER}{name}": array for name, array in tower.items()})


def test_merged_branches_equal_the_fused_golden_weights(unfused, fused):
    merged = renamed(unfused)
    assert set(merged) == set(fused) - {f"{TOWER}head.proj"}
    for name, array in merged.items():
        assert array.shape == fused[name].shape, name
        assert float(mx.max(mx.abs(array - fused[name]))) < 1e-6, name


def test_a_fused_checkpoint_passes_through_untouched(fused):
    assert not reparam.is_training_form(fused)
    merged = reparam.merge(fused)
    assert all(merged[name] is array for name, array in fused.items())


def test_the_training_form_is_recognised(unfused):
    renamed = fastvlm.apply(fastvlm._timm_tower("", unfused), unfused, "timm")
    assert reparam.is_training_form(renamed)
    assert not reparam.is_training_form(reparam.merge(renamed))


def random_norm(prefix: str, channels: int, rng: np.random.Generator) -> dict[str, mx.array]:
    values = {
        "weight": rng.uniform(0.5, 1.5, channels),
        "bias": rng.normal(size=channels),
        "running_mean": rng.normal(size=channels),
        "running_var": rng.uniform(0.5, 2, channels),
    }
    return {f"{prefix}.{k}": mx.array(v.astype(np.float32)) for k, v in values.items()}


def run_norm(weights: dict[str, mx.array], prefix: str, x: mx.array) -> mx.array:
    gain, shift, mean, var = (
        weights[f"{prefix}.{k}"] for k in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / mx.sqrt(var + 1e-5) * gain + shift


def conv(x: mx.array, weight: mx.array, groups: int) -> mx.array:
    """An NHWC convolution by a PyTorch kernel, "same" padding."""
    return mx.conv2d(x, weight.transpose(0, 2, 3, 1), padding=weight.shape[2] // 2, groups=groups)


@pytest.mark.parametrize("groups", [8, 1, 2])
def test_a_mobile_one_block_keeps_its_function(groups):
    rng = np.random.default_rng(groups)
    weights = {
        "b.rbr_conv.0.conv.weight": mx.array(
            rng.normal(size=(8, 8 // groups, 3, 3)).astype(np.float32)
        ),
        "b.rbr_scale.conv.weight": mx.array(
            rng.normal(size=(8, 8 // groups, 1, 1)).astype(np.float32)
        ),
        **random_norm("b.rbr_conv.0.bn", 8, rng),
        **random_norm("b.rbr_scale.bn", 8, rng),
        **random_norm("b.rbr_skip", 8, rng),
    }
    x = mx.array(rng.normal(size=(1, 6, 5, 8)).astype(np.float32))
    want = run_norm(weights, "b.rbr_skip", x)
    for branch in ("rbr_conv.0", "rbr_scale"):
        y = conv(x, weights[f"b.{branch}.conv.weight"], groups)
        want = want + run_norm(weights, f"b.{branch}.bn", y)
    merged = reparam.merge(weights)
    assert set(merged) == {"b.reparam_conv.weight", "b.reparam_conv.bias"}
    got = conv(x, merged["b.reparam_conv.weight"], groups) + merged["b.reparam_conv.bias"]
    # "same" padding pads the branches' inputs with zeros as well, so edges agree too
    assert mx.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_position_encoding_gets_its_identity():
    weights = {"net.6.pe.weight": mx.zeros((4, 1, 7, 7)), "net.6.pe.bias": mx.ones((4,))}
    merged = reparam.merge(weights)
    kernel = np.array(merged["net.6.reparam_conv.weight"])
    assert kernel.sum() == 4
    assert (kernel[:, 0, 3, 3] == 1).all()
    assert merged["net.6.reparam_conv.bias"].tolist() == [1, 1, 1, 1]


def test_the_sources_dtype_is_kept_and_the_sums_are_float32(unfused):
    half = {name: array.astype(mx.bfloat16) for name, array in unfused.items()}
    merged = renamed(half)
    assert {array.dtype for array in merged.values()} == {mx.bfloat16}
    exact = renamed({n: a.astype(mx.float32) for n, a in half.items()})
    for name, array in merged.items():
        assert mx.array_equal(array, exact[name].astype(mx.bfloat16)), name


def test_a_missing_part_of_a_branch_is_named(unfused):
    name = "stages.0.blocks.0.token_mixer.mixer.conv_scale.bn.running_var"
    del unfused[name]
    with pytest.raises(UsageError, match=r"rbr_scale\.bn\.running_var"):
        renamed(unfused)


def test_a_planted_fault_in_a_branch_is_seen(unfused, fused):
    name = "final_conv.conv_scale.bn.weight"
    unfused[name] = unfused[name] * 1.01
    merged = renamed(unfused)
    conv_exp = f"{TOWER}conv_exp.reparam_conv.weight"
    assert float(mx.max(mx.abs(merged[conv_exp] - fused[conv_exp]))) > 1e-5
