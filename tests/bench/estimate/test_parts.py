"""Parts: parameters and bytes are the built models', visual tokens are the processors'."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_vlm_edge_bench.estimate import memory_bytes, visual_tokens, weight_bytes
from mlx_vlm_edge_bench.estimate.parts import parts_of
from PIL import Image

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.checkpoint.config import read_config
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.hub.models import ALIASES, locate
from mlx_vlm_edge.loading.load import load
from mlx_vlm_edge.models import family
from mlx_vlm_edge.picture.preprocessing import Preprocessing

PICTURES = [(1024, 1024), (640, 480), (300, 700), (1920, 1080), (384, 384)]


def model_of(alias):
    config = configs.read(alias)
    kind = family(config)
    return kind.Model(kind.Config.from_dict(config))


def nbytes(module):
    return sum(parameter.nbytes for _, parameter in tree_flatten(module.parameters()))


def count(module):
    return sum(parameter.size for _, parameter in tree_flatten(module.parameters()))


@pytest.fixture(autouse=True)
def nothing_is_allocated():
    mx.reset_peak_memory()
    yield
    assert mx.get_peak_memory() < 10_000_000


@pytest.mark.parametrize("alias", ALIASES)
def test_parameters_are_the_built_models(alias):
    found, model = parts_of(configs.read(alias)), model_of(alias)
    ours = {"language_model": found.decoder.parameters}
    ours[model.tower_name] = found.vision.parameters
    if model.connector_name:
        ours[model.connector_name] = found.connector.parameters
    newline = {"image_newline"} & model.keys()
    if newline:
        ours["multi_modal_projector"] -= model.image_newline.size
    assert ours == {name: count(model[name]) for name in ours}
    assert sum(ours.values()) == count(model) - sum(model[name].size for name in newline)


@pytest.mark.parametrize("alias", ALIASES)
def test_weights_take_the_bytes_of_the_built_model(alias):
    config, model = configs.read(alias), model_of(alias)
    assert weight_bytes(config, dtype="float32") == nbytes(model)
    assert weight_bytes(config, 16) == nbytes(model) // 2
    model.apply(lambda parameter: parameter.astype(mx.bfloat16))
    nn.quantize(model.language_model, 64, 4)  # what load(quantize=4) does
    assert weight_bytes(config, 4) == nbytes(model)


def test_8_bits_too():
    model = model_of("fastvlm-0.5b")
    nn.quantize(model.language_model, 64, 8)
    assert weight_bytes(configs.read("fastvlm-0.5b"), 8, "float32") == nbytes(model)


def processor_of(config, resolution=None):
    kind = family(config)
    processor = kind.Processor.__new__(kind.Processor)
    processor.config = kind.Config.from_dict(config).adapted(Preprocessing(resolution=resolution))
    return processor


@pytest.mark.parametrize("alias", ALIASES)
def test_visual_tokens_are_the_processors(alias):
    config = configs.read(alias)
    processor = processor_of(config)
    for size in PICTURES:
        pixels = processor.preprocess(Image.new("RGB", size))
        assert visual_tokens(config, image=size) == processor.visual_tokens(pixels), size


@pytest.mark.parametrize(
    ("alias", "resolution"),
    [
        ("fastvlm-0.5b", 256), ("fastvlm-0.5b", 512), ("smolvlm-256m", 512), ("smolvlm-256m", 700),
        ("idefics3-8b", 364), ("eve-7b", 336), ("eve-7b-hd", 672), ("eve-7b-hd-v2", 800),
        ("fuyu-8b", 960),
    ],
)  # fmt: skip
def test_visual_tokens_at_other_resolutions(alias, resolution):
    config = configs.read(alias)
    processor = processor_of(config, resolution)
    for size in PICTURES:
        pixels = processor.preprocess(Image.new("RGB", size))
        ours = visual_tokens(config, resolution, image=size)
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
    config = configs.read(alias)
    kind = family(config)
    with pytest.raises(UsageError):
        kind.Config.from_dict(config).adapted(Preprocessing(resolution=resolution))
    with pytest.raises(UsageError) as error:
        parts_of(config, resolution)
    assert "\n" not in str(error.value)


def test_markers_around_tiles_are_counted():
    """17 tiles of SmolVLM-256M: 18 fakes, 16 markers, <global-img>, 4 line ends (one double)."""
    assert parts_of(configs.read("smolvlm-256m")).view.marks == 39


def test_the_paper_counts_onevisions_tokens_without_newlines():
    config = configs.read("llava-onevision-0.5b")
    assert visual_tokens(config, image=(1152, 1152)) == 7290 + 81


ORIGINAL = {
    "fastvlm-0.5b": ("vision_config",),
    "mobilevlm-v2-1.7b": ("vision_config", "image_token_index"),
}


@pytest.mark.parametrize("alias", ORIGINAL)
def test_a_published_config_without_the_native_keys_will_do(alias):
    config = configs.read(alias)
    short = {key: value for key, value in config.items() if key not in ORIGINAL[alias]}
    assert parts_of(short) == parts_of(config)


def test_llavas_original_flat_config_will_do():
    nested = configs.read("llava-1.5-7b")
    flat = configs.read("mobilevlm-v2-7b") | {"model_type": "llava_llama", "vocab_size": 32064}
    del flat["vision_config"]
    assert parts_of({**flat, "mm_projector_type": "mlp2x_gelu"}) == parts_of(
        {**nested, "text_config": {**nested["text_config"], "max_position_embeddings": 4096}}
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model_type None is not supported"),
        ({"model_type": "llava"}, "no vision_config, and None is not known"),
        ({"model_type": "smolvlm"}, "lacks 'vision_config'"),
        ({"model_type": "eve"}, "no image size is"),
        ({"model_type": "fuyu"}, "lacks 'hidden_size'"),
        ({"model_type": "fast_vlm", "text_config": 3}, "of the wrong kind"),
    ],
)
def test_a_config_that_is_not_whole_is_one_line(config, message):
    with pytest.raises(UsageError, match=message) as error:
        parts_of(config)
    assert "\n" not in str(error.value)


def test_any_broken_value_is_one_line():
    errors = []
    for alias in ("fastvlm-0.5b", "smolvlm-256m", "eve-7b", "fuyu-8b", "llava-onevision-0.5b"):
        config = configs.read(alias)
        for key in config:
            for value in (None, "x", [], {}, -1, 0):
                try:
                    memory_bytes({**config, key: value}, 4)
                except UsageError as error:
                    errors.append(str(error))
    assert len(errors) > 100
    assert not [line for line in errors if "\n" in line]


def test_activations_are_near_what_was_seen():
    """The CPU back end's peak beside the weights, in float32: 248.5 MB for FastViTHD at 512 px."""
    needed = memory_bytes(configs.read("fastvlm-0.5b"), dtype="float32", resolution=512)
    assert needed["activations"] == pytest.approx(248.5e6, rel=0.1)


def test_memory_is_the_sum_and_the_cache_is_the_contexts():
    config = configs.read("fastvlm-0.5b")
    needed = memory_bytes(config, 4, 1000)
    assert needed["cache"] == 1000 * 12_288  # facts: bytes of a position in 16 bits
    assert needed["total"] == sum(needed[part] for part in ("weights", "cache", "activations"))
    assert needed["weights"] == weight_bytes(config, 4)
    with pytest.raises(UsageError, match="bits 3: 4, 8 or 16 are known"):
        memory_bytes(config, 3)
    with pytest.raises(UsageError, match="dtype 'int8' is not one of"):
        weight_bytes(config, dtype="int8")
    with pytest.raises(UsageError, match="0 x 5 pixels has nothing in it"):
        visual_tokens(config, image=(0, 5))


def test_the_bundled_model_is_estimated_from_its_folder():
    config = read_config(locate("demo"))
    mx.reset_peak_memory()
    model, _ = load("demo", dtype="float32")
    assert weight_bytes(config, dtype="float32") == nbytes(model)
    del model
    mx.clear_cache()
    mx.reset_peak_memory()
