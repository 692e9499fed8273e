"""LLaVA-1.5 whole, against transformers' parts: layouts, pixels, prompt, logits, greedy ids."""

import copy
import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_vlm_edge_convert import convert
from mlx_vlm_edge_convert.pipeline import native_config
from PIL import Image
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from mlx_vlm_edge import kernels, load, stream_generate
from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.connectors import mlp
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.kernels import quantized
from mlx_vlm_edge.models import llava
from mlx_vlm_edge.picture.image import Pixels
from mlx_vlm_edge.text.tokenizer import Tokenizer
from mlx_vlm_edge.vision import vit
from mlx_vlm_edge.vision.pixels import CLIP_MEAN

from ..parity import FLOAT32, clip_pixels, distance
from ..reference import llava as theirs

QUANTISED = nn.QuantizedLinear | quantized.Linear  # by device
LAYOUTS = (
    "original", "hub", "transformers 5", "transformers 5.5", "transformers 5.6", "towerless",
)  # fmt: skip
QUESTION = "What is in the image?"


@pytest.fixture(scope="module")
def reference():
    return theirs.build()


@pytest.fixture(scope="module")
def towers(reference, tmp_path_factory):
    """A folder that the config of the towerless layout can name."""
    return theirs.save_tower(reference, tmp_path_factory.mktemp("clip-vit-tiny"))


@pytest.fixture(scope="module")
def folders(reference, towers, tmp_path_factory):
    root = tmp_path_factory.mktemp("llava")
    changes = {"towerless": {"mm_vision_tower": str(towers)}}
    return {
        layout: theirs.save(reference, layout, root / layout, **changes.get(layout, {}))
        for layout in LAYOUTS
    }


@pytest.fixture(scope="module")
def loaded(folders):
    return {layout: load(str(folder)) for layout, folder in folders.items()}


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request, loaded):
    return loaded[request.param]


def picture(seed=1, width=90, height=70):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def parameters(model):
    return dict(tree_flatten(model.parameters()))


def test_every_layout_gives_the_same_parameters(loaded):
    want = parameters(loaded["hub"][0])
    for model, _ in loaded.values():
        got = parameters(model)
        assert got.keys() == want.keys()
        assert all(mx.array_equal(got[name], want[name]) for name in want)


def test_what_the_installed_transformers_saves_is_read(reference, folders, loaded, tmp_path):
    folder = shutil.copytree(folders["hub"], tmp_path / "saved")
    (folder / "model.safetensors").unlink()
    copy.deepcopy(reference.model).float().save_pretrained(folder)
    got, want = parameters(load(str(folder))[0]), parameters(loaded["hub"][0])
    assert got.keys() == want.keys()
    assert all(mx.array_equal(got[name], want[name]) for name in want)


def test_a_quantised_tower_is_run_in_full_precision(folders, tmp_path):
    """As early uploads have it: every linear layer with scales, the tower's too."""
    folder = convert(folders["hub"], tmp_path / "native")
    arrays = dict(mx.load(str(folder / "model.safetensors")))
    plain, packed = dict(arrays), dict(arrays)
    for name in [n for n in arrays if n.endswith("_proj.weight") or n.endswith(".fc1.weight")]:
        stem = name.removesuffix("weight")
        parts = mx.quantize(arrays[name], group_size=32, bits=4)
        packed |= dict(zip((name, f"{stem}scales", f"{stem}biases"), parts, strict=True))
        plain[name] = mx.dequantize(*parts, group_size=32, bits=4)
    config = json.loads((folder / "config.json").read_text())
    mx.save_safetensors(str(folder / "model.safetensors"), plain)
    want, processor = load(str(folder))
    config["quantization"] = {"group_size": 32, "bits": 8}  # the shapes say 4
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), packed)
    got, _ = load(str(folder))
    pixels = processor(QUESTION, images=[picture()]).pixels[0]
    assert mx.array_equal(got.encode_image(pixels), want.encode_image(pixels))
    assert isinstance(got.language_model.model.layers[0].mlp.down_proj, QUANTISED)
    out = convert(folder, tmp_path / "again", bits=8, group_size=32)
    again, _ = load(str(out))
    assert mx.array_equal(again.encode_image(pixels), want.encode_image(pixels))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vision_feature_layer": [-2, -5]}, "one layer"),
        ({"vision_feature_layer": True}, "one layer"),
        ({"bos_token_id": "1"}, "bos_token_id"),
        ({"image_token_index": float("nan")}, "image_token_index"),
        ({"text_config": [1]}, "config.json"),
        ({"vision_config": 3}, "config.json"),
        ({"image_aspect_ratio": ["pad"]}, "image_aspect_ratio"),
        ({"vision_feature_select_strategy": ["full"]}, "config.json"),
        ({"eos_token_id": [[2]]}, "eos_token_ids"),
    ],
)
def test_values_that_cannot_be_are_one_line(changes, says, reference, folders, tmp_path):
    folder = shutil.copytree(folders["hub"], tmp_path / "changed")
    (folder / "config.json").write_text(json.dumps(theirs.config("hub", **changes)))
    with pytest.raises(UsageError, match=says) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


