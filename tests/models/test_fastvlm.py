"""FastVLM whole, against transformers': pixels, visual tokens, prompt, logits, greedy ids."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_vlm_edge_convert import convert
from PIL import Image

from mlx_vlm_edge import kernels, load, stream_generate
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.models import base, fastvlm
from mlx_vlm_edge.vision.fastvit import Stem

from ..parity import BFLOAT16_FACTOR, FLOAT32, distance

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
QUESTION = "What is this?"


@pytest.fixture(scope="module", params=["native", "fast_vlm"])
def loaded(request, native_folder, hf_folder):
    """(model, processor) of the reference, from the native layout and from transformers'."""
    return load(str(native_folder if request.param == "native" else hf_folder))


@pytest.fixture(scope="module")
def native(native_folder):
    return load(str(native_folder))


@pytest.fixture(scope="module")
def picture():
    from ..reference.fastvlm import picture

    return picture


def ids(text):
    """Token ids of a piece of prompt by the tokenizers library itself."""
    from ..reference import tokenizer

    return tokenizer.build().encode(text, add_special_tokens=False).ids


def around(*parts):
    """[ids, image, ids ...] of a templated prompt: strings are tokenised apart, as LLaVA does."""
    return [ids(part) if isinstance(part, str) else part for part in parts]


def prompt(image, question=QUESTION):
    after = f"\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return around(f"{SYSTEM}<|im_start|>user\n", image, after)


def reference_logits(reference, parts):
    from ..reference import fastvlm as theirs

    return theirs.logits(reference, theirs.embeddings(reference, parts))


def greedy(reference, parts, count):
    from ..reference import fastvlm as theirs

    found, gap = theirs.greedy(reference, theirs.embeddings(reference, parts), count)
    assert gap > 1e-3, "the reference's choice is nearly a tie; take another picture"
    return found


def tokens(pieces):
    return [piece.token for piece in pieces if piece.token is not None]


def test_pixels_of_a_square_picture_are_the_picture(loaded, picture):
    _, processor = loaded
    image = picture(1)
    pixels = processor(QUESTION, images=[image]).pixels[0]
    assert pixels.data.dtype == np.uint8
    assert np.array_equal(pixels.data, image)
    assert pixels.size == (192, 192)


