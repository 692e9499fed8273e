"""MoE-LLaVA's three decoders without experts against mlx-lm's of the same base models."""

from importlib import import_module

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_vlm_edge.checkpoint.weights import Weights
from mlx_vlm_edge.language import moe_llava
from mlx_vlm_edge.models.moe_llava import rename

from ..parity import FLOAT32, distance

SIZES = {
    "hidden_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "num_key_value_heads": 4, "rope_theta": 10000.0,
}  # fmt: skip
# What each base says beside, and mlx-lm's words for it.
OURS = {
    "stablelm": {"intermediate_size": 96, "rope_pct": 0.25, "norm_eps": 1e-5, "use_qkv_bias": True},
    "phi": {"intermediate_size": 96, "partial_rotary_factor": 0.4},
    "qwen": {"intermediate_size": 192, "kv_channels": 40, "no_bias": True},
}
THEIRS = {
    "stablelm": {"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5},
    "phi": {},
    "qwen": {},
}


@pytest.mark.parametrize("base", OURS)
def test_a_dense_model_is_mlx_lms(base):
    mx.random.seed(2)
    config = SIZES | OURS[base]
    module = import_module(f"mlx_lm.models.{base}")
    args = module.ModelArgs.from_dict(config | THEIRS[base] | {"model_type": base})
    theirs = module.Model(args)
    drawn = {
        name: mx.random.normal(array.shape) * (array.shape[-1] ** -0.5 if array.ndim > 1 else 0.2)
        + name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
        for name, array in tree_flatten(theirs.parameters())
    }
    if "lm_head.bias" in drawn:  # which MoE-LLaVA's Phi has not
        drawn["lm_head.bias"] *= 0
    theirs.update(tree_unflatten(list(drawn.items())))
    drawn.pop("lm_head.bias", None)
    dense = {"moe_layers_idx": [], "num_experts": []}
    ours = moe_llava.LanguageModel(moe_llava.TextConfig.of(config | {"moe": dense}, base))
    renamed = {rename(f"language_model.{name}"): array for name, array in drawn.items()}
    weights = Weights(renamed).take_prefix("language_model.")
    short = {name.removeprefix("language_model."): array for name, array in weights.items()}
    assert short.keys() == dict(tree_flatten(ours.parameters())).keys()
    ours.update(tree_unflatten(list(short.items())))
    ids = mx.array([[3, 60, 7, 7, 21, 0, 5]])
    want = theirs(ids)
    assert distance(ours(ours.embed(ids)), want) < FLOAT32
    cache = ours.make_cache()
    ours(ours.embed(ids[:, :4]), cache)
    last = ours(ours.embed(ids[:, 4:]), cache, last_only=True)
    assert distance(last, want[:, -1:]) < FLOAT32