def test_null_and_a_list_of_one_are_what_they_mean(folders, loaded, tmp_path):
    folder = shutil.copytree(folders["hub"], tmp_path / "changed")
    changes = {"bos_token_id": None, "vision_feature_layer": [-2]}
    (folder / "config.json").write_text(json.dumps(theirs.config("hub", **changes)))
    model, _ = load(str(folder))
    assert model.config.bos_token_id == loaded["hub"][0].config.bos_token_id == 1
    assert model.config.vision == loaded["hub"][0].config.vision


@pytest.mark.parametrize(
    "name", ["language_model.model.norm.weight", "vision_tower.vision_model.pre_layrnorm.bias"]
)
def test_whole_numbers_are_no_weights(name, folders, tmp_path):
    folder = shutil.copytree(folders["hub"], tmp_path / "changed")
    arrays = dict(mx.load(str(folder / "model.safetensors")))
    arrays[name] = arrays[name].astype(mx.int32)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    with pytest.raises(UsageError, match=f"{name} holds int32"):
        load(str(folder))


def test_a_norm_that_is_not_finite_is_told_at_load(folders, tmp_path):
    folder = shutil.copytree(folders["hub"], tmp_path / "changed")
    arrays = dict(mx.load(str(folder / "model.safetensors")))
    arrays["language_model.model.norm.weight"][3] = float("nan")
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    with pytest.raises(UsageError, match=r"norm\.weight has values that are not finite"):
        load(str(folder))


def test_every_stage_is_transformers(pair, reference):
    model, processor = pair
    inputs = processor(QUESTION, images=[picture()])
    pixels = np.array(clip_pixels(inputs.pixels[0].data[None]))[0]
    features = model.vision_tower(mx.array(pixels)[None])[:, 1:]
    assert distance(features, reference.features(pixels)) < FLOAT32
    tokens = reference.tokens(pixels)
    assert distance(model.encode_image(inputs.pixels[0]), tokens[0]) < FLOAT32
    ids = inputs.input_ids[0].tolist()
    want = reference.logits(ids, inputs.visual, tokens)
    assert distance(model(inputs)[0], want) < FLOAT32
    processor.eos_ids = frozenset()
    got = [
        piece.token
        for piece in stream_generate(model, processor, QUESTION, [picture()], max_tokens=8)
    ]
    assert got[:8] == reference.greedy(ids, inputs.visual, tokens, 8)


def test_two_images_and_none(loaded, reference):
    model, processor = loaded["original"]
    inputs = processor("Compare.", images=[picture(1), picture(2, 60, 90)])
    tokens = [reference.tokens(np.array(clip_pixels(p.data[None]))[0]) for p in inputs.pixels]
    import torch

    want = reference.logits(inputs.input_ids[0].tolist(), inputs.visual, torch.cat(tokens))
    assert distance(model(inputs)[0], want) < FLOAT32
    alone = processor("Hello there.")
    want = reference.logits(alone.input_ids[0].tolist(), [], None)
    assert distance(model(alone)[0], want) < FLOAT32