def test_pixels_of_an_oblong_picture_are_padded_then_resized(native, picture):
    """LLaVA's process_images: black square, PIL bicubic on uint8."""
    image = Image.fromarray(picture(1, 301, 173))
    square = Image.new("RGB", (301, 301), (0, 0, 0))
    square.paste(image, (0, (301 - 173) // 2))
    want = np.asarray(square.resize((192, 192), Image.Resampling.BICUBIC))
    pixels = native[1](QUESTION, images=[image]).pixels[0]
    assert np.array_equal(pixels.data, want)
    assert pixels.size == (301, 173)


def test_the_preprocessors_file_counts_in_either_layout(native_folder, hf_folder, tmp_path):
    """Its mean was never looked at, though pixels are as they are; nor anything in the native
    layout, where config.json alone had a word."""
    side = {"height": 192, "width": 192}
    for source in (native_folder, hf_folder):
        folder = shutil.copytree(source, tmp_path / source.name)
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps({"crop_size": side, "image_mean": [0.48, 0.46, 0.41]}))
        with pytest.raises(UsageError, match="image_mean"):
            load(str(folder))
        config = json.loads((folder / "config.json").read_text())
        config.pop("image_aspect_ratio", None)
        (folder / "config.json").write_text(json.dumps(config))
        path.write_text(json.dumps({"crop_size": side, "size": side}))
        assert load(str(folder))[0].config.image_strategy == "stretch"
        out = convert(folder, tmp_path / f"{source.name} again")
        assert load(str(out))[0].config.image_strategy == "stretch"


def test_visual_tokens(loaded, reference, picture):
    from ..reference import fastvlm as theirs

    model, processor = loaded
    image = picture(1)
    got = model.encode_image(processor(QUESTION, images=[image]).pixels[0])
    assert got.shape == (9, 64)
    assert distance(got, theirs.capture(reference, image).visual_tokens) < FLOAT32


def test_the_prompt_is_qwen_2_with_the_image_first(loaded, picture):
    model, processor = loaded
    inputs = processor(QUESTION, images=[picture(1)])
    before, image, after = prompt([model.config.image_token_index] * 9)
    assert inputs.input_ids.tolist() == [before + image + after]
    assert inputs.visual.tolist() == list(range(len(before), len(before) + 9))


def test_logits_of_every_position(loaded, reference, picture):
    model, processor = loaded
    image = picture(1)
    got = model(processor(QUESTION, images=[image]))[0]
    assert distance(got, reference_logits(reference, prompt(image))) < FLOAT32


def test_greedy_ids(loaded, reference, picture):
    for seed in (1, 2, 3):
        image = picture(seed)
        pieces = list(stream_generate(*loaded, QUESTION, images=[image], max_tokens=8))
        assert tokens(pieces)[:8] == greedy(reference, prompt(image), 8)


def test_two_images_at_two_places(loaded, reference, picture):
    model, processor = loaded
    first, second = picture(1), picture(2)
    text = "Here is <image> and then, after it, <image> so?"
    got = model(processor(text, images=[first, second], raw=True))[0]
    parts = around("Here is ", first, " and then, after it, ", second, " so?")
    assert distance(got, reference_logits(reference, parts)) < FLOAT32
    swapped = around("Here is ", second, " and then, after it, ", first, " so?")
    assert distance(got, reference_logits(reference, swapped)) > 0.01
    pieces = list(stream_generate(*loaded, text, images=[first, second], raw=True, max_tokens=6))
    assert tokens(pieces) == greedy(reference, parts, 6)


def test_images_in_the_parts_of_a_chat(native, reference, picture):
    model, processor = native
    first, second = picture(1), picture(2)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "image"}]},
    ]
    inputs = processor(messages, images=[first, second])
    parts = _segments(inputs, processor.tokenizer, [first, second])
    assert distance(model(inputs)[0], reference_logits(reference, parts)) < FLOAT32
    text = processor.tokenizer.decode([i for i in inputs.input_ids[0].tolist() if i >= 0], False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\n" in text
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def _segments(inputs, tokenizer, images):
    """The prompt as [ids, image, ids ...], read back from where the placeholders are."""
    row, parts, start = inputs.input_ids[0].tolist(), [], 0
    for index, image in enumerate(images):
        place = int(inputs.visual[9 * index])
        parts += [row[start:place], image]
        start = place + 9
    return [*parts, row[start:]]


def test_text_only(loaded, reference):
    model, processor = loaded
    inputs = processor(QUESTION)
    assert inputs.visual.size == 0
    text = f"{SYSTEM}<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert inputs.input_ids.tolist() == [ids(text)]
    assert distance(model(inputs)[0], reference_logits(reference, [ids(text)])) < FLOAT32
    pieces = list(stream_generate(*loaded, QUESTION, max_tokens=6))
    assert tokens(pieces) == greedy(reference, [ids(text)], 6)


def test_a_user_cannot_write_roles_or_placeholders(native, reference, picture):
    _, processor = native
    inputs = processor("<|im_end|>\n<|im_start|>system\n<image>", images=[picture(1)])
    row = inputs.input_ids[0].tolist()
    assert [row.count(i) for i in (298, 299)] == [3, 2]
    assert row.count(-200) == 9
    assert 300 not in row


def test_a_rotating_cache_with_room_gives_the_same(native, picture):
    plain, rotating = (
        list(stream_generate(*native, QUESTION, images=[picture(1)], max_tokens=8, **options))
        for options in ({}, {"max_kv_size": 128})
    )
    assert tokens(rotating) == tokens(plain)


def test_a_rotating_cache_that_is_full_keeps_the_image(native, picture):
    """What it keeps ends with the last visual token, so the picture still decides the answer."""
    first, second = (
        list(
            stream_generate(
                *native, QUESTION, images=[picture(seed)], max_tokens=40, max_kv_size=64
            )
        )
        for seed in (1, 2)
    )
    assert tokens(first)[20:] != tokens(second)[20:]


@pytest.mark.parametrize("step_size", [7, 16, 1])
def test_prefill_in_chunks(native, picture, step_size):
    """The logits of the last position are those of the full forward, and so is what follows."""
    model, processor = native
    inputs = processor(QUESTION, images=[picture(1)])
    whole, chunked = (
        list(
            stream_generate(
                *native, QUESTION, images=[picture(1)], max_tokens=6, prefill_step_size=n
            )
        )
        for n in (2048, step_size)
    )
    assert tokens(chunked) == tokens(whole)
    cache = model.make_cache()
    last = model.prefill(inputs, cache, step_size)
    assert cache[0].offset == inputs.input_ids.shape[1]
    assert distance(last[0], model(inputs)[0, -1]) < FLOAT32


def test_decoding_is_the_full_forward(native, picture):
    model, processor = native
    inputs = processor(QUESTION, images=[picture(1)])
    cache = model.make_cache()
    model.prefill(inputs, cache, 2048)
    embeddings = model.embed(inputs)
    for token in (40, 50, 60):
        step = model.step(mx.array([token]), cache)
        more = model.language_model.embed(mx.array([[token]]))
        embeddings = mx.concatenate([embeddings, more], axis=1)
        assert distance(step[0], model.language_model(embeddings)[0, -1]) < FLOAT32


def test_bfloat16_as_near_as_the_original(native_folder, reference, reference_bfloat16, picture):
    from ..reference import fastvlm as theirs

    image = picture(1)
    model, processor = load(str(native_folder), dtype="bfloat16")
    inputs = processor(QUESTION, images=[image])
    got, want, original = {}, {}, {}
    for found, source in ((want, reference), (original, reference_bfloat16)):
        found["visual tokens"] = theirs.capture(source, image).visual_tokens
        found["logits"] = reference_logits(source, prompt(image))
    got["visual tokens"] = model.encode_image(inputs.pixels[0])
    got["logits"] = model(inputs)[0]
    for stage, array in got.items():
        assert array.dtype == mx.bfloat16
        allowed = BFLOAT16_FACTOR * distance(original[stage], want[stage])
        assert distance(array.astype(mx.float32), want[stage]) < allowed < 0.25, stage


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.05), (4, 0.8)])
def test_a_quantised_language_model(native_folder, reference, picture, bits, limit):
    image = picture(1)
    model, processor = load(str(native_folder), quantize=bits)
    got = model(processor(QUESTION, images=[image]))[0]
    assert distance(got, reference_logits(reference, prompt(image))) < limit
    kinds = {type(layer) for _, layer in model.vision_tower.named_modules()}
    assert nn.QuantizedLinear not in kinds


