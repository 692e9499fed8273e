"""Costs of the real models: tokens by their processors, parameters and bytes by their modules."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.checkpoint.config import read_config
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.hub.models import ALIASES, obtain
from mlx_vlm_edge.loading import cost
from mlx_vlm_edge.loading.counting import Work, counted
from mlx_vlm_edge.loading.load import load
from mlx_vlm_edge.text.prompt import Inputs

from ..memory import Peak

COUNTED = json.loads((Path(__file__).parents[1] / "golden/fastvithd_gmacs.json").read_text())


@pytest.fixture(autouse=True)
def little_is_allocated():
    peak = Peak()
    yield
    assert peak.bytes < 20_000_000


def prompt(plan, image=(1024, 1024), text=24):
    """Visual tokens, then text; no tokenizer is asked."""
    pixels = plan.pixels(image)
    visual = plan.processor.visual_tokens(pixels)
    ids = np.zeros((1, visual + text), np.int32)
    return Inputs(ids, np.arange(visual, dtype=np.int32), [pixels])


@pytest.fixture(scope="module")
def tower():
    return cost.blueprint(configs.read("fastvlm-0.5b")).model.vision_tower


@pytest.mark.parametrize("side", map(int, COUNTED))
def test_fastvithd_is_counted_as_apples_code_is(tower, side):
    """Module by module, in Apple's numbering: downsampling and position encoding have their own."""
    x = mx.zeros((1, side, side, 3))
    parts = {"patch_embed": [tower.stem]}
    for stage in tower.stages:
        for modules in (*([module] for module in stage.entry), stage.blocks):
            parts[f"network.{len(parts) - 1}"] = modules
    parts["conv_exp"] = [tower.conv_exp]
    ours, total = {}, 0
    for name, modules in parts.items():
        work = Work()
        for module in modules:
            results = []
            work += counted(lambda m=module, x=x, r=results: r.append(m(x)))
            x = results[0]
        total += work.flops // 2
        ours[name] = round(work.flops / 2e9, 3)
    assert {"total": round(total / 1e9, 3), **ours} == COUNTED[str(side)]


# GMACs of a tile by the project's fact sheets, computed on torch's meta device.
@pytest.mark.parametrize(
    ("alias", "gmacs"), [("idefics3-8b", 306), ("smolvlm-2.2b", 333), ("smolvlm-256m", 106)]
)
def test_a_siglip_tile(alias, gmacs):
    plan = cost.blueprint(configs.read(alias))
    side = plan.config.tile
    work = counted(lambda: plan.model.features(np.zeros((1, side, side, 3), np.uint8)))
    assert work.flops / 2e9 == pytest.approx(gmacs, rel=0.01)


