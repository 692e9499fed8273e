"""Fuyu against transformers': pixels, prompt, every layer, logits, greedy ids; its conversion."""

import copy
import gzip
import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_vlm_edge_convert import convert
from mlx_vlm_edge_convert.families import fuyu as rules

from mlx_vlm_edge import load, stream_generate
from mlx_vlm_edge.checkpoint.config import PREPROCESSOR
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.generation.loop import Options, make_cache
from mlx_vlm_edge.hub.models import repo_id
from mlx_vlm_edge.kernels import quantized
from mlx_vlm_edge.language import persimmon
from mlx_vlm_edge.models import fuyu
from mlx_vlm_edge.models.build import build

from ..memory import Peak
from ..parity import BFLOAT16_FACTOR, FLOAT32, distance

QUESTION = "What is this?"
KEYS = Path(__file__).parents[1] / "golden" / "keys" / "fuyu_8b_keys.json.gz"
SIZES = [(100, 70), (61, 59), (30, 30), (31, 29), (5, 200), (1, 1)]
LARGE = [(1920, 1080), (2500, 1501), (1921, 40), (40, 1081), (3333, 3331)]


@pytest.fixture(scope="module")
def theirs():
    from ..reference import fuyu as theirs

    return theirs


@pytest.fixture(scope="module")
def reference(theirs):
    """transformers' Fuyu in float64, so that its rounding does not count."""
    return theirs.build().double()


@pytest.fixture(scope="module")
def folders(theirs, reference, tmp_path_factory):
    single = copy.deepcopy(reference).float()
    root = tmp_path_factory.mktemp("fuyu")
    return {kind: theirs.save(single, root / kind, kind) for kind in ("hub", "transformers")}


@pytest.fixture(scope="module", params=["hub", "transformers"])
def loaded(request, folders):
    return load(str(folders[request.param]))


@pytest.fixture(scope="module")
def hub(folders):
    return load(str(folders["hub"]))


def tokens(pieces):
    return [piece.token for piece in pieces if piece.token is not None]


def normalised(pixels):
    """float32 patches as the model makes them."""
    return (fuyu.patchify(mx.array(pixels.data), 30).astype(mx.float32) / 255 - 0.5) / 0.5


@pytest.mark.parametrize("size", SIZES + LARGE)
def test_pixels_are_the_originals(hub, theirs, size):
    """Resized, padded, scaled and cut into patches as with the original's Pillow chain."""
    image = theirs.picture(3, *size)
    pixels = hub[1](QUESTION, images=[image]).pixels[0]
    assert pixels.size == size
    got = np.array(normalised(pixels)).reshape(-1, 2700)
    want = theirs.patches(image)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 2**-23  # one rounding; a pixel's step is 2**-7


def test_torchvisions_resize_is_a_step_off_at_most(hub, theirs):
    """transformers 5 resizes with torchvision where it is installed, unlike Adept's own code."""
    image = theirs.picture(3, 2500, 1501)
    want = theirs.processor()(text="a", images=theirs.Image.fromarray(image))["image_patches"]
    got = np.array(normalised(hub[1](QUESTION, images=[image]).pixels[0])).reshape(-1, 2700)
    off = np.abs(got - np.asarray(want)) * 127.5
    assert off.max() < 1.001
    assert (off > 0.5).mean() < 0.02


@pytest.mark.parametrize(
    ("size", "count"),
    [((1920, 1080), 2340), ((640, 480), 368), ((300, 300), 110), ((4000, 3000), 1764),
     ((1, 1), 2), ((20000, 3), 65)],
)  # fmt: skip
def test_visual_tokens_counted_with_their_newlines(hub, size, count):
    model, processor = hub
    width, height = size
    inputs = processor(QUESTION, images=[np.zeros((height, width, 3), np.uint8)])
    assert processor.visual_tokens(inputs.pixels[0]) == len(inputs.visual) == count
    assert model.encode_image(inputs.pixels[0]).shape == (count, 64)


