"""Models at full size without files: every alias in its shapes, a small one of each family run."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_vlm_edge_bench.bench.measure import Question, measure
from mlx_vlm_edge_bench.bench.picture import default_picture
from mlx_vlm_edge_bench.random.question import text_of
from mlx_vlm_edge_bench.random.weights import blueprint, build, config_of, fill

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.hub.models import ALIASES
from mlx_vlm_edge.kernels import on_cpu

FAMILIES = (
    "fastvlm-0.5b", "smolvlm2-256m", "idefics3-8b", "fuyu-8b", "eve-7b",
    "eve-7b-hd-v2", "cambrian-8b", "cambrian-13b", "mobilevlm-v2-1.7b", "mobilevlm-1.7b",
    "llava-1.5-7b", "llava-onevision-0.5b",
)  # fmt: skip
NARROW = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2,
}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def shrunk(alias):
    """A config with 2 narrow layers and a small tower; vocabulary and tokens as they are."""
    config = copy.deepcopy(configs.read(alias))
    text = config.get("text_config", config)
    text |= NARROW
    text.pop("head_dim", None)
    if config["model_type"] in ("fuyu", "eve", "eve-qwen2"):
        text.pop("num_key_value_heads")
    if "mm_hidden_size" in config and "vision_config" not in config:
        config["mm_hidden_size"] = 64
    tower = config.get("vision_config", {})
    if config["model_type"] == "cambrian_llama":
        for one in tower["towers"][:3]:
            one |= {**SMALL, "num_hidden_layers": 2}
        tower["towers"][3] |= {
            "hidden_sizes": [16, 32, 32, 64],
            "depths": [1] * 4,
            "image_size": 256,
        }
        config |= {"vision_hidden_size": 64, "num_of_vision_sampler_layers": 2}
        config["stride_of_vision_sampler_layers"] = 1
    elif "embed_dims" in tower:
        tower |= {"embed_dims": [16, 32, 32, 64, 128], "layers": [1] * 5, "image_size": 128}
    elif tower:
        tower |= {**SMALL, "num_hidden_layers": 2}
    if "preprocessor_config" in config:
        config["preprocessor_config"]["do_image_splitting"] = False
    if config["model_type"] == "eve-qwen2":
        config["max_size"] = 128
    return config


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_every_alias_builds_in_its_shapes(alias):
    """Its bytes are those of its published parameters; nothing is evaluated."""
    before = mx.get_active_memory()
    plan = blueprint(alias, dtype="bfloat16")
    assert plan.nbytes > 4e8
    quantised = blueprint(alias, dtype="bfloat16", bits=4)
    assert quantised.nbytes < plan.nbytes
    assert mx.get_active_memory() - before < 64 << 20
    assert plan.config.text.vocab_size > 30000


def test_the_bytes_are_the_published_sizes():
    parameters = {"fastvlm-0.5b": 620.3e6, "fastvlm-7b": 7762.2e6, "smolvlm-256m": 256.5e6}
    for alias, count in parameters.items():
        assert blueprint(alias, dtype="float16").nbytes == pytest.approx(2 * count, rel=1e-3)


@pytest.mark.parametrize("alias", FAMILIES)
def test_a_small_one_of_every_family_is_measured(alias):
    plan = blueprint(alias, dtype="float32", config=shrunk(alias))
    model, processor = build(plan)
    picture, text_tokens = default_picture(96), 250 if alias == "cambrian-8b" else 60
    question = Question(picture, text_of(processor, picture, text_tokens), 3)
    runs = measure(model, processor, question, 1)
    assert [run.generated for run in runs.plain] == [3, 3]
    assert runs.plain[0].prompt_tokens - runs.plain[0].visual_tokens == text_tokens
    assert runs.plain[0].visual_tokens > 0
    assert runs.staged[0].ttft > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_packed_and_keep_the_variance(bits):
    plan = blueprint("fastvlm-0.5b", dtype="float32", bits=bits, config=shrunk("fastvlm-0.5b"))
    model, _ = build(plan)
    layer = model.language_model.model.layers[0].mlp.down_proj
    assert layer.bits == bits
    codes = layer.weight.codes if on_cpu() else layer.weight
    assert codes.dtype == mx.uint32
    x = mx.array(np.random.default_rng(0).standard_normal((64, 256), np.float32))
    assert float(layer(x).std()) == pytest.approx(1, rel=0.15)


def test_the_signal_stays_finite_and_alive():
    plan = blueprint("fastvlm-0.5b", dtype="float32", config=shrunk("fastvlm-0.5b"))
    model, processor = build(plan)
    inputs = processor("Hi", [default_picture(96)])
    assert 1e-4 < float(model.encode_image(inputs.pixels[0]).std()) < 1e3
    assert float(model(inputs).std()) == pytest.approx(1, rel=0.3)


def test_no_array_keeps_more_memory_than_it_is_long():
    plan = blueprint("fastvlm-0.5b", dtype="float32", config=shrunk("fastvlm-0.5b"))
    mx.clear_cache()
    before = mx.get_active_memory()
    fill(plan.model, plan.dtype)
    made = sum(array.nbytes for _, array in tree_flatten(plan.model.parameters()))
    assert mx.get_active_memory() - before < made + (1 << 20)


def test_names_that_have_no_config_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"did you mean fastvlm-0\.5b"):
        config_of("fastvlm-0.5")
    with pytest.raises(UsageError, match=r"no config\.json"):
        config_of(str(tmp_path))


def test_a_folder_with_a_config_alone_will_do(tmp_path):
    import json

    (tmp_path / "config.json").write_text(json.dumps(shrunk("smolvlm-256m")))
    assert config_of(str(tmp_path))["model_type"] == "idefics3"
    assert config_of(ALIASES["fastvlm-0.5b"])["model_type"] == "llava_qwen2"
