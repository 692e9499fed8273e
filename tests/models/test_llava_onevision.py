"""LLaVA-OneVision whole, against transformers': tiles, features, packing, logits, greedy ids."""

import copy
import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_vlm_edge import load, stream_generate
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.kernels import gelu, resize_bilinear
from mlx_vlm_edge.models import llava_onevision
from mlx_vlm_edge.models.build import build
from mlx_vlm_edge.picture import tiling
from mlx_vlm_edge.picture.image import Pixels
from mlx_vlm_edge.picture.tiling import Tiles, best_resolution

from ..memory import Peak, least_peak
from ..parity import BFLOAT16_FACTOR, FLOAT32, distance

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
QUESTION = "What is this?"
AFTER = f"\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
# One tile; two that fill their grids; cut above and below, at the sides; shrunk; shrunk and cut.
SIZES = [(44, 44), (300, 40), (33, 190), (200, 60), (60, 200), (264, 264), (260, 140), (240, 200)]
LAYOUTS = ("native", "hub", "original", "transformers")


@pytest.fixture(scope="module")
def theirs():
    """The reference module, which needs torch."""
    import torch

    from ..reference import llava_onevision

    torch.set_num_threads(1)
    return llava_onevision


@pytest.fixture(scope="module")
def weights(theirs):
    """The tiny model's weights under transformers' names, float32."""
    return theirs.weights(theirs.build())


@pytest.fixture(scope="module")
def reference(theirs):
    return theirs.build().double()


@pytest.fixture(scope="module")
def folder(theirs, weights, tmp_path_factory):
    return theirs.save(weights, tmp_path_factory.mktemp("onevision"), "native")


@pytest.fixture(scope="module")
def loaded(folder):
    """(model, processor) of the reference, from the native layout."""
    return load(str(folder))


def ids(text):
    from ..reference import tokenizer

    return tokenizer.build().encode(text, add_special_tokens=False).ids


def prompt(*images):
    """[ids, image, ids ...]: images by their number, a line each."""
    parts = [ids(f"{SYSTEM}<|im_start|>user\n")]
    for image in images:
        parts += [image, ids("\n")]
    return [*parts[:-1], ids(AFTER)]


def reference_logits(theirs, reference, parts, images):
    from ..reference import fastvlm

    return fastvlm.logits(reference, theirs.embeddings(reference, parts, images))


def greedy(theirs, reference, parts, images, count):
    from ..reference import fastvlm

    embedded = theirs.embeddings(reference, parts, images)
    found, gap = fastvlm.greedy(reference, embedded, count)
    assert gap > 1e-3, "the reference's choice is nearly a tie; take another picture"
    return found


def tokens(pieces):
    return [piece.token for piece in pieces if piece.token is not None]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_are_the_pillow_processor_s(loaded, theirs, size):
    image = theirs.picture(1, *size)
    pixels = loaded[1](QUESTION, images=[image]).pixels[0]
    want = theirs.prepare([image])["pixel_values"][0].numpy().transpose(0, 2, 3, 1)
    assert pixels.data.dtype == np.uint8
    assert pixels.size == size
    assert np.abs(pixels.data * (2 / 255) - 1 - want).max() < 1e-6


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_features_and_visual_tokens(loaded, theirs, reference, size):
    model, processor = loaded
    image = theirs.picture(1, *size)
    pixels = processor(QUESTION, images=[image]).pixels[0]
    features = model.features(pixels.data)
    assert distance(features, theirs.features(reference, image)) < FLOAT32
    got = model.encode_image(pixels)
    assert distance(got, theirs.encode(reference, [image])[0]) < FLOAT32
    assert len(got) == processor.visual_tokens(pixels)


def test_the_prompt_is_qwen_1_5_with_the_image_first(loaded, theirs):
    model, processor = loaded
    inputs = processor(QUESTION, images=[theirs.picture(1, 100, 60)])
    before, _, after = prompt(0)
    count = len(inputs.visual)
    placeholders = [model.config.image_token_index] * count
    assert inputs.input_ids.tolist() == [before + placeholders + after]
    assert inputs.visual.tolist() == list(range(len(before), len(before) + count))