@pytest.mark.parametrize("size", [(100, 70), (61, 59), (1, 1)])
def test_the_prompt_is_the_originals(loaded, theirs, size):
    _, processor = loaded
    image = theirs.picture(1, *size)
    inputs = processor(QUESTION, images=[image])
    assert inputs.input_ids[0].tolist() == theirs.token_ids(f"{QUESTION}\n", image)
    assert inputs.visual.tolist() == list(range(len(inputs.visual)))
    assert inputs.input_ids[0, len(inputs.visual)] == 1  # BOS
    assert np.count_nonzero(inputs.input_ids == 1) == 1


@pytest.mark.parametrize("text", ["What is it", " a  bus.\n\n", "", "What <0x04> |NEWLINE|"])
def test_a_raw_prompt_is_the_originals(hub, theirs, text):
    image = theirs.picture(1, 40, 70)
    inputs = hub[1](text, images=[image], raw=True)
    assert inputs.input_ids[0].tolist() == theirs.token_ids(text, image)
    alone = hub[1](text, raw=True)
    assert alone.input_ids[0].tolist() == theirs.token_ids(text, None)


def test_a_user_cannot_write_places(hub, theirs):
    row = hub[1]("A <image>", images=[theirs.picture(1, 40, 70)]).input_ids[0].tolist()
    assert row.count(4) == 6
    assert hub[1].tokenizer.decode(row[10:-1]) == "A <image>\n"


def test_the_picture_goes_first_wherever_it_is_named(hub, theirs):
    image, picture = theirs.picture(1, 40, 70), {"type": "image"}
    text = {"type": "text", "text": QUESTION}
    first, last = (
        hub[1]([{"role": "user", "content": parts}], images=[image]).input_ids.tolist()
        for parts in ([picture, text], [text, picture])
    )
    marked = hub[1](f"<image>{QUESTION}\n", images=[image], raw=True).input_ids.tolist()
    assert first == last == marked == hub[1](QUESTION, images=[image]).input_ids.tolist()


@pytest.mark.parametrize("size", [(100, 70), (333, 200), (1, 1)])
def test_every_stage(loaded, reference, theirs, size):
    model, processor = loaded
    image = theirs.picture(1, *size)
    inputs = processor(QUESTION, images=[image])
    embeddings, *layers, logits = theirs.layers(reference, inputs.input_ids[0].tolist(), image)
    assert distance(model.encode_image(inputs.pixels[0]), embeddings[inputs.visual]) < FLOAT32
    x = model.embed(inputs)
    assert distance(x[0], embeddings) < FLOAT32
    decoder = model.language_model.model
    for index, (layer, want) in enumerate(zip(decoder.layers, layers, strict=True)):
        x = layer(x, "causal", None)
        got = decoder.norm(x) if index == len(layers) - 1 else x  # transformers' last has the norm
        assert distance(got[0], want) < FLOAT32, f"layer {index}"
    assert distance(model(inputs)[0], logits) < FLOAT32


def test_text_only(loaded, reference, theirs):
    model, processor = loaded
    inputs = processor(QUESTION)
    ids = theirs.token_ids(f"{QUESTION}\n", None)
    assert inputs.input_ids.tolist() == [ids]
    assert inputs.visual.size == 0
    assert distance(model(inputs)[0], theirs.layers(reference, ids, None)[-1]) < FLOAT32


@pytest.mark.parametrize(("seed", "size"), [(1, (100, 70)), (2, (61, 59)), (3, None)])
def test_greedy_ids(loaded, reference, theirs, seed, size):
    image = None if size is None else theirs.picture(seed, *size)
    ids = theirs.token_ids(f"{QUESTION}\n", image)
    want, gap = theirs.greedy(reference, ids, image, 8)
    assert gap > 1e-3, "the reference's choice is nearly a tie; take another picture"
    got = tokens(stream_generate(*loaded, QUESTION, image=image, max_tokens=8))
    assert got == want[: len(got)]
    assert len(got) == 8 or got[-1] in loaded[1].eos_ids