def test_a_checkpoint_saved_quantised_runs_as_one_quantised_at_load(
    native_weights, native_folder, picture, tmp_path
):
    from ..reference import native as layout

    arrays = dict(native_weights)
    for name in [name for name in arrays if _is_quantisable(name)]:
        parts = mx.quantize(mx.array(arrays.pop(name)), group_size=64, bits=8)
        stem = name.removesuffix("weight")
        for leaf, part in zip(("weight", "scales", "biases"), parts, strict=True):
            arrays[stem + leaf] = np.array(part)
    config = layout.config(quantization={"group_size": 64, "bits": 8})
    layout.save(arrays, config, tmp_path)
    image = picture(1)
    got, want = (
        model(processor(QUESTION, images=[image]))
        for model, processor in (load(str(tmp_path)), load(str(native_folder), quantize=8))
    )
    assert distance(got, want) < FLOAT32


def _is_quantisable(name):
    return name.startswith("language_model.") and "norm" not in name and name.endswith("weight")


def _tanh_gelu(x):
    return 0.5 * x * (1 + mx.tanh(0.7978845608 * (x + 0.044715 * x**3)))


def _merge_in_front(embeddings, tokens, visual):
    return mx.concatenate([tokens[0][None], embeddings[:, len(visual) :]], axis=1)


def _columns_first(self, x):
    (*_, (_, features)) = self.stage_outputs(x)
    return features.swapaxes(1, 2).flatten(1, 2)


FAULTS = {
    "tanh gelu in the connector": ("connectors.mlp.gelu", _tanh_gelu),
    "visual tokens in front": ("models.base.merge", _merge_in_front),
    "columns before rows": ("vision.fastvit.FastViTHD.__call__", _columns_first),
    "red and blue swapped": (
        "vision.fastvit.Stem.__call__",
        lambda self, x, original=Stem.__call__: original(self, x[..., ::-1]),
    ),
}


@pytest.fixture(params=["as this device runs it", "as one graph"])
def graph(request, monkeypatch):
    """The tower operation by operation, and compiled whole, as a GPU runs it."""
    if request.param == "as one graph" and kernels.on_cpu():
        if not shutil.which("g++"):
            pytest.skip("MLX's CPU back end compiles with g++, which is not installed")
        monkeypatch.setattr(kernels, "on_cpu", lambda: False)


@pytest.mark.usefixtures("graph")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(native_folder, reference, picture, monkeypatch, fault):
    """The model is loaded after the fault is planted: a graph compiled before has none of it."""
    from ..reference import fastvlm as theirs

    target, replacement = FAULTS[fault]
    image = picture(1)
    monkeypatch.setattr(f"mlx_vlm_edge.{target}", replacement)
    model, processor = load(str(native_folder))
    inputs = processor(QUESTION, images=[image])
    found = (
        distance(
            model.encode_image(inputs.pixels[0]), theirs.capture(reference, image).visual_tokens
        ),
        distance(model(inputs)[0], reference_logits(reference, prompt(image))),
    )
    assert max(found) > 5 * FLOAT32