def test_logits_of_every_position(loaded, theirs, reference):
    model, processor = loaded
    for size in ((100, 60), (240, 200)):
        image = theirs.picture(1, *size)
        inputs = processor(QUESTION, images=[image])
        got = model(inputs)[0]
        assert distance(got, reference_logits(theirs, reference, prompt(0), [image])) < FLOAT32
        whole = theirs.forward(reference, inputs.input_ids[0].tolist(), [image])
        assert distance(got, whole) < FLOAT32


@pytest.mark.parametrize("size", [(44, 44), (100, 60), (60, 100), (240, 200)], ids=str)
def test_greedy_ids(loaded, theirs, reference, size):
    image = theirs.picture(2, *size)
    pieces = list(stream_generate(*loaded, QUESTION, images=[image], max_tokens=8))
    assert tokens(pieces)[:8] == greedy(theirs, reference, prompt(0), [image], 8)


def test_one_of_two_images_is_a_single_tile(loaded, theirs, reference):
    """As in training: padded with grey, 9 features and a newline, whatever its size."""
    model, processor = loaded
    images = [theirs.picture(1, 100, 60), theirs.picture(2, 50, 130)]
    inputs = processor(QUESTION, images=images)
    assert [pixels.data.shape for pixels in inputs.pixels] == [(1, 44, 44, 3)] * 2
    assert len(inputs.visual) == 2 * 10
    want = theirs.prepare(images)["pixel_values"].numpy().transpose(0, 1, 3, 4, 2)
    for pixels, pixel_values in zip(inputs.pixels, want, strict=True):
        assert np.abs(pixels.data * (2 / 255) - 1 - pixel_values).max() < 1e-6
    parts = prompt(0, 1)
    assert distance(model(inputs)[0], reference_logits(theirs, reference, parts, images)) < FLOAT32
    swapped = reference_logits(theirs, reference, prompt(1, 0), images)
    assert distance(model(inputs)[0], swapped) > 0.01
    pieces = list(stream_generate(*loaded, QUESTION, images=images, max_tokens=6))
    assert tokens(pieces) == greedy(theirs, reference, parts, images, 6)