@pytest.mark.parametrize("step_size", [1, 7, 2048])
def test_prefill_and_decoding_are_the_full_forward(hub, theirs, step_size):
    model, processor = hub
    inputs = processor(QUESTION, images=[theirs.picture(1, 100, 70)])
    cache = make_cache(model, inputs, Options())
    last = model.prefill(inputs, cache, step_size)
    embeddings = model.embed(inputs)
    assert distance(last[0], model.language_model(embeddings)[0, -1]) < FLOAT32
    for token in (40, 350, 5):
        step = model.step(mx.array([token]), cache)
        more = model.language_model.embed(mx.array([[token]]))
        embeddings = mx.concatenate([embeddings, more], axis=1)
        assert distance(step[0], model.language_model(embeddings)[0, -1]) < FLOAT32


def test_bfloat16_as_near_as_the_original(folders, reference, theirs):
    image = theirs.picture(1, 333, 200)
    model, processor = load(str(folders["hub"]), dtype="bfloat16")
    inputs = processor(QUESTION, images=[image])
    ids = inputs.input_ids[0].tolist()
    want = theirs.layers(reference, ids, image)
    original = theirs.layers(copy.deepcopy(reference).bfloat16(), ids, image)
    for stage, got in ((0, model.embed(inputs)), (-1, model(inputs))):
        assert got.dtype == mx.bfloat16
        allowed = BFLOAT16_FACTOR * distance(original[stage], want[stage])
        assert distance(got[0].astype(mx.float32), want[stage]) < allowed < 0.05


def _blocks_of_qkv(model, _):
    """As if the fused projection had all of q first, then k, then v."""
    for layer in model.language_model.model.layers:
        projection = layer.self_attn.query_key_value
        for name in ("weight", "bias"):
            blocks = projection[name].reshape(3, 4, 16, -1).swapaxes(0, 1)
            projection[name] = blocks.reshape(projection[name].shape)


def _no_key_norm(model, _):
    for layer in model.language_model.model.layers:
        layer.self_attn.k_layernorm = nn.Identity()


def _every_rope(**changes):
    def plant(model, _):
        for layer in model.language_model.model.layers:
            for name, value in changes.items():
                setattr(layer.self_attn, name, value)

    return plant


def _patched(where, name, replacement):
    return lambda model, monkeypatch: monkeypatch.setattr(where, name, replacement)


def _channels_first(x, patch, original=fuyu.patchify):
    return original(x, patch).reshape(-1, 900, 3).swapaxes(1, 2).reshape(*_grid(x), -1)


def _columns_first(x, patch, original=fuyu.patchify):
    return original(x, patch).swapaxes(0, 1).reshape(*_grid(x), -1)


def _grid(x):
    return x.shape[0] // 30, x.shape[1] // 30