def test_prefill_and_decode_of_llama_7b():
    """By hand: all positions pass all layers, but the last layer's query, output and MLP are the
    last position's alone, as nothing else is read of it; a step meets every matrix once."""
    plan = cost.blueprint(configs.read("llava-1.5-7b"), fused=True)
    found = cost.cost(plan, prompt(plan))
    n, width, inner, head = found.prompt_tokens, 4096, 11008, 4096 * 32064
    assert n == 576 + 24
    whole = 4 * width**2 + 3 * width * inner
    last = n * 3 * width**2 + width**2 + 3 * width * inner
    assert found.prefill.macs == n * 31 * whole + last + head
    assert found.prefill.attention == 2 * width * (31 * n * (n + 1) // 2 + n)
    assert found.step.macs == 32 * whole + head
    assert found.step.attention == 2 * width * 32 * (n + 1)
    assert found.prefill.matrices == 31 * whole + 3 * width**2
    norms = (32 * 2 + 1) * width
    assert found.step.weights == 2 * (32 * whole + head + norms)
    assert found.cached == 2 * 32 * 2 * width
    clip = 576 * 588 * 1024 + 23 * 577 * (4 * 1024**2 + 2 * 1024 * 4096)
    assert (found.vision.macs, found.vision.attention) == (clip, 23 * 2 * 577**2 * 1024)
    assert found.connector.macs == 576 * (1024 * width + width**2)


def test_eve_v2_reads_two_kinds_of_weights_and_computes_with_one():
    plan = cost.blueprint(configs.read("eve-7b-hd-v2"), fused=True)
    plain = cost.blueprint(configs.read("fastvlm-7b"), fused=True)  # the same decoder, of one kind
    found = cost.cost(plan, prompt(plan, (600, 600), 100))
    other = cost.cost(plain, prompt(plain, text=100))
    assert found.step.weights == other.step.weights
    assert found.prefill.weights > 1.9 * other.prefill.weights
    per_position = found.prefill.macs / found.prompt_tokens
    assert per_position == pytest.approx(other.prefill.macs / other.prompt_tokens, rel=0.04)


@pytest.mark.parametrize("alias", ALIASES)
def test_bytes_are_those_of_the_built_model(alias):
    """In float32, in half of it, and quantised as `load(quantize=4)` does it."""
    config = configs.read(alias)
    plan = cost.blueprint(config, dtype="float32")
    arrays = [array for _, array in tree_flatten(plan.model.parameters())]
    assert plan.nbytes == 4 * sum(array.size for array in arrays)
    assert cost.blueprint(config).nbytes == plan.nbytes // 2
    packed = cost.blueprint(config, quantization={"bits": 4, "group_size": 64})
    plan.model.apply(lambda parameter: parameter.astype(mx.bfloat16))
    nn.quantize(plan.model.language_model, 64, 4)
    assert packed.nbytes == plan.nbytes
    assert packed.bits == (4,)


def test_a_block_s_bits_groups_mode_and_exceptions_count():
    config = configs.read("fastvlm-0.5b")

    def layers(**block):
        model = cost.blueprint(config, quantization=block).model.language_model.model
        return model.layers[0].mlp.down_proj, model.layers[1].mlp.down_proj, model.embed_tokens

    first, second, embedding = layers(bits=2, group_size=32)
    assert (first.bits, first.group_size, embedding.bits) == (2, 32, 2)
    assert first.weight.nbytes == 896 * 4864 * 2 // 8
    assert first.scales.shape == (896, 4864 // 32)
    assert layers(bits=4, group_size=32, mode="mxfp4")[0].mode == "mxfp4"
    own = {"language_model.model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 64}}
    first, second, _ = layers(bits=4, group_size=64, **own)
    assert (first.bits, second.bits) == (8, 4)
    assert cost.blueprint(config, quantization={"bits": 4, "group_size": 64} | own).bits == (4, 8)
    kept = {"language_model.model.layers.0.mlp.down_proj": False}
    assert type(layers(bits=4, group_size=64, **kept)[0]) is nn.Linear
    connector = {"mm_projector.0": {"bits": 8, "group_size": 64}}
    plan = cost.blueprint(config, quantization={"bits": 4, "group_size": 64} | connector)
    assert plan.model.mm_projector.layers[0].bits == 8


@pytest.mark.parametrize(
    "block",
    [
        {"bits": 3.5},
        {"bits": 99},
        {"bits": 4, "group_size": 7},
        {"bits": "x"},
        {"bits": 4, "group_size": 100},
    ],
)
def test_a_block_that_cannot_be_is_one_line(block):
    with pytest.raises(UsageError, match="this quantization cannot be") as error:
        cost.blueprint(configs.read("fastvlm-0.5b"), quantization=block)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("alias", ALIASES)
def test_a_prompt_of_every_model_is_counted_on_its_shapes(alias):
    plan = cost.blueprint(configs.read(alias), fused=True)
    inputs = prompt(plan)
    found = cost.cost(plan, inputs)
    text = plan.config.text
    assert found.visual_tokens == len(inputs.visual)
    assert found.vision.flops > 0
    assert (found.connector.flops > 0) == ("eve-7b-hd-v2" != alias != "fuyu-8b")
    assert found.parameters == plan.nbytes
    heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
    assert found.cached == 2 * 2 * found.layers * heads * text.head_dim
    assert found.layers == text.num_hidden_layers
    memory = found.memory(found.prompt_tokens)
    assert memory["weights"] == plan.nbytes
    assert memory["cache"] == found.prompt_tokens * found.cached
    assert memory["total"] == sum(memory[part] for part in ("weights", "cache", "activations"))


def test_activations_are_near_what_was_seen():
    """The CPU back end's peak beside the weights, in float32: 248.5 MB for FastViTHD at 512 px."""
    config = configs.read("fastvlm-0.5b")
    config["vision_config"]["image_size"] = 512
    plan = cost.blueprint(config, dtype="float32")
    found = cost.cost(plan, prompt(plan))
    assert found.memory(1)["activations"] == pytest.approx(248.5e6, rel=0.1)


@pytest.mark.parametrize(
    ("size", "message"),
    [((0, 5), "0 x 5 pixels has nothing in it"), ((99999, 99999), "would be refused")],
)
def test_a_picture_that_cannot_be_is_refused_unmade(size, message):
    with pytest.raises(UsageError, match=message):
        cost.blank(size)


def test_names_that_have_no_config_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"did you mean fastvlm-0\.5b"):
        cost.config_of("fastvlm-0.5")
    with pytest.raises(UsageError, match=r"no config\.json"):
        cost.config_of(str(tmp_path))
    assert (
        cost.config_of(ALIASES["fuyu-8b"]) == cost.config_of("FUYU-8B") == configs.read("fuyu-8b")
    )


# What Apple's and MobileVLM's own config.json have not.
@pytest.mark.parametrize(
    ("alias", "lacks"),
    [
        ("fastvlm-0.5b", ("vision_config",)),
        ("fastvlm-0.5b", ("tie_word_embeddings",)),
        ("mobilevlm-v2-1.7b", ("vision_config", "image_token_index")),
    ],
)
def test_a_published_config_without_the_native_keys_will_do(alias, lacks):
    config = configs.read(alias)
    published = {key: value for key, value in config.items() if key not in lacks}
    assert cost.blueprint(cost.native(published)).nbytes == cost.blueprint(config).nbytes


def test_llavas_original_flat_config_will_do():
    flat = configs.read("mobilevlm-v2-7b") | {"model_type": "llava_llama", "vocab_size": 32064}
    del flat["vision_config"]
    flat["mm_projector_type"] = "mlp2x_gelu"
    nested = configs.read("llava-1.5-7b")
    assert cost.blueprint(cost.native(flat)).nbytes == cost.blueprint(nested).nbytes


def test_lmms_labs_onevision_is_told_from_llava():
    """Its config.json is flat, with model_type "llava"; the architecture tells."""
    nested = configs.read("llava-onevision-0.5b")
    flat = nested["text_config"] | {
        "model_type": "llava", "architectures": ["LlavaQwenForCausalLM"],
        "mm_vision_tower": "google/siglip-so400m-patch14-384", "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "anyres_max_9", "tie_word_embeddings": True,
    }  # fmt: skip
    plan, known = cost.blueprint(cost.native(flat)), cost.blueprint(nested)
    assert plan.family is known.family
    assert plan.nbytes == known.nbytes
    assert plan.processor.visual_tokens(plan.pixels((1152, 1152))) == 7371


@pytest.mark.parametrize("alias", ALIASES)
def test_native_configs_stay_as_they_are(alias):
    config = configs.read(alias)
    assert cost.blueprint(cost.native(config)).nbytes == cost.blueprint(config).nbytes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model_type None is not"),
        ({"model_type": "llava"}, "no vision_config, and None is not known|mm_projector_type"),
        ({"model_type": "smolvlm"}, "lacks 'text_config'"),
        ({"model_type": "eve"}, "lacks 'mm_hidden_size'"),
        ({"model_type": "fuyu"}, "lacks 'hidden_size'"),
        ({"model_type": "fast_vlm", "text_config": 3}, "of the wrong kind"),
    ],
)
def test_a_config_that_is_not_whole_is_one_line(config, message):
    with pytest.raises(UsageError, match=message) as error:
        cost.blueprint(cost.native(config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "alias", ["fastvlm-0.5b", "smolvlm-256m", "eve-7b", "fuyu-8b", "llava-onevision-0.5b"]
)
def test_any_broken_value_is_one_line(alias):
    config, errors = configs.read(alias), []
    for key in config:
        for value in (None, "x", [], {}, -1, 0):
            try:
                cost.blueprint(cost.native({**config, key: value}))
            except UsageError as error:
                errors.append(str(error))
    assert len(errors) > 10
    assert not [line for line in errors if "\n" in line]


def test_the_bundled_model_weighs_what_is_said():
    plan = cost.blueprint(cost.native(read_config(obtain("demo"))), dtype="float32")
    model, _ = load("demo", dtype="float32")
    assert plan.nbytes == cost.nbytes(model)
    del model
    mx.clear_cache()
    mx.reset_peak_memory()


def test_a_prompt_that_is_prefilled_whole_needs_its_activations_at_once():
    """A MoE that may drop tokens computes all of a long prompt together."""
    found = {}
    for factor in (2.0, 0.5):  # of 4 experts, 2 for a token: no room is missing, or some is
        config = configs.read("moe-llava-qwen-1.8b")
        config["moe"]["eval_capacity_factor"] = factor
        plan = cost.blueprint(config)
        found[factor] = cost.cost(plan, cost.question(plan, text_tokens=4000))
    assert not found[2.0].whole
    assert found[0.5].whole
    few, many = (each.memory(1)["activations"] for each in found.values())
    assert many > 1.5 * few
