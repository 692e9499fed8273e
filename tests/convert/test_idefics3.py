"""Idefics3 and SmolVLM through the converter: published names, both layouts, folders, the head."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx_vlm_edge_convert import convert
from mlx_vlm_edge_convert.families import idefics3

from mlx_vlm_edge import load
from mlx_vlm_edge.checkpoint.config import read_config
from mlx_vlm_edge.checkpoint.weights import read_safetensors
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.models import idefics3 as family
from mlx_vlm_edge.models.build import build

from ..memory import Peak
from ..parity import FLOAT32, distance
from .test_key_lists import shapes, unallocated

SO400M = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "patch_size": 14,
}  # fmt: skip
BASE = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "patch_size": 16, "image_size": 512,
}  # fmt: skip


def text(width, inner, layers, heads, kv, vocabulary, theta):
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocabulary,
        "rope_theta": theta, "rms_norm_eps": 1e-5, "max_position_embeddings": 16384,
    }  # fmt: skip


# List of names -> what the published config.json says, and the parameters there are.
PUBLISHED = {
    "idefics3_8b": (
        "idefics3", 2, {**SO400M, "image_size": 364},
        text(4096, 14336, 32, 32, 8, 128259, 500000.0), 8_462_086_384,
    ),
    "smolvlm_2.2b_v1": (
        "idefics3", 3, {**SO400M, "image_size": 384},
        text(2048, 8192, 24, 32, 32, 49155, 273768.0), 2_246_272_880,
    ),
    "smolvlm2_2.2b": (
        "smolvlm", 3, {**SO400M, "image_size": 384},
        text(2048, 8192, 24, 32, 32, 49280, 273768.0), 2_246_784_880,
    ),
    "smolvlm_500m": (
        "idefics3", 4, BASE, text(960, 2560, 32, 15, 5, 49280, 100000.0), 507_482_304,
    ),
    "smolvlm_256m": (
        "idefics3", 4, BASE, text(576, 1536, 30, 9, 3, 49280, 100000.0), 256_484_928,
    ),
}  # fmt: skip
TILE_TOKENS = {
    "idefics3_8b": 169, "smolvlm_2.2b_v1": 81, "smolvlm2_2.2b": 81, "smolvlm_500m": 64,
    "smolvlm_256m": 64,
}  # fmt: skip


def published(name):
    kind, scale, vision, decoder, _ = PUBLISHED[name]
    return {
        "model_type": kind,
        "scale_factor": scale,
        "vision_config": vision,
        "text_config": decoder,
        "tie_word_embeddings": False,
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_tensor_has_its_place(name, monkeypatch):
    """Names, shapes and counts of the full sizes, up to the model's parameters, unallocated."""
    monkeypatch.setattr(idefics3, "settle_head", lambda weights, tied: tied)  # it compares values
    peak = Peak()
    source = unallocated(shapes(name))
    config, native = idefics3.to_native(published(name), source)
    assert len(native) == len(source)
    assert sum(array.size for array in native.values()) == PUBLISHED[name][-1]
    assert not any(key.startswith(("model.", "language_model.model.")) for key in native)
    model = build(family, config, native)
    tile = np.zeros((1, model.config.tile, model.config.tile, 3), np.uint8)
    grid = model.config.tile // model.config.vision.patch_size // model.config.scale_factor
    assert grid**2 == TILE_TOKENS[name]
    assert tile.shape[1] * 4 == model.config.longest_edge
    assert peak.bytes < 10_000_000


@pytest.fixture(scope="module")
def theirs():
    from ..reference import idefics3 as reference

    return reference


@pytest.fixture(scope="module")
def folders(theirs, tmp_path_factory):
    """The tiny models as transformers saves them."""
    made = {}
    for name, case in theirs.CASES.items():
        made[name] = theirs.save(theirs.build(case), case, tmp_path_factory.mktemp(name))
    return made


def logits(folder, image):
    model, processor = load(str(folder))
    return model(processor("What?", images=[image]))[0]


@pytest.mark.parametrize("name", ["idefics3", "smolvlm-2b", "smolvlm"])
def test_a_converted_folder_is_the_source(folders, theirs, tmp_path, name):
    image = theirs.picture(1, 60, 41)
    written = convert(folders[name], tmp_path / "native", verify=True)
    arrays = read_safetensors([written / "model.safetensors"])
    assert family.is_native(arrays)
    assert ("language_model.lm_head.weight" in arrays) != theirs.CASES[name].tied
    assert "language_model.layers.0.self_attn.q_proj.weight" in arrays
    assert distance(logits(written, image), logits(folders[name], image)) < 1e-6
    config = json.loads((written / "config.json").read_text())
    assert "preprocessor_config" not in config
    assert (written / "tokenizer.json").is_file()
    beside = json.loads((written / "preprocessor_config.json").read_text())
    assert beside["size"] == {"longest_edge": 4 * theirs.CASES[name].tile}
    again = convert(written, tmp_path / "again", verify=True)
    assert read_safetensors([again / "model.safetensors"]).keys() == arrays.keys()


