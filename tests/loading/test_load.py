"""Loading: strict about every weight, one clear line for everything that is wrong, no network."""

import json
import shutil
import socket
from typing import get_type_hints

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_vlm_edge import load
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.kernels import on_cpu
from mlx_vlm_edge.loading import load as loading
from mlx_vlm_edge.models import build as building
from mlx_vlm_edge.text.tokenizer import Tokenizer

from ..memory import Peak
from ..parity import FLOAT32, distance

QKV = "language_model.model.layers.1.self_attn.q_proj.bias"


@pytest.fixture
def save(native_weights, tmp_path):
    """Write the native folder with changed weights or config; returns its path."""
    from ..reference import native

    def write(weights=None, folder="model", **config):
        config = {key: value for key, value in native.config(**config).items() if value is not None}
        changed = native_weights if weights is None else weights
        return native.save(changed, config, tmp_path / folder)

    return write


@pytest.fixture
def copy(native_folder, tmp_path):
    return shutil.copytree(native_folder, tmp_path / "copy")


def refused(folder, *words, **options):
    with pytest.raises(UsageError) as raised:
        load(str(folder), **options)
    line = str(raised.value)
    assert "\n" not in line
    for word in words:
        assert str(word) in line, line


def parameters(model):
    return dict(tree_flatten(model.parameters()))


def same_model(got, want):
    got, want = parameters(got), parameters(want)
    assert got.keys() == want.keys()
    assert all(distance(got[name], want[name]) < FLOAT32 for name in want)


def test_every_layout_gives_the_same_parameters(native_folder, hf_folder):
    same_model(load(str(hf_folder))[0], load(str(native_folder))[0])


def test_shards(native_weights, native_folder, save):
    from safetensors.numpy import save_file

    folder = save()
    (folder / "model.safetensors").unlink()
    names, total = sorted(native_weights), 3
    weight_map = {}
    for index in range(total):
        shard = f"model-{index + 1:05}-of-{total:05}.safetensors"
        part = {name: native_weights[name] for name in names[index::total]}
        save_file(part, str(folder / shard))
        weight_map |= dict.fromkeys(part, shard)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    same_model(load(str(folder))[0], load(str(native_folder))[0])
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, folder, "model-00002-of-00003.safetensors")


def test_a_path_and_a_string_are_the_same(native_folder):
    same_model(load(native_folder)[0], load(str(native_folder))[0])


def test_on_the_cpu_everything_is_float32(save, native_weights):
    if mx.default_device() != mx.Device(mx.DeviceType.cpu):
        pytest.skip("this is about the CPU back end")
    folder = save({name: array.astype(np.float16) for name, array in native_weights.items()})
    assert {p.dtype for p in parameters(load(str(folder))[0]).values()} == {mx.float32}


@pytest.mark.parametrize(
    ("own", "asked", "text", "vision"),
    [
        ("bfloat16", None, "bfloat16", "bfloat16"),
        ("float32", None, "float32", "float32"),
        ("float16", None, "float16", "float32"),  # FastViTHD is reported to overflow float16
        ("bfloat16", "float16", "float16", "float16"),
        ("float16", "float32", "float32", "float32"),
    ],
)
def test_on_a_gpu_weights_stay_what_they_are_but_no_tower_is_float16(
    native_folder, monkeypatch, own, asked, text, vision
):
    model, _ = load(str(native_folder))
    model.language_model.set_dtype(getattr(mx, own))
    monkeypatch.setattr(building, "on_cpu", lambda: False)
    building.cast(model, asked)
    for name, part in (
        ("language_model", text),
        ("vision_tower", vision),
        ("mm_projector", vision),
    ):
        assert {p.dtype for p in parameters(model[name]).values()} == {getattr(mx, part)}, name


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_dtype(native_folder, name):
    model, _ = load(str(native_folder), dtype=name)
    assert {p.dtype for p in parameters(model).values()} == {getattr(mx, name)}


def test_the_head_is_tied_when_it_is_not_there(save, native_weights):
    weights = {k: v for k, v in native_weights.items() if "lm_head" not in k}
    model, _ = load(str(save(weights, tied=True)))
    assert "lm_head" not in model.language_model