@pytest.mark.parametrize(
    "fault", ["the last layer", "tokens shifted", "tower's GELU", "connector's GELU", "BGR"]
)
def test_a_fault_is_caught(folders, reference, monkeypatch, fault):
    """The last layer for the one before is what transformers 5's doubled hidden states come to."""
    if fault == "tower's GELU":
        monkeypatch.setitem(vit.ACTIVATIONS, "quick_gelu", kernels.gelu)
    if fault == "connector's GELU":
        monkeypatch.setattr(mlp, "gelu", kernels.quick_gelu)
    if fault == "the last layer":
        real = llava.ViTConfig.from_dict
        monkeypatch.setattr(llava.ViTConfig, "from_dict", lambda config, layer: real(config, -1))
    if fault == "tokens shifted":
        run = vit.ViT.__call__
        monkeypatch.setattr(vit.ViT, "__call__", lambda self, x: mx.roll(run(self, x), 1, axis=1))
    model, processor = load(str(folders["hub"]))
    pixels = processor(QUESTION, images=[picture()]).pixels[0]
    want = reference.tokens(np.array(clip_pixels(pixels.data[None]))[0])[0]
    if fault == "BGR":
        pixels = Pixels(np.ascontiguousarray(pixels.data[..., ::-1]), pixels.size)
    assert distance(model.encode_image(pixels), want) > 5 * FLOAT32


# Preprocessing and prompt.


def test_the_original_pads_with_the_mean_colour_and_the_hub_crops(loaded):
    image = Image.new("RGB", (112, 56), (10, 200, 30))
    padded = loaded["original"][1].preprocess(image).data
    assert padded.shape == (56, 56, 3)
    assert padded[0, 0].tolist() == [122, 116, 104]
    assert padded[28, 28].tolist() == [10, 200, 30]
    cropped = loaded["hub"][1].preprocess(image).data
    assert (cropped == [10, 200, 30]).all()


def test_pixels_are_clips_image_processors(loaded):
    import torch
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    sizes = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    processor = CLIPImageProcessorPil(**sizes)
    for size in ((90, 70), (56, 56), (31, 200)):
        image = picture(3, *size)
        got = np.array(clip_pixels(loaded["hub"][1].preprocess(image).data[None]))[0]
        want = processor(image, return_tensors="pt")["pixel_values"][0]
        assert np.abs(got - torch.as_tensor(want).permute(1, 2, 0).numpy()).max() < 1e-5


def test_the_strategy_can_be_chosen_and_the_resolution_not(folders):
    _, processor = load(str(folders["hub"]), image_strategy="pad")
    assert processor.preprocess(Image.new("RGB", (112, 56))).data[0, 0].tolist() == [122, 116, 104]
    with pytest.raises(UsageError, match="56 only"):
        load(str(folders["hub"]), resolution=112)
    with pytest.raises(UsageError, match="anyres"):
        load(str(folders["hub"]), image_strategy="anyres")


def test_the_prompt_is_v1(loaded):
    processor = loaded["original"][1]
    image, first, second = {"type": "image"}, "What is it?", "And this?"
    content = [image, {"type": "text", "text": first}]
    text = processor.render(
        [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
            {"role": "user", "content": [{"type": "text", "text": second}]},
        ]
    )
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: <image>\n"
        "What is it? ASSISTANT: A cat.</s>USER: And this? ASSISTANT:"
    )


def test_a_system_message_takes_the_place_of_the_usual_one(loaded):
    processor = loaded["original"][1]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ids = processor(messages).input_ids[0].tolist()
    assert processor.tokenizer.decode(ids) == "Be brief. USER: Hi ASSISTANT:"
    with pytest.raises(UsageError, match="must be the first"):
        processor([messages[1], messages[0], messages[1]])


def test_ids_are_tokenised_around_the_image(loaded):
    """BOS once; after the image the word mark that SentencePiece puts before every text, then the
    line break (29871, 13 in LLaMA's vocabulary); </s> in a raw text is the token."""
    processor = loaded["original"][1]
    token, encode = processor.tokenizer.token_id, processor.tokenizer.encode
    inputs = processor("USER: <image>\nHi ASSISTANT:</s>", images=[picture()], raw=True)
    ids = inputs.input_ids[0].tolist()
    assert ids.count(1) == 1
    assert ids[0] == 1
    after = inputs.visual[-1] + 1
    assert ids[after : after + 2] == [token("▁"), token("<0x0A>")]
    assert ids[-1] == 2
    joined = encode("USER: \nHi ASSISTANT:")
    assert [1, *joined] != [i for i in ids if i != -200][:-1]
    doubled = processor("<s>USER: <image>\nHi", images=[picture()], raw=True).input_ids[0]
    assert doubled.tolist().count(1) == 1