FAULTS = {
    "q, k and v in blocks": _blocks_of_qkv,
    "keys without their norm": _no_key_norm,
    "the whole head turned": _every_rope(rotary_dims=16),
    "another theta": _every_rope(base=10000.0),
    "relu without the square": _patched(persimmon, "relu_squared", lambda x: mx.maximum(x, 0)),
    "channels before pixels": _patched(fuyu, "patchify", _channels_first),
    "columns before rows": _patched(fuyu, "patchify", _columns_first),
    "padded with black": _patched(fuyu, "PADDING", 0),
    "never scaled": _patched(fuyu, "fit_within", lambda size, limit: size),
    "no beginning of the answer": _patched(fuyu, "ANSWER", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(folders, reference, theirs, monkeypatch, fault):
    """Wrong numbers at a place that the tests above compare."""
    image = theirs.picture(1, 1950, 40) if fault == "never scaled" else theirs.picture(1, 100, 70)
    ids = theirs.token_ids(f"{QUESTION}\n", image)
    model, processor = load(str(folders["hub"]))
    FAULTS[fault](model, monkeypatch)
    inputs = processor(QUESTION, images=[image])
    same_prompt = inputs.input_ids[0].tolist() == ids
    logits = theirs.layers(reference, ids, image)[-1]
    assert not same_prompt or distance(model(inputs)[0], logits) > 5 * FLOAT32


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.05), (4, 0.8)])
def test_a_quantised_language_model(folders, reference, theirs, tmp_path, bits, limit):
    """At load and in the converter: the same numbers, near the original's."""
    image = theirs.picture(1, 100, 70)
    converted = convert(folders["transformers"], tmp_path / "out", bits=bits, verify=True)
    outputs = []
    for name, at_load in ((folders["hub"], bits), (converted, None)):
        model, processor = load(str(name), quantize=at_load)
        inputs = processor(QUESTION, images=[image])
        outputs.append(model(inputs)[0])
        attention = model.language_model.model.layers[0].self_attn
        assert isinstance(attention.query_key_value, nn.QuantizedLinear | quantized.Linear)
        assert type(model.vision_embed_tokens) is nn.Linear
    want = theirs.layers(reference, inputs.input_ids[0].tolist(), image)[-1]
    assert distance(outputs[0], outputs[1]) < FLOAT32
    assert distance(outputs[0], want) < limit


def test_converting_keeps_names_and_config(folders, tmp_path):
    lines = []
    out = convert(folders["transformers"], tmp_path / "out", verify=True, report=lines.append)
    assert any("vision tower: max abs 0.00e+00" in line for line in lines)
    native, published = (mx.load(str(f / "model.safetensors")) for f in (out, folders["hub"]))
    assert native.keys() == published.keys()
    assert all(mx.array_equal(native[name], published[name]) for name in native)
    written = json.loads((out / "preprocessor_config.json").read_text())
    assert written["image_processor_type"] == "FuyuImageProcessor"
    assert written["size"] == {"height": 1080, "width": 1920}
    assert json.loads((out / "config.json").read_text())["text_config"]["hidden_size"] == 64


def test_the_published_checkpoint_maps_whole_and_unallocated():
    """All 582 weights of Fuyu-8B become parameters of a full-size model; none is made."""
    with gzip.open(KEYS, "rt") as file:
        listed = json.load(file)
    peak = Peak()
    source = {name: mx.zeros(shape, dtype=mx.bfloat16) for name, shape in listed.items()}
    text = {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 64,
            "intermediate_size": 16384, "vocab_size": 262144}  # fmt: skip
    config, native = rules.to_native({"model_type": "fuyu", "text_config": text}, source)
    assert len(native) == len(source) == 582
    assert "language_model.model.layers.35.self_attn.query_key_value.bias" in native
    model = build(fuyu, config, native)
    assert sum(p.size for _, p in nn.utils.tree_flatten(model.parameters())) == 9_408_238_592
    parsed = model.config
    assert (parsed.image_token_id, parsed.image_newline_id) == (None, None)  # the tokenizer's
    assert (parsed.text.rope_theta, parsed.text.rotary_dims, parsed.context) == (25000.0, 32, 16384)
    assert (parsed.text.layer_norm_eps, parsed.eos_token_ids) == (1e-5, (2,))
    assert peak.bytes < 10_000_000


def test_an_unknown_weight_is_refused():
    with pytest.raises(UsageError, match=r"transformers' fuyu layout: no rule for model\.extra"):
        rules.to_native({}, {"lm_head.weight": mx.zeros(1), "model.extra": mx.zeros(1)})


def test_the_resolution_limits_the_longer_side(folders, reference, theirs):
    image = theirs.picture(1, 400, 150)
    model, processor = load(str(folders["hub"]), resolution=120)
    inputs = processor(QUESTION, images=[image])
    assert inputs.pixels[0].data.shape == (60, 120, 3)
    small = np.asarray(theirs.Image.fromarray(image).resize((120, 45), theirs.Image.BILINEAR))
    logits = theirs.layers(reference, theirs.token_ids(f"{QUESTION}\n", small), small)[-1]
    assert distance(model(inputs)[0], logits) < FLOAT32