def test_the_head_is_used_when_it_is_there_whatever_the_config_says(save, native_folder):
    """FastVLM-0.5B says tied and stores a head; peers got the 7B wrong here."""
    same_model(load(str(save(tied=True)))[0], load(str(native_folder))[0])


def test_a_missing_head_is_refused_when_the_config_says_untied(save, native_weights):
    weights = {k: v for k, v in native_weights.items() if "lm_head" not in k}
    refused(save(weights, tied=False), "lm_head")


def test_the_unused_clip_head_is_not_needed(save, native_weights, native_folder):
    weights = {k: v for k, v in native_weights.items() if "head.proj" not in k}
    same_model(load(str(save(weights)))[0], load(str(native_folder))[0])


def test_a_missing_weight(save, native_weights):
    weights = {k: v for k, v in native_weights.items() if k != QKV}
    refused(save(weights), "layers.1.self_attn.q_proj.bias", "lacks")


def test_an_extra_weight(save, native_weights):
    extra = {"language_model.model.layers.7.mlp.up_proj.weight": np.ones((2, 2), np.float32)}
    refused(save(native_weights | extra), "layers.7.mlp.up_proj.weight", "no model part")


def test_a_misshapen_weight(save, native_weights):
    refused(save(native_weights | {QKV: np.ones(7, np.float32)}), "q_proj.bias", "(7,)", "(64,)")


def test_an_unknown_model_type(save):
    refused(save(model_type="bert"), "'bert'", "fast_vlm")


def test_a_folder_without_a_config(copy):
    (copy / "config.json").unlink()
    refused(copy, copy, "config.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"'])
def test_a_damaged_config(copy, text):
    (copy / "config.json").write_text(text)
    refused(copy, "config.json")


def test_a_folder_without_weights(copy):
    (copy / "model.safetensors").unlink()
    refused(copy, copy)


def test_an_empty_folder(tmp_path):
    refused(tmp_path, tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 500, 0.5, -1])
def test_truncated_safetensors(copy, kept):
    path = copy / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    refused(copy, "model.safetensors")


def test_a_damaged_header(copy):
    path = copy / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"x" * 32
    path.write_bytes(data)
    refused(copy, "model.safetensors", "header")


def test_a_folder_without_a_tokenizer(copy):
    (copy / "tokenizer.json").unlink()
    refused(copy, copy, "tokenizer.json")


def test_a_damaged_tokenizer(copy):
    (copy / "tokenizer.json").write_text("{}")
    refused(copy, "tokenizer.json")


def test_quantised_weights_without_a_quantization_block(save, native_weights):
    weights = dict(native_weights)
    name = "language_model.lm_head."
    parts = mx.quantize(mx.array(weights.pop(f"{name}weight")), group_size=64, bits=8)
    for leaf, part in zip(("weight", "scales", "biases"), parts, strict=True):
        weights[name + leaf] = np.array(part)
    refused(save(weights), "quantization")


def test_the_app_export_has_no_vision_weights(save, native_weights):
    """Apple's app export: language model and connector only, the tower is a Core ML package."""
    weights = {}
    for name, array in native_weights.items():
        if name.startswith("vision_tower."):
            continue
        weights[name.replace("mm_projector.0.", "multi_modal_projector.linear_0.").replace(
            "mm_projector.2.", "multi_modal_projector.linear_2."
        )] = array  # fmt: skip
    refused(save(weights, vision_config=None), "vision")


def test_an_unknown_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    refused("no-such-model", "no-such-model")
    refused(tmp_path / "no" / "folder", "folder")


@pytest.mark.parametrize(
    "options",
    [{"dtype": "int8"}, {"quantize": 3}, {"resolution": 100}, {"image_strategy": "squash"}],
)
def test_options_that_cannot_be(native_folder, options):
    refused(native_folder, str(next(iter(options.values()))), **options)


def test_a_width_that_fits_no_group_is_refused(native_weights, tmp_path):
    """The inner width made 160: no multiple of the group size of 64."""
    from ..reference import native

    weights = {name: _narrowed(name, array) for name, array in native_weights.items()}
    folder = native.save(weights, native.config(intermediate_size=160), tmp_path / "narrow")
    refused(folder, "down_proj is 160 wide", quantize=4)


def _narrowed(name, array):
    if "gate_proj" in name or "up_proj" in name:
        return array[:160]
    return array[:, :160] if "down_proj" in name else array