def test_a_users_end_token_is_only_text(loaded):
    processor = loaded["original"][1]
    assert 2 not in processor("a</s>b").input_ids[0]
    assert 2 in processor("a</s>b", raw=True).input_ids[0]


LLAMA_3 = (
    "{% for message in messages %}{{'<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'}}{% for c in message['content'] | selectattr('type', 'equalto', "
    "'image') %}{{ '<image>\n' }}{% endfor %}{% for c in message['content'] | selectattr('type', "
    "'equalto', 'text') %}{{ c['text'] }}{% endfor %}{{ '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def test_another_language_model_speaks_its_own_words(loaded):
    """xtuner's llava-llama-3-8b: case 08 of the replayed reports. It got Vicuna's prompt and id 1,
    a letter there, for BOS."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend.add_special_tokens(words)
    named = {"bos_token": words[0], "eos_token": words[3], "chat_template": LLAMA_3}
    tokenizer, known = Tokenizer(backend, named), loaded["hub"][1].config
    processor = llava.Processor(known, tokenizer)
    processor.check_tokens()
    got = processor("<|eot_id|>?", images=[picture()])
    count = processor.visual_tokens(got.pixels[0])
    before = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    after = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    encoded = [tokenizer.encode(text, special=True) for text in (before, after)]
    asked = tokenizer.encode("\n<|eot_id|>?")
    places = [known.image_token_index] * count
    assert got.input_ids[0].tolist() == [*encoded[0], *places, *asked, *encoded[1]]
    assert processor.eos_ids >= {tokenizer.token_id("<|eot_id|>")}
    vicuna = Tokenizer(backend, {**named, "chat_template": "{{ 'USER: <image> x ASSISTANT:' }}"})
    with pytest.raises(UsageError, match="no </s>"):
        llava.Processor(known, vicuna).check_tokens()


def test_ids_of_a_chat_may_stand_in_the_text_config():
    ids = {"bos_token_id": 256, "eos_token_id": [257, 260]}
    config = theirs.config("hub")
    for key in ids:
        config.pop(key, None)
    config["text_config"] = {**config["text_config"], **ids}
    read = llava.Config.from_dict({**config, "bos_token_id": None})
    assert read.bos_token_id == 256
    assert {*read.eos_token_ids} == {257, 260}


def test_connector_time_is_a_stage_of_its_own(loaded):
    model, processor = loaded["original"]
    last = list(stream_generate(model, processor, "Hi", [picture()], max_tokens=2, verbose=True))
    assert {"vision", "connector", "prefill"} <= last[-1].stages.keys()


# Layouts, towers, configs.


def test_without_its_tower_and_the_tower_not_here_it_says_how_to_get_it(
    folders, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder = shutil.copytree(folders["towerless"], tmp_path / "copy")
    name = "openai/clip-vit-large-patch14-336"
    config = theirs.config("towerless", mm_vision_tower=name)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=f"models pull {name}"):
        load(str(folder))
    config["mm_vision_tower"] = "~nouser/x"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="~nouser/x"):
        load(str(folder))
    config.pop("mm_vision_tower")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="names none"):
        load(str(folder))


def test_a_tower_in_the_hub_cache_is_found(folders, reference, loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    home = tmp_path / "hub" / "models--openai--clip-vit-large-patch14-336"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    theirs.save_tower(reference, home / "snapshots" / "abc")
    folder = shutil.copytree(folders["towerless"], tmp_path / "copy")
    config = theirs.config("towerless", mm_vision_tower="openai/clip-vit-large-patch14-336")
    (folder / "config.json").write_text(json.dumps(config))
    got, want = (parameters(m) for m in (load(str(folder))[0], loaded["hub"][0]))
    assert all(mx.array_equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("original", {"mm_projector_type": "linear"}, "'linear'"),
        ("original", {"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ("original", {"mm_use_im_patch_token": True}, "mm_use_im_patch_token"),
        ("original", {"image_aspect_ratio": "anyres"}, "'anyres'"),
        ("original", {"mm_patch_merge_type": "spatial_unpad"}, "'spatial_unpad'"),
        ("original", {"mm_vision_select_feature": "mean"}, "'mean'"),
        ("original", {"mm_vision_select_layer": -9}, "-9"),
        ("original", {"vision_config": {"hidden_size": 32}}, "weights have 128"),
        ("hub", {"projector_hidden_act": "relu"}, "'relu'"),
        ("hub", {"vision_feature_select_strategy": "mean"}, "'mean'"),
        ("hub", {"text_config": {**theirs.TEXT, "model_type": "mistral"}}, "'mistral'"),
        ("hub", {"text_config": {**theirs.TEXT, "hidden_size": 64}}, "by its config"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(folders, tmp_path, layout, change, message):
    folder = shutil.copytree(folders[layout], tmp_path / "copy")
    (folder / "config.json").write_text(json.dumps(theirs.config(layout, **change)))
    with pytest.raises(UsageError, match=message):
        load(str(folder))


@pytest.mark.parametrize("strategy", ["full", "default"])
def test_siglip_in_clips_place(strategy, tmp_path):
    """In the native layout it loaded and could answer no picture, in transformers' it did not."""
    reference = theirs.build(theirs.SIGLIP, strategy)
    said = {"vision_config": theirs.SIGLIP, "vision_feature_select_strategy": strategy}
    folder = theirs.save(reference, "hub", tmp_path / "hub", **said)
    side, half = {"height": 58, "width": 58}, [0.5] * 3
    pixels = {"do_center_crop": False, "size": side, "image_mean": half, "image_std": half}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    native = convert(folder, tmp_path / "native", verify=True)
    for loaded_from in (folder, native):
        model, processor = load(str(loaded_from))
        inputs = processor(QUESTION, images=[picture()])
        assert len(inputs.visual) == 16 - (strategy == "default")
        shown = inputs.pixels[0].data
        assert np.array_equal(
            shown, np.asarray(picture().resize((58, 58), Image.Resampling.BICUBIC))
        )
        tokens = reference.tokens(shown / 127.5 - 1)
        assert distance(model.encode_image(inputs.pixels[0]), tokens[0]) < FLOAT32
        want = reference.logits(inputs.input_ids[0].tolist(), inputs.visual, tokens)
        assert distance(model(inputs)[0], want) < FLOAT32
    processor = load(str(native), image_strategy="pad")[1]
    assert processor.preprocess(Image.new("RGB", (112, 56))).data[0, 0].tolist() == [127] * 3
    told = json.loads((native / "processor_config.json").read_text())
    assert told["num_additional_image_tokens"] == 0
    with pytest.raises(UsageError, match="visionzip"):
        load(str(native), visual_tokens=4, token_method="visionzip")[1](QUESTION, [picture()])


def test_a_tower_of_a_kind_that_nothing_tells_is_refused(tmp_path):
    folder = theirs.save(theirs.build(theirs.SIGLIP, "full"), "original", tmp_path / "original")
    with pytest.raises(UsageError, match="no class token"):
        load(str(folder))


def test_an_image_processor_that_is_not_clips_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["hub"], tmp_path / "copy")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(UsageError, match="image_mean"):
        load(str(folder))
    path.write_text(json.dumps({"do_pad": True, "image_mean": list(CLIP_MEAN)}))
    assert load(str(folder))[0].config.image_strategy == "pad"
    native = convert(folder, tmp_path / "native")
    assert load(str(native))[0].config.image_strategy == "pad"
    (native / "preprocessor_config.json").write_text(json.dumps({"resample": 2}))
    with pytest.raises(UsageError, match="resample 2"):
        load(str(native))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_convert_writes_the_native_layout(folders, loaded, tmp_path, layout):
    out = convert(folders[layout], tmp_path / "out", verify=True)
    arrays = mx.load(str(out / "model.safetensors"))
    assert llava.is_native(arrays)
    assert {name.partition(".")[0] for name in arrays} == {
        "vision_tower",
        "multi_modal_projector",
        "language_model",
    }
    assert "vision_tower.vision_model.post_layernorm.weight" in arrays  # mlx-vlm asks for it
    model, processor = load(str(out))
    got, want = parameters(model), parameters(loaded[layout][0])
    assert got.keys() == want.keys()
    assert all(mx.array_equal(got[name], want[name]) for name in want)
    assert processor.config.image_strategy == loaded[layout][1].config.image_strategy
    assert json.loads((out / "preprocessor_config.json").read_text())["image_mean"][0] == 0.48145466