def test_the_preprocessor_of_the_folder_counts_in_every_layout(folders, theirs, tmp_path):
    """A fine-tuned model with another longest edge, as transformers 4 and 5 write it."""
    case, image = theirs.CASES["idefics3"], theirs.picture(1, 60, 60)
    folder = tmp_path / "tuned"
    shutil.copytree(folders["idefics3"], folder)
    edges = {"size": {"longest_edge": 2 * case.tile}}
    (folder / "preprocessor_config.json").write_text(json.dumps(edges))
    native = convert(folder, tmp_path / "native")
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": edges}))
    for path in (native, folder):
        assert len(load(str(path))[1]("What?", images=[image]).pixels[0].data) == 5


def test_the_first_layout_with_added_rows_apart(folders, theirs, tmp_path):
    """Names from before transformers had the model: Llama's at the top, added tokens apart."""
    folder = tmp_path / "first"
    shutil.copytree(folders["idefics3"], folder)
    arrays = read_safetensors([folder / "model.safetensors"])
    first = {}
    for name, array in arrays.items():
        name = name.replace("model.text_model.", "model.").replace("model.connector.", "model.")
        first[name] = array
    for table, rows in (
        ("model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight"),
        ("lm_head.weight", "additional_fc.weight"),
    ):
        first[rows], first[table] = first[table][-3:], first[table][:-3]
    first["model.vision_model.head.probe"] = mx.zeros((1, 1, 32))
    first["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.zeros((8,))
    mx.save_safetensors(str(folder / "model.safetensors"), first, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] -= 3
    (folder / "config.json").write_text(json.dumps(config))
    image = theirs.picture(1, 60, 41)
    assert distance(logits(folder, image), logits(folders["idefics3"], image)) < 1e-6


def test_quantised_folders_keep_tower_and_connector(folders, theirs, tmp_path):
    image = theirs.picture(1, 60, 41)
    written = convert(folders["idefics3"], tmp_path / "eight", bits=8, group_size=32, verify=True)
    arrays = read_safetensors([written / "model.safetensors"])
    packed = {name for name in arrays if name.endswith(".scales")}
    assert packed
    assert all(name.startswith("language_model.") for name in packed)
    assert "language_model.embed_tokens.scales" in packed
    config = read_config(written)
    assert config["quantization"]["connector.modality_projection.proj"] is False
    assert distance(logits(written, image), logits(folders["idefics3"], image)) < 0.1


def test_float16_leaves_the_tower_as_it_was(folders, tmp_path):
    written = convert(folders["idefics3"], tmp_path / "half", dtype="float16")
    arrays = read_safetensors([written / "model.safetensors"])
    kinds = {name.partition(".")[0]: array.dtype for name, array in arrays.items()}
    assert kinds["vision_model"] == mx.float32
    assert kinds["language_model"] == mx.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.text_model.layers.0.extra.weight": (3,)}, "no rule for model.text_model.layers"),
        ({"model.connector.modality_projection.proj.weight": None}, "no complete Idefics3"),
        ({"model.vision_model.embeddings.patch_embedding.weight": (9, 3, 4, 4)}, "hidden_size"),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_refused(folders, change, message):
    weights = read_safetensors([folders["idefics3"] / "model.safetensors"])
    for name, shape in change.items():
        if shape is None:
            del weights[name]
        else:
            weights[name] = mx.zeros(shape)
    with pytest.raises(UsageError, match=message):
        idefics3.to_native(read_config(folders["idefics3"]), weights)


def test_another_familys_names_are_refused():
    with pytest.raises(UsageError, match="no Idefics3 layout"):
        idefics3.rename({"model.layers.0.mlp.up_proj.weight": mx.zeros((2, 2))})


def test_geometry_comes_from_the_weights_where_the_config_is_silent(folders, theirs):
    weights = read_safetensors([folders["smolvlm-2b"] / "model.safetensors"])
    config = read_config(folders["smolvlm-2b"])
    sparse = {**config, "vision_config": {"num_attention_heads": 2, "image_size": 38}}
    native, arrays = idefics3.to_native(sparse, weights)
    model = build(family, native, arrays)
    assert model.config.vision.grid == 9
    x = np.random.default_rng(0).integers(0, 256, (2, 38, 38, 3), np.uint8)
    whole = build(family, *idefics3.to_native(config, weights))
    assert distance(model.features(x), whole.features(x)) < FLOAT32
