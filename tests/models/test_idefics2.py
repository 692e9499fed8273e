"""Idefics2 against golden numbers of transformers: pixels, tower, tokens, prompt, logits, ids."""

import json
import shutil
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_vlm_edge_convert import convert
from PIL import Image

from mlx_vlm_edge import load, stream_generate
from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.connectors import perceiver
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.loading import cost
from mlx_vlm_edge.models import idefics2
from mlx_vlm_edge.picture.image import Pixels
from mlx_vlm_edge.picture.pieces import cut_out
from mlx_vlm_edge.picture.video import Video

from ..parity import FLOAT32, distance

PICTURED = ("land", "port", "two", "chat", "raw")  # 300 x 170, 61 x 133, 100 x 100, 40 x 9 pixels
CASES = (*PICTURED, "text")
AROUND, IMAGE = "<fake_token_around_image>", "<image>"


@pytest.fixture(scope="module")
def folder(golden):
    return golden.parent / "idefics2_tiny"


@pytest.fixture(scope="module")
def loaded(folder):
    return load(str(folder))


@pytest.fixture(scope="module")
def reference(folder):
    return np.load(folder / "ref.npz")


def case(reference, name):
    """Its arrays by name; its prompt, raw or as messages; its pictures."""
    arrays = {key.split("/")[1]: reference[key] for key in reference if key.startswith(f"{name}/")}
    images = [arrays[key] for key in ("image0", "image1") if key in arrays]
    asked = json.loads(str(arrays["messages"])) if "messages" in arrays else str(arrays["prompt"])
    return arrays, asked, images


def copied(folder, target, name="config.json", **changes):
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.npz"))
    config = json.loads((target / name).read_text()) | changes
    (target / name).write_text(json.dumps(config))
    return target


def parameters(model):
    return dict(tree_flatten(model.parameters()))


def rows_of(pixels):
    """Our pieces as the original's normalised ones, float32 [3, H, W]."""
    return [
        ((piece / 255 - 0.5) / 0.5).transpose(2, 0, 1).astype(np.float32)
        for piece in cut_out(pixels)
    ]


@pytest.mark.parametrize("name", PICTURED)
def test_every_stage_is_the_originals(loaded, reference, name):
    model, processor = loaded
    want, asked, images = case(reference, name)
    inputs = processor(asked, images=images, raw=isinstance(asked, str))
    tokens = []
    for index, pixels in enumerate(inputs.pixels):
        (ours,) = rows_of(pixels)
        _, height, width = ours.shape
        assert int(want["pixel_mask"][index].sum()) == height * width
        assert np.abs(ours - want["pixels"][index][:, :height, :width]).max() < 1e-6
        patches = want["patch_mask"][index].reshape(-1)
        features = model.features(pixels.data)
        assert distance(features[0], want["tower"][index][patches]) < FLOAT32
        tokens.append(model.encode_image(pixels))
    assert distance(mx.concatenate(tokens), want["features"]) < FLOAT32


@pytest.mark.parametrize("name", CASES)
def test_prompt_ids_logits_and_greedy_ids_are_the_originals(loaded, reference, name):
    model, processor = loaded
    want, asked, images = case(reference, name)
    raw = isinstance(asked, str)
    inputs = processor(asked, images=images, raw=raw)
    assert inputs.input_ids[0].tolist() == want["input_ids"].tolist()
    assert len(inputs.visual) == 8 * len(images)
    assert distance(model(inputs)[0], want["logits"]) < FLOAT32
    ends, processor.eos_ids = processor.eos_ids, frozenset()
    pieces = list(stream_generate(model, processor, asked, images, raw=raw, max_tokens=12))
    processor.eos_ids = ends
    assert [piece.token for piece in pieces[:12]] == want["greedy"].tolist()


def test_a_chat_is_written_as_the_published_template_writes_it(loaded, reference):
    _, processor = loaded
    for name in ("land", "port", "two", "chat", "text"):
        want, asked, images = case(reference, name)
        with_template = processor(str(want["prompt"]), images=images, raw=True)
        assert with_template.input_ids.tolist() == processor(asked, images).input_ids.tolist()


def test_what_ends_an_answer(loaded):
    assert loaded[1].eos_ids == {2, 339}


# Splitting.