def test_its_alias():
    assert repo_id("fuyu-8b") == "adept/fuyu-8b"


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        (QUESTION, 2, "one picture per question, not 2"),
        ([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}], 0, "no conver"),
        ([{"role": "user", "content": [{"type": "image"}]}], 0, "1 place .* 0 images"),
        ([{"role": "user", "content": [{"type": "video"}]}], 0, "1 place .* 0 images"),
    ],
)
def test_what_it_was_not_trained_for_is_refused(hub, prompt, images, message):
    black = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(UsageError, match=message) as caught:
        hub[1](prompt, images=[black] * images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"qk_layernorm": False}, "qk_layernorm False"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear'"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"patch_size": 14}, "patches of 14"),
        ({"num_channels": 1}, "1 channels"),
        ({PREPROCESSOR: {"patch_size": {"height": 15, "width": 15}}}, "patches of 30"),
        ({PREPROCESSOR: {"size": {"height": 600, "width": 100}}}, "up to 100 x 600"),
        ({PREPROCESSOR: {"size": 600}}, "size cannot be 600"),
        ({PREPROCESSOR: {"do_resize": False}}, "do_resize False"),
        ({PREPROCESSOR: {"image_mean": [0.4, 0.4, 0.4]}}, "image_mean"),
        ({PREPROCESSOR: {"resample": 3}}, "resample 3"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(folders, change, message):
    config = json.loads((folders["hub"] / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(UsageError, match=message):
        fuyu.Config.from_dict(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"image_strategy": "pad"}, "own shape"), ({"resolution": 100}, "multiples of 30")],
)
def test_options_that_cannot_be_are_refused(folders, options, message):
    with pytest.raises(UsageError, match=message):
        load(str(folders["hub"]), **options)


def test_ids_that_the_config_does_not_name_are_the_tokenizers(folders, hub, tmp_path):
    """As transformers writes it: the config has no image_newline_id, the tokenizer has."""
    folder = shutil.copytree(folders["hub"], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    for key in ("image_newline_id", "image_token_id"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    image = np.full((70, 100, 3), 90, np.uint8)
    (model, processor), (same, asked) = load(str(folder)), hub
    want, inputs = asked(QUESTION, images=[image]), processor(QUESTION, images=[image])
    assert inputs.input_ids.tolist() == want.input_ids.tolist()
    assert mx.array_equal(model(inputs), same(want))


def test_the_size_of_the_preprocessors_file_is_honoured(folders, tmp_path, theirs):
    from PIL.Image import Resampling
    from transformers.image_utils import SizeDict
    from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

    folder = shutil.copytree(folders["hub"], tmp_path / "copy")
    said = {"size": {"height": 120, "width": 210}, "image_mean": 0.5, "padding_value": 1.0}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    image = theirs.picture(3, 333, 200)
    (pixels,) = load(str(folder))[1](QUESTION, images=[image]).pixels
    resized = FuyuImageProcessorPil(size=said["size"]).resize(
        image.transpose(2, 0, 1), SizeDict(**said["size"]), resample=Resampling.BILINEAR
    )
    height, width = resized.shape[1:]
    assert (width, height) == (199, 120)
    assert np.array_equal(pixels.data[:height, :width], resized.transpose(1, 2, 0))
    assert pixels.data.shape == (120, 210, 3)
    out = convert(folder, tmp_path / "out", verify=True)
    assert load(str(out))[0].config.image_size == (210, 120)


@pytest.mark.parametrize("token", ["image_token_id", "image_newline_id"])
def test_a_tokenizer_of_another_model_is_refused(hub, token):
    from dataclasses import replace

    model, processor = hub
    with pytest.raises(UsageError, match="tokenizer does not have"):
        fuyu.Processor(replace(model.config, **{token: 7}), processor.tokenizer)