def test_convert_quantises_the_language_model(folders, tmp_path):
    out = convert(folders["hub"], tmp_path / "out", bits=8, group_size=64, verify=True)
    block = json.loads((out / "config.json").read_text())["quantization"]
    assert block["multi_modal_projector.linear_1"] is False
    model, _ = load(str(out))
    assert isinstance(model.language_model.lm_head, QUANTISED)
    assert "scales" not in model.mm_projector.layers[0]
    again = convert(out, tmp_path / "again", dtype="bfloat16")
    assert load(str(again))[0].language_model.lm_head.bits == 8


def test_a_quantised_connector_is_read(folders, tmp_path):
    """mlx-community's first conversions quantised it as well."""
    out = convert(folders["hub"], tmp_path / "out", bits=4)
    path = out / "model.safetensors"
    arrays = mx.load(str(path))
    for number in (1, 2):
        name = f"multi_modal_projector.linear_{number}."
        parts = mx.quantize(arrays[f"{name}weight"], group_size=64, bits=4)
        leaves = ("weight", "scales", "biases")
        arrays |= {name + leaf: part for leaf, part in zip(leaves, parts, strict=True)}
    mx.save_safetensors(str(path), arrays)
    config = json.loads((out / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config[key] = {"group_size": 64, "bits": 4}
    (out / "config.json").write_text(json.dumps(config))
    model, processor = load(str(out))
    assert isinstance(model.mm_projector.layers[2], QUANTISED)
    assert model(processor("Hi", images=[picture()])).shape[-1] == theirs.VOCAB


# ShareGPT4V: LLaVA-1.5's architecture with a CLIP tower of its own.


@pytest.mark.parametrize("size", ["7B", "13B"])
def test_sharegpt4vs_own_config_is_the_shipped_one(size):
    tower = f"Lin-Chen/ShareGPT4V-{size}_Pretrained_vit-large336-l12"
    shipped = configs.read(f"sharegpt4v-{size.lower()}")
    flat = {
        **shipped["text_config"],
        **{key: value for key, value in theirs.ORIGINAL.items() if key.startswith("mm_use")},
        "model_type": "share4v",
        "architectures": ["Share4VLlamaForCausalLM"],
        "image_aspect_ratio": "pad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": tower,
    }
    assert llava.Config.from_dict(native_config(flat)) == llava.Config.from_dict(shipped)


def test_an_embedded_tower_goes_before_the_one_that_the_config_names(folders, loaded, tmp_path):
    """ShareGPT4V's is trained along: OpenAI's in its place would be another model."""
    folder = shutil.copytree(folders["original"], tmp_path / "copy")
    name = "Lin-Chen/ShareGPT4V-7B_Pretrained_vit-large336-l12"  # not on this machine
    config = theirs.config("original", model_type="share4v", mm_vision_tower=name)
    (folder / "config.json").write_text(json.dumps(config))
    got, want = parameters(load(str(folder))[0]), parameters(loaded["original"][0])
    assert all(mx.array_equal(got[key], want[key]) for key in want)


def test_sharegpt4v_without_its_tower_names_its_own(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder = shutil.copytree(folders["towerless"], tmp_path / "copy")
    name = "Lin-Chen/ShareGPT4V-7B_Pretrained_vit-large336-l12"
    config = theirs.config("towerless", model_type="share4v", mm_vision_tower=name)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=f"models pull {name}"):
        load(str(folder))