@pytest.fixture(scope="module")
def splitting(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("split") / "idefics2"
    return load(str(copied(folder, target, "preprocessor_config.json", do_image_splitting=True)))


def test_a_split_image_is_its_quarters_and_the_whole(splitting, loaded):
    """Each as a picture of its own, cut before it is resized, of odd sides the larger half last."""
    model, processor = splitting
    image = np.random.default_rng(2).integers(0, 256, (171, 301, 3), np.uint8)
    inputs = processor("What is this?", images=[image])
    (pixels,) = inputs.pixels
    quarters = [image[:85, :150], image[:85, 150:], image[85:, :150], image[85:, 150:], image]
    assert pixels.sizes == ((85, 150), (85, 151), (86, 150), (86, 151), (119, 210))
    alone = [loaded[1].preprocess(Image.fromarray(part)) for part in quarters]
    for piece, part in zip(cut_out(pixels), alone, strict=True):
        assert np.array_equal(piece, part.data[0])
    want = mx.concatenate([loaded[0].encode_image(part) for part in alone])
    assert distance(model.encode_image(pixels), want) < 1e-6
    assert len(inputs.visual) == processor.visual_tokens(pixels) == 40


def test_marks_that_meet_are_one(splitting):
    _, processor = splitting
    image = np.zeros((60, 60, 3), np.uint8)
    row = processor("Hi", images=[image, image]).input_ids[0].tolist()
    around, visual = (processor.tokenizer.token_id(token) for token in (AROUND, IMAGE))
    assert row.count(around) == 11
    assert row.count(visual) == 80
    assert (around, around) not in set(pairwise(row))


def test_splitting_can_be_chosen(folder, loaded):
    image = np.zeros((100, 80, 3), np.uint8)
    count = {}
    for asked in ({"image_strategy": "split"}, {"image_strategy": "split", "max_tiles": 4}, {}):
        processor = load(str(folder), **asked)[1]
        count[len(asked)] = len(processor("Hi", images=[image]).visual)
    assert count == {1: 40, 2: 8, 0: 8}


# Sizes, configs, layouts.


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((640, 480), (640, 480)),
        ((1920, 1080), (980, 551)),
        ((4032, 3024), (980, 735)),
        ((3000, 500), (980, 378)),
        ((500, 3000), (378, 980)),
        ((200, 200), (378, 378)),
        ((980, 980), (980, 980)),
    ],
)
def test_sizes_are_the_originals(size, wanted):
    assert idefics2.resized(size, 980, 378) == wanted


def test_a_published_picture_costs_what_the_original_does():
    """640 x 480: 1,530 patches whole and 4,446 split, 64 and 320 visual tokens."""
    for asked, tokens, patches in (({}, 320, 4446), ({"strategy": "whole"}, 64, 1530)):
        preprocessing = cost.Preprocessing(**asked)
        plan = cost.blueprint(configs.read("idefics2-8b"), asked=preprocessing)
        pixels = plan.pixels((640, 480))
        assert plan.processor.visual_tokens(pixels) == tokens
        assert sum((p.shape[0] // 14) * (p.shape[1] // 14) for p in cut_out(pixels)) == (patches)


def test_the_longest_edge_can_be_chosen(folder):
    _, processor = load(str(folder), resolution=98)
    assert processor.preprocess(Image.new("RGB", (300, 170))).data.shape == (1, 70, 98, 3)
    with pytest.raises(UsageError, match="image size 60"):
        load(str(folder), resolution=60)


def test_what_a_perceivers_norms_have_for_eps_where_nothing_says():
    """The text's, which is training's 1e-5; transformers 5 has 1e-6 for it."""
    config = configs.read("idefics2-8b")
    assert idefics2.Config.from_dict(config).perceiver.rms_norm_eps == 1e-5
    config["perceiver_config"]["rms_norm_eps"] = 1e-6
    assert idefics2.Config.from_dict(config).perceiver.rms_norm_eps == 1e-6


def test_the_context_ends_where_mistrals_layers_see_no_further():
    config = configs.read("idefics2-8b")
    assert idefics2.Config.from_dict(config).context == 4096
    config["text_config"]["sliding_window"] = None
    assert idefics2.Config.from_dict(config).context == 32768


@pytest.mark.parametrize("mean", [None, 0.5, [0.5000001, 0.5, 0.5]])
def test_the_same_mean_in_other_words_is_the_same(mean):
    config = configs.read("idefics2-8b")
    said = {**config, "preprocessor_config": config["preprocessor_config"] | {"image_mean": mean}}
    assert idefics2.Config.from_dict(said) == idefics2.Config.from_dict(config)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("config.json", {"text_config": {"model_type": "llama"}}, "'llama' is not known"),
        ("config.json", {"perceiver_config": {"hidden_act": "relu"}}, "'relu'"),
        ("config.json", {"perceiver_config": {"hidden_size": 32}}, "perceiver_config: hidden_size"),
        ("config.json", {"perceiver_config": {"resampler_n_heads": 3}}, "cannot share"),
        ("config.json", {"perceiver_config": {"resampler_depth": 0}}, "above zero"),
        ("config.json", {"vision_config": None}, "by its config"),
        ("preprocessor_config.json", {"image_mean": [0.4, 0.5, 0.5]}, "image_mean"),
        ("preprocessor_config.json", {"resample": 3}, "resample 3"),
        ("preprocessor_config.json", {"size": {"longest_edge": 7}}, "cannot be"),
        ("preprocessor_config.json", {"size": 980}, "size cannot be 980"),
        ("preprocessor_config.json", {"size": {"height": 98, "width": 98}}, "size cannot be {'hei"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "rescale_factor cannot be 1.0"),
    ],
)
def test_what_cannot_be_is_one_line(folder, tmp_path, name, changes, says):
    target = copied(folder, tmp_path / "copy", name, **changes)
    with pytest.raises(UsageError, match=says) as caught:
        load(str(target))
    assert "\n" not in str(caught.value)