def test_quantising_twice(save, native_weights):
    weights = dict(native_weights)
    name = "language_model.lm_head."
    parts = mx.quantize(mx.array(weights.pop(f"{name}weight")), group_size=64, bits=8)
    for leaf, part in zip(("weight", "scales", "biases"), parts, strict=True):
        weights[name + leaf] = np.array(part)
    folder = save(weights, quantization={"group_size": 64, "bits": 8})
    load(str(folder))
    refused(folder, "quantised already", quantize=4)


def test_a_model_folder_opens_with_no_network(native_folder, monkeypatch):
    def no_network(*_args, **_kwargs):
        raise AssertionError("the network was touched")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, no_network)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    model, processor = load(str(native_folder))
    assert model(processor("Hi")).shape[-1] == 320


def test_no_weight_is_held_twice(native_folder):
    """The unfused projections go as the fused ones come, a layer at a time; none on a CPU."""
    peak = Peak()
    model, _ = load(str(native_folder))
    nbytes = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    copied = 0.02 if on_cpu() else 0.25
    assert peak.bytes < (1 + copied) * nbytes
    assert ("q_proj" in model.language_model.model.layers[0].self_attn) == on_cpu()


def test_a_tokenizer_is_read_once_and_its_damage_told(native_folder, copy, monkeypatch):
    from tokenizers import Tokenizer as Backend

    class Counting:
        reads = 0

        @classmethod
        def from_file(cls, path):
            cls.reads += 1
            return Backend.from_file(path)

    monkeypatch.setattr("tokenizers.Tokenizer", Counting)
    _, processor = load(str(native_folder))
    processor("Hi")
    assert Counting.reads == 1
    monkeypatch.undo()
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        load(str(copy))


def test_keywords_are_the_fields_of_the_options(native_folder):
    hints = get_type_hints(loading.LoadKeywords)
    assert hints.pop("quantize") == hints["bits"]
    assert hints == get_type_hints(loading.LoadOptions)
    with pytest.raises(TypeError, match=r"load: unknown option 'bitz'; known are adapter, bits, "):
        load(str(native_folder), bitz=4)
    with pytest.raises(UsageError, match="bits must be 4 or 8, not 5"):
        load(str(native_folder), bits=5)


def test_quantize_is_bits_under_its_old_name():
    with pytest.warns(DeprecationWarning, match="quantize is called bits"):
        assert loading._load_options({"quantize": 4}) == loading.LoadOptions(bits=4)
    with pytest.raises(UsageError, match="leave quantize out"):
        loading._load_options({"quantize": 4, "bits": 8})


def test_offline_fetches_no_picture(native_folder, monkeypatch):
    monkeypatch.setattr("mlx_vlm_edge.picture.fetch.download", lambda *_: pytest.fail("fetched"))
    _, processor = load(str(native_folder), offline=True)
    with pytest.raises(UsageError, match="nothing is fetched offline"):
        processor("What is it?", images=["HTTPS://example.com/a.png"])


def test_ids_beyond_the_embedding_are_refused(native_folder, tmp_path):
    """MLX would read other memory for them, in silence, or crash."""
    folder = shutil.copytree(native_folder, tmp_path / "more")
    backend = Tokenizer.from_folder(folder).backend
    rows = load(str(folder))[0].config.text.vocab_size
    backend.add_tokens([f"<more{n}>" for n in range(rows)])
    backend.save(str(folder / "tokenizer.json"))
    processor = load(str(folder))[1]
    assert processor("Say hi").input_ids.max() < rows
    with pytest.raises(UsageError, match=rf"\(<more{rows - 1}>\), and the model knows {rows} tok"):
        processor(f"Say <more{rows - 1}> hi")


def test_another_model_s_tokenizer_is_refused_at_load(native_folder, tmp_path):
    folder = shutil.copytree(native_folder, tmp_path / "other")
    saved = json.loads((folder / "tokenizer.json").read_text())
    words = saved["model"]["vocab"]
    words.update({f"word{n}": len(words) + n for n in range(5000)})
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(UsageError, match="it is another model's"):
        load(str(folder))


def test_an_empty_question_is_refused(native_folder):
    _, processor = load(str(native_folder))
    for question in ("", " \n"):
        with pytest.raises(UsageError, match="the question is empty"):
            processor(question)
