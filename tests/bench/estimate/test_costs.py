"""Estimates agree with the benchmark's own prompts and with the built models, for every alias."""

from dataclasses import replace

import mlx.nn as nn
import pytest
from mlx_vlm_edge_bench.bench.picture import default_picture
from mlx_vlm_edge_bench.claims import counted as claim_counts
from mlx_vlm_edge_bench.claims.read import Part
from mlx_vlm_edge_bench.estimate.costs import (
    memory_bytes,
    plan_of,
    prompt_cost,
    visual_tokens,
)
from mlx_vlm_edge_bench.random.question import text_of
from mlx_vlm_edge_bench.random.weights import blueprint, processor_of
from PIL import Image

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.hub.models import ALIASES
from mlx_vlm_edge.loading.cost import nbytes
from mlx_vlm_edge.picture.preprocessing import Preprocessing

from ...memory import Peak

SQUARE = (1024, 1024)
PICTURES = [(640, 480), (300, 700), (1920, 1080), (384, 384)]


def predicted_flops(config, resolution=None, text_tokens=None, image=SQUARE):
    """Two FLOPs per MAC of each stage, "decode" for one token after the prompt."""
    counted = prompt_cost(plan_of(config, resolution=resolution), image, text_tokens)
    return {
        "vision": counted.vision.flops,
        "connector": counted.connector.flops,
        "prefill": counted.prefill.flops,
        "decode": counted.step.flops,
    }


@pytest.fixture(autouse=True)
def little_is_allocated():
    peak = Peak()
    yield
    assert peak.bytes < 40_000_000


@pytest.fixture(scope="module")
def photograph():
    return default_picture()


@pytest.mark.parametrize("alias", ALIASES)
def test_bench_and_estimate_and_the_built_model_agree(alias, photograph):
    """The benchmark's model and prompt, with its whole vocabulary, against what is estimated."""
    plan = blueprint(alias, dtype="bfloat16")
    inputs = processor_of(plan)(text_of(None, photograph, None), [photograph])
    estimated = plan_of(configs.read(alias))
    cost = prompt_cost(estimated)
    assert cost.prompt_tokens == inputs.input_ids.shape[1]
    assert cost.visual_tokens == len(inputs.visual)
    assert cost.parameters == estimated.nbytes == nbytes(plan.model)
    quantised = blueprint(alias, dtype="bfloat16", bits=4)
    assert plan_of(configs.read(alias), 4).nbytes == nbytes(quantised.model)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_number_of_bits(bits):
    config = configs.read("fastvlm-0.5b")
    model = blueprint("fastvlm-0.5b", dtype="float32").model
    nn.quantize(model.language_model, 64, bits)
    assert plan_of(config, bits, "float32").nbytes == nbytes(model)


def test_the_configs_own_bits_are_the_default():
    """A 2-bit model is one of 2 bits, in its own groups."""
    config = configs.read("fastvlm-0.5b")
    own = {**config, "quantization": {"bits": 2, "group_size": 32}}
    model = blueprint("fastvlm-0.5b", dtype="bfloat16").model
    nn.quantize(model.language_model, 32, 2)
    assert plan_of(own).bits == (2,)
    assert plan_of(own).nbytes == nbytes(model)
    assert plan_of(own, 16).nbytes == plan_of(config).nbytes
    assert plan_of(own, 4).nbytes == plan_of(config, 4).nbytes
    mixed = own["quantization"] | {"language_model.model.embed_tokens": {"bits": 8}}
    assert plan_of({**config, "quantization": mixed}).bits == (2, 8)