def test_text_only(loaded, theirs, reference):
    model, processor = loaded
    question = "How are you?"
    inputs = processor(question)
    assert inputs.visual.size == 0
    row = ids(f"{SYSTEM}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    assert inputs.input_ids.tolist() == [row]
    assert distance(model(inputs)[0], theirs.forward(reference, row, [])) < FLOAT32
    pieces = list(stream_generate(*loaded, question, max_tokens=6))
    assert tokens(pieces) == greedy(theirs, reference, [row], [], 6)


def test_strategies(folder, theirs, reference):
    """ "anyres" tiles every image, as transformers does with images of different prompts."""
    images = [theirs.picture(1, 100, 60), theirs.picture(2, 50, 130)]
    model, processor = load(str(folder), image_strategy="anyres")
    inputs = processor(QUESTION, images=images)
    for pixels, image in zip(inputs.pixels, images, strict=True):
        want = theirs.encode(reference, [image])[0]
        assert distance(model.encode_image(pixels), want) < FLOAT32
    model, processor = load(str(folder), image_strategy="pad")
    pixels = processor(QUESTION, images=images[:1]).pixels[0]
    assert distance(model.encode_image(pixels), theirs.encode(reference, images)[0]) < FLOAT32


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_how_many_tiles_at_once_changes_nothing(loaded, theirs, monkeypatch, at_once):
    model, processor = loaded
    pixels = processor(QUESTION, images=[theirs.picture(1, 240, 200)]).pixels[0]
    want = model.features(pixels.data)
    monkeypatch.setattr(llava_onevision, "TILES_AT_ONCE", at_once)
    assert distance(model.features(pixels.data), want) < 2e-6


def test_memory_does_not_grow_with_the_tiles(loaded, monkeypatch):
    """37 tiles at 2 at once hold little more than 5 do: features, which are small."""
    model, _ = loaded
    tiles = np.zeros((36, 44, 44, 3), np.uint8)
    peaks = []
    for at_once in (36, 2):
        monkeypatch.setattr(llava_onevision, "TILES_AT_ONCE", at_once)
        peaks.append(least_peak(lambda: model.features(tiles)))
    assert peaks[1] < peaks[0] / 3


@pytest.mark.parametrize("shape", [(18, 18, 10, 10), (7, 18, 5, 13), (9, 4, 9, 3), (4, 5, 7, 11)])
def test_shrinking_is_torch_s_interpolate(shape):
    import torch

    height, width, *out = shape
    x = np.random.default_rng(0).normal(size=(height, width, 5)).astype(np.float32)
    channels_first = torch.from_numpy(x).permute(2, 0, 1)[None].double()
    want = torch.nn.functional.interpolate(channels_first, out, mode="bilinear")
    got = resize_bilinear(mx.array(x), *out)
    assert distance(got, want[0].permute(1, 2, 0)) < 1e-6


def _aligned(size, out):
    places = np.linspace(0, size - 1, out)
    low = places.astype(np.int32)
    return mx.array(low), mx.array(np.minimum(low + 1, size - 1)), mx.array(places - low)


def _one_row_up(size, grid, unpad=llava_onevision.unpad):
    box = unpad(size, grid)
    return box._replace(top=box.top - 1)


def _columns_first(tiles, side, cut=tiling.cut):
    return cut(tiles.swapaxes(0, 1), side).swapaxes(1, 2)


FAULTS = {
    "corners aligned": ("mlx_vlm_edge.kernels._neighbours", _aligned, (240, 200)),
    "unpadded too high": ("mlx_vlm_edge.models.llava_onevision.unpad", _one_row_up, (200, 60)),
    "tiles column by column": ("mlx_vlm_edge.picture.tiling.cut", _columns_first, (264, 264)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(loaded, theirs, reference, monkeypatch, fault):
    target, replacement, size = FAULTS[fault]
    image = theirs.picture(1, *size)
    monkeypatch.setattr(target, replacement)
    model, processor = loaded
    got = model.encode_image(processor(QUESTION, images=[image]).pixels[0])
    assert distance(got, theirs.encode(reference, [image])[0]) > 0.01


CHANGES = {
    "exact gelu": lambda tower: [setattr(layer, "_activation", gelu) for layer in tower.layers],
    "a layer less": lambda tower: tower.layers.pop(),
    "no position": lambda tower: tower.update({"position_embedding": mx.zeros((9, 32))}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_tower_is_caught(folder, theirs, reference, change):
    model, processor = load(str(folder))
    CHANGES[change](model.vision_tower)
    image = theirs.picture(1, 100, 60)
    got = model.encode_image(processor(QUESTION, images=[image]).pixels[0])
    assert distance(got, theirs.encode(reference, [image])[0]) > 5 * FLOAT32


def test_bfloat16_as_near_as_the_original(folder, theirs, reference):
    import torch

    image = theirs.picture(1, 100, 60)
    want = theirs.encode(reference, [image])[0]
    rounded = theirs.encode(copy.deepcopy(reference).to(torch.bfloat16), [image])[0].double()
    model, processor = load(str(folder), dtype="bfloat16")
    got = model.encode_image(processor(QUESTION, images=[image]).pixels[0])
    assert got.dtype == mx.bfloat16
    assert distance(got.astype(mx.float32), want) < BFLOAT16_FACTOR * distance(rounded, want) < 0.1


# Checkpoints


def geometry(config):
    """A config without what only its source tells: the "default" scaling of RoPE is none."""
    return replace(config, text=replace(config.text, rope_scaling=None))


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_every_layout_gives_the_same_model(theirs, tmp_path, tied):
    model = theirs.build(tied)
    arrays = theirs.weights(model)
    models = {
        layout: load(str(theirs.save(arrays, tmp_path / layout, layout, tied)))[0]
        for layout in LAYOUTS
    }
    saved = theirs.save(arrays, tmp_path / "saved", "hub", tied)
    (saved / "model.safetensors").unlink()
    model.save_pretrained(saved)  # what this version of transformers writes
    models["saved"] = load(str(saved))[0]
    want = dict(tree_flatten(models["native"].parameters()))
    assert ("language_model.lm_head.weight" in want) is not tied
    for found in models.values():
        parameters = dict(tree_flatten(found.parameters()))
        assert parameters.keys() == want.keys()
        assert all(mx.array_equal(parameters[name], want[name]) for name in want)
        assert geometry(found.config) == geometry(models["native"].config)


def test_a_converted_folder_is_native_and_runs_alike(theirs, weights, folder, tmp_path):
    from mlx_vlm_edge_convert import convert

    source = theirs.save(weights, tmp_path / "original", "original")
    out = convert(source, tmp_path / "out", verify=True)
    assert llava_onevision.is_native(mx.load(str(out / "model.safetensors")))
    written = json.loads((out / "config.json").read_text())
    assert written["model_type"] == "llava_onevision"
    assert written["mm_patch_merge_type"] == "spatial_unpad", "unknown keys are kept"
    pixels = json.loads((out / "preprocessor_config.json").read_text())
    assert pixels["image_mean"] == pixels["image_std"] == [0.5] * 3
    image = theirs.picture(1, 100, 60)
    got, want = (
        model(processor(QUESTION, images=[image])) for model, processor in map(load, (out, folder))
    )
    assert mx.array_equal(got, want)


def test_a_converted_folder_quantised(theirs, weights, tmp_path):
    from mlx_vlm_edge_convert import convert

    source = theirs.save(weights, tmp_path / "hub", "hub")
    out = convert(source, tmp_path / "out", bits=8, verify=True)
    kinds = json.loads((out / "config.json").read_text())["quantization"]
    assert kinds["multi_modal_projector.linear_1"] is False
    image = theirs.picture(1, 100, 60)
    got, want = (
        model(processor(QUESTION, images=[image]))
        for model, processor in (load(str(out)), load(str(source), quantize=8))
    )
    assert distance(got, want) < FLOAT32


# The published size

TEXT = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
}  # fmt: skip


def published(layout):
    """config.json of the 0.5B as it is on the Hub: flat, or nested with what is not a default."""
    if layout == "original":
        flat = {key: value for key, value in TEXT.items() if key != "model_type"}
        return {
            **flat,
            "architectures": ["LlavaQwenForCausalLM"],
            "model_type": "llava",
            "eos_token_id": 151645,
            "image_aspect_ratio": "anyres_max_9",
            "image_grid_pinpoints": llava_onevision.default_pinpoints(384),
            "image_token_index": 151646,
            "mm_hidden_size": 1152,
            "mm_patch_merge_type": "spatial_unpad",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": "google/siglip-so400m-patch14-384",
            "tie_word_embeddings": True,
        }
    text = {**TEXT, "vocab_size": 152000, "tie_word_embeddings": True}
    return {
        "model_type": "llava_onevision",
        "image_token_index": 151646,
        "text_config": text,
        "tie_word_embeddings": False,
        "vision_config": {"model_type": "siglip_vision_model", "num_hidden_layers": 26},
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_published_size_maps_every_key(theirs, layout):
    """Names and shapes of the 0.5B, from transformers' own model; no weight is allocated."""
    import torch
    from mlx_vlm_edge_convert.families import llava_onevision as converter
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = published(layout)
    vocabulary = 151936 if layout == "original" else 152000
    text = {**TEXT, "vocab_size": vocabulary, "tie_word_embeddings": True}
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(text_config=text))
    shapes = {
        name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    mx.clear_cache()
    peak = Peak()
    arrays = {
        name: mx.zeros(tuple(tensor.shape), mx.bfloat16)
        for name, tensor in theirs.in_layout(shapes, layout).items()
    }
    native, converted = converter.to_native(config, arrays)
    built = build(llava_onevision, native, converted)
    assert peak.bytes < 2e6
    count = sum(p.size for _, p in tree_flatten(built.parameters()))
    unused = 2 * 1152  # the norm after the tower
    assert count == sum(tensor.numel() for tensor in shapes.values()) - unused
    assert built.config.vision.layers == 26
    assert built.config.vision.grid**2 == 729
    assert built.config.text.vocab_size == vocabulary
    assert built.config.text.tie_word_embeddings
    assert built.config.context == 32768
    matrices = [a for n, a in converted.items() if n.startswith("language_model.") and a.ndim == 2]
    assert all(array.shape[1] % 64 == 0 for array in matrices), "groups of 64 divide every width"


# (height, width): visual tokens, by transformers' formula; facts of LLaVA-OneVision, section 3.2.
COUNTS = {
    (384, 384): 1485, (480, 640): 2929, (768, 768): 3699, (1024, 1024): 7371, (1152, 1152): 7371,
    (1080, 1920): 7269, (1536, 1536): 7371, (2304, 2304): 7371, (3024, 4032): 7309,
    (1920, 768): 8154, (1243, 1021): 8765,
}  # fmt: skip


@pytest.mark.parametrize("size", COUNTS, ids=str)
def test_token_counts_of_the_published_size(loaded, size):
    config = llava_onevision.Config.from_dict(published("hub"))
    processor = llava_onevision.Processor(config, loaded[1].tokenizer)
    width, height = best_resolution(size[::-1], config.resolutions)
    tiles = np.zeros((2, 1, 1, 3), np.uint8)  # their number and contents do not matter
    tiled = Tiles(tiles, size[::-1], rows=height // 384, columns=width // 384)
    assert processor.visual_tokens(tiled) == COUNTS[size]
    alone = Pixels(np.zeros((1, 1, 1, 3), np.uint8), size[::-1])
    assert processor.visual_tokens(alone) == 730


# What cannot be run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio 'anyres'"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
        ({"image_grid_pinpoints": [[384, 400]]}, "multiples of 384"),
        ({"image_grid_pinpoints": "(1x1)"}, "image_grid_pinpoints"),
        ({"vision_feature_layer": [1, 2]}, "vision_feature_layer"),
        ({"text_config": None}, "text_config"),
        ({"text_config": TEXT | {"model_type": "llama"}}, "'llama'"),
        ({"vision_config": {"model_type": "vit"}}, "'vit'"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        llava_onevision.Config.from_dict(published("hub") | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
        ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type 'flat'"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "mm_vision_tower"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints"),
        ({"vision_config": {"image_size": 384}}, "hidden_size 1152"),
    ],
)
def test_an_original_config_that_cannot_be_run_is_refused(theirs, weights, change, message):
    from mlx_vlm_edge_convert.families import llava_onevision as converter

    arrays = theirs.in_layout(weights, "original")
    arrays = {name: mx.array(tensor.numpy()) for name, tensor in arrays.items()}
    with pytest.raises(UsageError, match=message):
        converter.to_native(theirs.original_config() | change, arrays)


OTHER = {
    "image_mean": [0.48, 0.46, 0.41], "size": {"shortest_edge": 336}, "resample": 2,
    "image_grid_pinpoints": [[44, 44]], "rescale_factor": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("layout", ["hub", "native"])
def test_a_preprocessor_of_another_kind_is_refused(theirs, weights, tmp_path, layout):
    folder = theirs.save(weights, tmp_path / "hub", "hub")
    if layout == "native":
        from mlx_vlm_edge_convert import convert

        folder = convert(folder, tmp_path / "native")
    for key, value in OTHER.items():
        (folder / "preprocessor_config.json").write_text(json.dumps({key: value}))
        with pytest.raises(UsageError, match=key):
            load(str(folder))


def test_a_grid_is_height_before_width_in_the_native_config(theirs, weights, tmp_path):
    """The original lists (width, height)."""
    from mlx_vlm_edge_convert.families import llava_onevision as converter

    arrays = theirs.in_layout(weights, "original")
    arrays = {name: mx.array(tensor.numpy()) for name, tensor in arrays.items()}
    config = theirs.original_config() | {"image_grid_pinpoints": [[88, 44], [132, 44]]}
    native, _ = converter.to_native(config, arrays)
    assert native["image_grid_pinpoints"] == [[44, 88], [44, 132]]
    assert llava_onevision.Config.from_dict(native).resolutions == ((88, 44), (132, 44))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"image_strategy": "center_crop"}, "anyres, pad"), ({"resolution": 88}, "44 pixels")],
)
def test_preprocessing_it_does_not_have_is_refused(folder, options, message):
    with pytest.raises(UsageError, match=message):
        load(str(folder), **options)