def test_videos_are_refused(loaded):
    with pytest.raises(UsageError, match="does not take videos"):
        loaded[1]("Hi", images=[Video("clip.gif")])


def test_converted_verified_and_quantised(folder, loaded, reference, tmp_path):
    native = convert(folder, tmp_path / "native", verify=True)
    names = set(mx.load(str(native / "model.safetensors")))
    assert {"language_model.embed_tokens.weight", "language_model.lm_head.weight",
            "connector.perceiver_resampler.latents"} <= names  # fmt: skip
    model, processor = load(str(native))
    got, want = parameters(model), parameters(loaded[0])
    assert got.keys() == want.keys()
    assert all(mx.array_equal(got[name], want[name]) for name in want)
    _, asked, images = case(reference, "two")
    inputs = processor(asked, images=images)
    packed, _ = load(str(convert(widened(native), tmp_path / "packed", bits=8)))
    assert distance(packed(inputs), model(inputs)) < 0.2


def widened(folder):
    """The same model whose MLPs are 128 wide, by zeros: groups of 64 do not divide 112."""
    weights = dict(mx.load(str(folder / "model.safetensors")))
    for name, array in weights.items():
        if ("language_model" in name and ".mlp." in name) or "modality_projection" in name:
            axes = [(0, 0), (0, 16)] if "down_proj" in name else [(0, 16), (0, 0)]
            weights[name] = mx.pad(array, axes)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 128
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# Faults.


def _late(rows, columns, side):
    """Every patch but the first takes the position before its own, as transformers 4.55 did."""
    down, across = (np.maximum(np.arange(n) * side // n - 1, 0) for n in (rows, columns))
    return mx.array((down[:, None] * side + across).reshape(1, -1))


def _unstretched(rows, columns, side):
    return mx.array((np.arange(rows)[:, None] * side + np.arange(columns)).reshape(1, -1))


def _turned_context(real):
    return lambda self, latents, context: real(self, latents, mx.roll(context, 1, axis=-1))


FAULTS = {
    "late positions": ("grid_positions", idefics2, _late),
    "positions that do not stretch": ("grid_positions", idefics2, _unstretched),
    "no latents among the keys": (
        "attention", perceiver, lambda q, k, v, scale: perceiver_attention(q, k, v, scale, 8)
    ),
    "a scale for other heads": (
        "attention", perceiver, lambda q, k, v, scale: perceiver_attention(q, k, v, 0.5 * scale, 0)
    ),
    "silu on the other half": (
        "swiglu", perceiver, lambda gate, up: up * mx.sigmoid(up) * gate
    ),
    "context of other channels": (
        "__call__", perceiver.Attention, _turned_context(perceiver.Attention.__call__)
    ),
}  # fmt: skip


def perceiver_attention(q, k, v, scale, dropped):
    keep = k.shape[2] - dropped
    return mx.fast.scaled_dot_product_attention(q, k[:, :, :keep], v[:, :, :keep], scale=scale)


@pytest.mark.parametrize("fault", [*FAULTS, "padding is seen", "BGR", "eps"])
def test_a_fault_is_caught(folder, reference, monkeypatch, fault):
    if fault in FAULTS:
        name, owner, replacement = FAULTS[fault]
        monkeypatch.setattr(owner, name, replacement)
    model, processor = load(str(folder))
    want, asked, images = case(reference, "chat")
    pixels = processor(asked, images=images).pixels[0]
    if fault == "padding is seen":  # to the size of the larger picture
        data = np.full((1, 133, 210, 3), 128, np.uint8)
        data[:, : pixels.data.shape[1], : pixels.data.shape[2]] = pixels.data
        pixels = Pixels(data, pixels.size)
    if fault == "BGR":
        pixels = Pixels(np.ascontiguousarray(pixels.data[..., ::-1]), pixels.size)
    if fault == "eps":
        for layer in model.connector.perceiver_resampler.layers:
            layer.post_attention_layernorm.eps = 1e-2
    assert distance(model.encode_image(pixels), want["features"][:8]) > 5 * FLOAT32