@pytest.mark.parametrize(
    ("alias", "resolution"),
    [
        ("fastvlm-0.5b", 256), ("smolvlm-256m", 512), ("smolvlm-256m", 700), ("idefics3-8b", 364),
        ("eve-7b", 336), ("eve-7b-hd", 672), ("eve-7b-hd-v2", 800), ("fuyu-8b", 960),
    ],
)  # fmt: skip
def test_visual_tokens_at_other_resolutions(alias, resolution):
    plan = replace(blueprint(alias), asked=Preprocessing(resolution=resolution))
    processor = processor_of(plan, words_only=True)
    for size in PICTURES:
        pixels = processor.preprocess(Image.new("RGB", size))
        ours = visual_tokens(configs.read(alias), resolution, image=size)
        assert ours == processor.visual_tokens(pixels), size


@pytest.mark.parametrize(
    ("alias", "resolution"),
    [
        ("fastvlm-0.5b", 500), ("fastvlm-0.5b", 0), ("llava-1.5-7b", 224), ("eve-7b", 690),
        ("mobilevlm-1.7b", 512), ("llava-onevision-0.5b", 512), ("fuyu-8b", 100),
        ("eve-7b-hd-v2", 8), ("fastvlm-0.5b", -64), ("smolvlm-256m", 99999), ("smolvlm-256m", -1),
    ],
)  # fmt: skip
def test_what_a_family_refuses_is_refused(alias, resolution):
    with pytest.raises(UsageError) as error:
        predicted_flops(configs.read(alias), resolution)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("alias", "least", "most"), [("smolvlm-256m", 39, 60), ("idefics3-8b", 136, 170)]
)
def test_markers_around_tiles_are_in_the_prompt(alias, least, most):
    """Of 17 tiles: 18 fakes and 4 line ends, and 17 markers, which Idefics3 spells in 7 pieces."""
    cost = prompt_cost(plan_of(configs.read(alias)))
    assert least < cost.prompt_tokens - cost.visual_tokens < most


def test_the_paper_counts_onevisions_tokens_without_newlines():
    config = configs.read("llava-onevision-0.5b")
    assert visual_tokens(config, image=(1152, 1152)) == 7290 + 81


def test_stages_of_fastvlm():
    config = configs.read("fastvlm-0.5b")
    flops = predicted_flops(config, 512, 40)
    assert flops["vision"] == pytest.approx(2 * 59.556e9, rel=1e-4)
    assert flops["connector"] == 2 * 64 * (3072 * 896 + 896 * 896)
    cost = prompt_cost(plan_of(config, resolution=512), text_tokens=40)
    assert cost.prompt_tokens == 64 + 40
    text = claim_counts.work(Part("prefill", "fastvlm-0.5b", tokens=104))
    assert (cost.prefill.macs, cost.prefill.attention) == (text.macs, text.attention)


def test_a_picture_that_is_not_square_costs_by_its_area():
    config = configs.read("fuyu-8b")
    half, square = (
        predicted_flops(config, image=size)["vision"] for size in ((300, 600), (600, 600))
    )
    assert half == square / 2


def test_prompts_that_cannot_be_are_refused():
    plan = plan_of(configs.read("fastvlm-0.5b"))
    with pytest.raises(UsageError, match=r"--prompt-tokens 5: .* give 2\d or more"):
        prompt_cost(plan, text_tokens=5)
    with pytest.raises(UsageError, match=r"a prompt of 100,256 tokens, .* context of 32,768"):
        prompt_cost(plan, text_tokens=100_000)


def test_memory_is_the_sum_and_the_cache_is_the_contexts():
    config = configs.read("fastvlm-0.5b")
    needed = memory_bytes(config, 4, 1000)
    assert needed["cache"] == 1000 * 12_288  # facts: bytes of a position in 16 bits
    assert needed["total"] == sum(needed[part] for part in ("weights", "cache", "activations"))
    assert needed["weights"] == plan_of(config, 4).nbytes
    with pytest.raises(UsageError, match="bits 7: 2, 3, 4, 5, 6, 8 or 16 are known"):
        memory_bytes(config, 7, 1000)
    with pytest.raises(UsageError, match="dtype 'int8' is not one of"):
        plan_of(config, dtype="int8")