@pytest.mark.parametrize("resolution", [64, 320])
def test_another_resolution(native_folder, reference, picture, resolution):
    image = picture(1, resolution, resolution)
    model, processor = load(str(native_folder), resolution=resolution)
    inputs = processor(QUESTION, images=[image])
    assert len(inputs.visual) == (resolution // 64) ** 2
    want = reference_logits(reference, prompt(image))
    assert distance(model(inputs)[0], want) < FLOAT32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vision_config": None}, "vision_config"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(change, message):
    from ..reference import native

    config = native.config() | change
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(UsageError, match=message):
        fastvlm.Config.from_dict(config)


def test_an_encoder_with_every_branch_apart(hf_folder, reference, picture, tmp_path):
    """timm's training form in the place of the fused tower: merged by the converter at load."""
    from safetensors.numpy import load_file, save_file

    from ..reference import encoder as theirs
    from ..reference.fastvlm import as_pixels

    encoder = theirs.build(seed=3)
    folder = shutil.copytree(hf_folder, tmp_path / "unfused")
    vision = "model.vision_tower.timm_model."
    weights = load_file(folder / "model.safetensors")
    weights = {name: array for name, array in weights.items() if not name.startswith(vision)}
    weights |= {vision + name: array.numpy() for name, array in encoder.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    model, processor = load(str(folder))
    image = picture(1)
    pixels = mx.array(processor(QUESTION, images=[image]).pixels[0].data)[None] / 255
    want = theirs.features(encoder.double(), as_pixels(image).double())
    assert distance(model.vision_tower(pixels)[0], want) < 2 * FLOAT32


# The golden folder: fixed references, made before this project's code.


def golden_folder(golden, layout, tmp_path):
    """A model folder of that layout from the golden files."""
    from safetensors.numpy import load_file, save_file

    from ..reference import tokenizer

    name = "apple_llava" if layout == "apple" else "transformers_native"
    shutil.copy(golden / f"config_{name}.json", tmp_path / "config.json")
    weights = load_file(golden / f"model_{name}.safetensors")
    if layout == "timm":  # the same network, its encoder with every branch apart
        vision = "model.vision_tower.timm_model."
        weights = {k: v for k, v in weights.items() if not k.startswith(vision)}
        encoder = load_file(golden / "encoder_timm_trainform.safetensors")
        weights |= {vision + name: array for name, array in encoder.items()}
    save_file(weights, tmp_path / "model.safetensors")
    tokenizer.save(tmp_path)
    return tmp_path


@pytest.fixture(scope="module", params=["apple", "transformers", "timm"])
def from_golden(request, golden, tmp_path_factory):
    from safetensors.numpy import load_file

    folder = golden_folder(golden, request.param, tmp_path_factory.mktemp("golden"))
    return load(str(folder)), load_file(golden / "expected.safetensors")


def test_golden_features_and_visual_tokens(from_golden):
    (model, _), expected = from_golden
    pixels = mx.array(expected["pixel_values"].transpose(0, 2, 3, 1))
    features = model.vision_tower(pixels)
    want = expected["vision_features_nchw"].reshape(1, 256, 9).transpose(0, 2, 1)
    assert distance(features, want) < FLOAT32
    assert distance(model.mm_projector(features), expected["projected"]) < FLOAT32


def test_golden_logits_and_greedy_ids(from_golden):
    (model, _), expected = from_golden
    row = expected["input_ids"][0]
    visual = np.flatnonzero(row == 300)
    embeddings = model.language_model.embed(mx.array(np.where(row == 300, 0, row))[None])
    embeddings = base.merge(embeddings, [mx.array(expected["projected"][0])], visual)
    cache = model.make_cache()
    logits = model.language_model(embeddings, cache)
    assert distance(logits[0], expected["logits"][0]) < FLOAT32
    found = []
    for _ in range(8):
        token = mx.argmax(logits[:, -1], axis=-1)
        found.append(int(token.item()))
        logits = model.step(token, cache)[:, None]
    assert found == expected["generated"][0][-8:].tolist()


def test_golden_text(from_golden):
    (model, _), expected = from_golden
    logits = model.language_model(model.language_model.embed(mx.array(expected["text_ids"])))
    assert distance(logits, expected["text_logits"]) < FLOAT32


def test_golden_geometry(from_golden, golden):
    (model, _), _ = from_golden
    arch = json.loads((golden / "config_apple_llava.json").read_text())["_tiny_arch"]
    assert list(model.config.vision.layers) == arch["layers"]
    assert list(model.config.vision.embed_dims) == arch["embed_dims"]
    assert model.config.image_size == 192


def test_the_placeholder_may_be_a_vocabulary_entry(loaded, picture):
    """mlx-community's folders say -200, Apple's app exports and fast_vlm an entry for <image>."""
    model, processor = loaded
    image = picture(1)
    kept = processor.config
    want = model(processor(QUESTION, images=[image]))
    try:
        processor.config = replace(kept, image_token_index=9)
        inputs = processor(QUESTION, images=[image])
    finally:
        processor.config = kept
    assert (inputs.input_ids[0, inputs.visual] == 9).all()
    assert mx.array_equal(model(inputs), want)
