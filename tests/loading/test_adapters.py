"""Adapters at load: what PEFT, mlx-lm and LLaVA write -> the answers of theirs, or one line."""

import copy
import json
import os
import re
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from mlx_vlm_edge_convert import convert
from mlx_vlm_edge_convert.adapters import native_names
from PIL import Image
from safetensors.numpy import load_file, save_file

from mlx_vlm_edge import load
from mlx_vlm_edge.checkpoint.adapter import LowRank, _matched
from mlx_vlm_edge.checkpoint.adapter_choice import AdapterChoice
from mlx_vlm_edge.checkpoint.quantization import dequantized
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.kernels import low_rank
from mlx_vlm_edge.loading.cost import config_of, native
from mlx_vlm_edge.loading.load import LoadOptions
from mlx_vlm_edge.loading.variants import Variants
from mlx_vlm_edge.models.adapted import branched

from ..parity import clip_pixels, distance
from ..reference import llava, lora

PARITY = 1e-5
KINDS = {
    "lora": {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
    "rslora, patterns": {
        "target_modules": r".*language_model.*\.(q_proj|up_proj)",
        "use_rslora": True,
        "rank_pattern": {r"layers.0.self_attn.q_proj": 5},
        "alpha_pattern": {"up_proj": 9},
    },
    "dora": {"target_modules": r".*language_model.*\.(k_proj|o_proj)", "use_dora": True},
    "biases and whole modules": {
        "target_modules": r".*language_model.*\.gate_proj",
        "modules_to_save": ["linear_1", "lm_head"],
    },
    "tower and connector": {"target_modules": r".*(vision_tower.*\.(v_proj|fc1)|linear_2)"},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"], "save_embedding_layers": False},
    "embedding, the table too": {"target_modules": ["embed_tokens", "v_proj"]},
}


@pytest.fixture(scope="module")
def reference():
    return llava.build()


@pytest.fixture(scope="module")
def folders(reference, tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {
        layout: llava.save(reference, layout, root / layout.replace(" ", "-"))
        for layout in ("original", "hub")
    }


@pytest.fixture(scope="module")
def adapters(reference, tmp_path_factory):
    """Each kind's folder and PEFT's model, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("adapters"), {}

    def of(kind):
        if kind not in made:
            folder = root / kind.replace(" ", "-").replace(",", "")
            made[kind] = folder, lora.tuned(reference.model, folder, **KINDS[kind])
        return made[kind]

    return of


def picture():
    values = np.random.default_rng(1).integers(0, 256, (70, 90, 3), np.uint8)
    return Image.fromarray(values)


def whole(peft):
    """The reference with PEFT's parts in it; its tower runs apart, so it is tuned as well."""
    model = copy.deepcopy(peft).merge_and_unload().double()
    config = llava.CLIPVisionConfig(**llava.VISION)
    tower = llava.CLIPVisionModel(config).eval().double()
    tower.load_state_dict(model.model.vision_tower.state_dict())
    tower.set_attn_implementation("eager")
    return llava.Reference(model, tower)


def answers(model, processor, theirs):
    """Our logits of a question about a picture, and PEFT's own (unmerged) model's."""
    inputs = processor("What is it?", images=[picture()])
    pixels = np.array(clip_pixels(inputs.pixels[0].data[None]))[0]
    ids = inputs.input_ids[0].tolist()
    ours = np.array(model(inputs)[0].astype(mx.float32))
    return ours, theirs.logits(ids, inputs.visual, theirs.tokens(pixels))


@pytest.mark.parametrize(
    ("kind", "layout"), [*((kind, "hub") for kind in KINDS), ("lora", "original")]
)
def test_it_answers_as_pefts_own_model(folders, adapters, kind, layout):
    """In transformers' names on a base in any published ones, merged into full precision."""
    folder, peft = adapters(kind)
    model, processor = load(str(folders[layout]), adapter=str(folder))
    ours, want = answers(model, processor, whole(peft))
    assert distance(ours, want) < PARITY
    plain, _ = load(str(folders[layout]))
    assert distance(answers(plain, processor, whole(peft))[0], want) > 100 * PARITY


def parameters(model):
    return dict(tree_flatten(model.parameters()))


def equal(left, right):
    left, right = parameters(left), parameters(right)
    return left.keys() == right.keys() and all(
        mx.array_equal(array, right[name]) for name, array in left.items()
    )


def test_a_converted_model_has_it_in_its_weights(folders, adapters, tmp_path):
    folder, _ = adapters("biases and whole modules")
    fused = convert(folders["hub"], tmp_path / "fused", adapter=str(folder), verify=True)
    assert equal(load(str(fused))[0], load(str(folders["hub"]), adapter=str(folder))[0])


@pytest.fixture(scope="module")
def packed(folders, tmp_path_factory):
    """A base in 4 bits, and the same numbers in full precision."""
    root = tmp_path_factory.mktemp("packed")
    folder = convert(folders["hub"], root / "4-bit", bits=4)
    plain = shutil.copytree(folder, root / "plain")
    config = json.loads((plain / "config.json").read_text())
    arrays = dequantized(mx.load(str(plain / "model.safetensors")), config.pop("quantization"))
    config.pop("quantization_config")
    (plain / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(plain / "model.safetensors"), arrays, {"format": "mlx"})
    return folder, plain


@pytest.mark.parametrize("kind", ["lora", "dora", "biases and whole modules", "embedding"])
def test_packed_weights_have_it_beside_them(packed, adapters, kind):
    """Packed layers answer as their numbers in full precision do with the adapter merged."""
    folder, _ = adapters(kind)
    branched, processor = load(str(packed[0]), adapter=str(folder))
    merged, _ = load(str(packed[1]), adapter=str(folder))
    inputs = processor("What is it?", images=[picture()])
    assert distance(branched(inputs)[0], merged(inputs)[0]) < PARITY
    layers = [type(layer) for layer in branched.modules()]
    assert low_rank.Linear in layers
    assert (low_rank.Embedding in layers) == (kind == "embedding")
    assert low_rank.Linear not in [type(layer) for layer in merged.modules()]


def test_packed_weights_take_nothing_up_in_a_converted_model(packed, adapters, tmp_path):
    folder, _ = adapters("lora")
    with pytest.raises(UsageError, match="or say --bits to quantise these anew"):
        convert(packed[0], tmp_path / "fused", adapter=str(folder))
    assert not (tmp_path / "fused").exists()
    said = []
    again = convert(
        packed[0], tmp_path / "anew", adapter=str(folder), bits=8, report=said.append
    )  # fmt: skip
    assert said[0].startswith("note: the source has 4 bits already: rounding it to 8 again")
    model, processor = load(str(again))
    merged, _ = load(str(packed[1]), adapter=str(folder))
    inputs = processor("What is it?", images=[picture()])
    assert distance(model(inputs)[0], merged(inputs)[0]) < 0.05  # rounded to 8 bits


def rewritten(folder, target, rename=str, config=None):
    """A copy of a PEFT adapter with other names, and other words in its config."""
    shutil.copytree(folder, target)
    file = target / "adapter_model.safetensors"
    arrays = load_file(file)
    save_file({rename(name): array for name, array in arrays.items()}, file)
    path = target / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    return target


def to_original(name):
    """PEFT's names on transformers' model -> those on the original code's."""
    inner = name.removeprefix("base_model.model.")
    return f"base_model.model.{llava.to_original(llava.to_hub(inner))}"


def test_llavas_folder_is_read_with_its_other_weights(folders, adapters, reference, tmp_path):
    """adapter_model.bin and non_lora_trainables.bin, as its own training code writes them."""
    folder = rewritten(adapters("lora")[0], tmp_path / "llava", to_original)
    arrays = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    torch.save(tensors, folder / "adapter_model.bin")
    connector = reference.model.model.multi_modal_projector
    moved = {
        f"base_model.model.model.mm_projector.{index}.{name}": 1.5 * tensor.float()
        for index, layer in (("0", connector.linear_1), ("2", connector.linear_2))
        for name, tensor in layer.state_dict().items()
    }
    torch.save(moved, folder / "non_lora_trainables.bin")
    tuned = whole(adapters("lora")[1])
    for parameter in tuned.model.model.multi_modal_projector.parameters():
        parameter.data.mul_(1.5)
    model, processor = load(str(folders["original"]), adapter=folder)
    ours, theirs = answers(model, processor, tuned)
    assert distance(ours, theirs) < PARITY


def to_mlx(folder, target, old=False):
    """A PEFT LoRA -> what mlx-vlm would have written of the same update."""
    target.mkdir()
    arrays = {}
    for name, array in load_file(folder / "adapter_model.safetensors").items():
        inner = llava.to_hub(name.removeprefix("base_model.model."))
        first, second = (".A", ".B") if old else (".lora_a", ".lora_b")
        inner = inner.replace(".lora_A.weight", first).replace(".lora_B.weight", second)
        arrays[inner] = np.ascontiguousarray(array.T)
    save_file(arrays, target / "adapters.safetensors")
    config = {"rank": 3, "alpha": 6} if old else {"lora_parameters": {"rank": 3, "scale": 2.0}}
    (target / "adapter_config.json").write_text(json.dumps({"num_layers": -1, **config}))
    return target


@pytest.mark.parametrize("old", [False, True])
def test_mlx_folders_give_the_same_model(folders, adapters, tmp_path, old):
    folder, _ = adapters("lora")
    theirs = load(str(folders["hub"]), adapter=to_mlx(folder, tmp_path / "mlx", old))[0]
    assert equal(theirs, load(str(folders["hub"]), adapter=folder)[0])


def mlx_lms(kind, base, size):
    """mlx-lm's layer around another, trained as it were, and its magnitude, where it is DoRA's."""
    layer = kind.from_base(base, r=4, scale=1.7)
    layer.lora_b = size * mx.random.normal(layer.lora_b.shape)
    if "m" not in layer:
        return layer, None
    layer.m = layer.m * (1 + 0.2 * mx.random.uniform(shape=layer.m.shape))
    return layer, layer.m


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_update_is_merged_as_mlx_lm_fuses_it(kind):
    mx.random.seed(3)
    linear = nn.Linear(64, 48)
    theirs, magnitude = mlx_lms({"lora": LoRALinear, "dora": DoRALinear}[kind], linear, 0.1)
    ours = LowRank(theirs.lora_a.T, theirs.lora_b.T, 1.7, magnitude)
    assert mx.allclose(ours.merged(linear.weight), theirs.fuse().weight, atol=1e-6)
    quantised = nn.QuantizedLinear.from_linear(linear, 32, 4)
    x = mx.random.normal((2, 5, 64))
    if kind == "dora":
        theirs.set_linear(quantised)
        theirs.m = magnitude
    else:
        theirs.linear = quantised
    assert mx.allclose(branched(quantised, ours)(x), theirs(x), atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("quantised", [False, True])
def test_a_table_and_a_head_tied_to_it_are_updated_as_mlx_lms(kind, quantised):
    """Unfused and fused: mlx-lm trains both with one update."""
    mx.random.seed(4)
    table = nn.Embedding(96, 64)
    theirs, magnitude = mlx_lms({"lora": LoRAEmbedding, "dora": DoRAEmbedding}[kind], table, 0.2)
    ours = LowRank(theirs.lora_a.T, theirs.lora_b.T, 1.7, magnitude, embedding=True, tied=True)
    assert mx.allclose(ours.merged(table.weight), theirs.fuse().weight, atol=1e-6)
    assert mx.allclose(ours.of_head.merged(table.weight), theirs.fuse().weight, atol=1e-6)
    if quantised:
        table = nn.QuantizedEmbedding.from_embedding(table, 32, 4)
        plain = nn.Embedding(96, 64)
        plain.weight = mx.dequantize(table.weight, table.scales, table.biases, 32, 4)
        theirs.embedding = table if kind == "lora" else plain  # theirs packs no DoRA's
    beside = branched(table, ours)
    ids, x = mx.array([[3, 95], [0, 41]]), mx.random.normal((2, 5, 64))
    assert mx.allclose(beside(ids), theirs(ids), atol=1e-4)
    assert mx.allclose(beside.as_linear(x), theirs.as_linear(x), atol=1e-4)
    again = beside.beside(nn.Embedding(96, 64))
    assert not mx.allclose(again.as_linear(x), again.base.as_linear(x), atol=1e-2)


def set_tied(folder, says):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config["text_config"]):
        part["tie_word_embeddings"] = says
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def tied(folders, tmp_path_factory):
    """A native base whose head is its table."""
    folder = convert(folders["hub"], tmp_path_factory.mktemp("tied") / "base")
    file = str(folder / "model.safetensors")
    arrays = mx.load(file)
    mx.eval(arrays)
    del arrays["language_model.lm_head.weight"]
    mx.save_safetensors(file, arrays, {"format": "mlx"})
    set_tied(folder, True)
    return folder


@pytest.fixture(scope="module")
def packed_tied(tied, tmp_path_factory):
    return convert(tied, tmp_path_factory.mktemp("packed-tied") / "8-bit", bits=8)


def of_table(base, target, kind="lora"):
    """mlx-lm's folder of an update of the table, and the layer that it trained."""
    mx.random.seed(6)
    table = nn.Embedding(1, 1)
    table.weight = mx.load(str(base / "model.safetensors"))[TABLE]
    theirs = {"lora": LoRAEmbedding, "dora": DoRAEmbedding}[kind].from_base(table, r=3, scale=2.0)
    theirs.lora_b = mx.random.normal((3, table.weight.shape[1]))
    arrays = {"lora_a": theirs.lora_a, "lora_b": theirs.lora_b}
    if kind == "dora":
        theirs.m = arrays["m"] = theirs.m * (1 + 0.3 * mx.random.uniform(shape=theirs.m.shape))
    target.mkdir()
    named = {f"model.embed_tokens.{name}": array for name, array in arrays.items()}
    mx.save_safetensors(str(target / "adapters.safetensors"), named)
    config = {"fine_tune_type": kind, "lora_parameters": {"rank": 3, "scale": 2.0}}
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target, theirs


TABLE = "language_model.model.embed_tokens.weight"


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_lms_update_of_a_table_is_its_heads_too(tied, packed_tied, tmp_path, kind):
    folder, theirs = of_table(tied, tmp_path / "adapter", kind)
    model, processor = load(str(tied), adapter=folder)
    assert "lm_head" not in model.language_model
    table = model.language_model.model.embed_tokens.weight
    assert mx.allclose(table, theirs.fuse().weight, atol=1e-5)
    fused = convert(tied, tmp_path / "fused", adapter=folder)
    assert native(json.loads((fused / "config.json").read_text()))["tie_word_embeddings"]
    assert equal(load(str(fused))[0], model)
    packed, _ = load(str(packed_tied), adapter=folder)
    inputs = processor("What is it?", images=[picture()])
    assert distance(packed(inputs)[0], model(inputs)[0]) < 0.05


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_it_is_the_heads_of_a_variant_too(tied, tmp_path, kind):
    folder, _ = of_table(tied, tmp_path / "adapter", kind)
    model, processor = load(str(tied))
    chosen = {"a": AdapterChoice(folder)}
    variant = Variants(str(tied), LoadOptions(), chosen).of(model)["a"]
    inputs = processor("What is it?", images=[picture()])
    alone, _ = load(str(tied), adapter=folder)
    assert distance(variant(inputs)[0], alone(inputs)[0]) < PARITY
    assert distance(model(inputs)[0], alone(inputs)[0]) > 100 * PARITY


def test_pefts_update_of_a_table_leaves_the_head_as_it_was(tied, adapters, tmp_path):
    """In a converted model, too, whose config says so to whoever reads it."""
    folder, _ = adapters("embedding")
    model, _ = load(str(tied), adapter=folder)
    before = mx.load(str(tied / "model.safetensors"))[TABLE]
    assert mx.array_equal(model.language_model.lm_head.weight, before)
    assert not mx.array_equal(model.language_model.model.embed_tokens.weight, before)
    fused = convert(tied, tmp_path / "fused", adapter=folder, verify=True)
    config = json.loads((fused / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert not config_of(str(fused))["tie_word_embeddings"]
    assert equal(load(str(fused))[0], model)


@pytest.mark.parametrize("part", ["table", "head"])
def test_a_packed_head_that_is_tied_has_its_own_weights_too(
    reference, tied, packed_tied, tmp_path, part
):
    """Where the table alone is replaced, or the head alone is updated."""
    settings = {
        "table": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
        "head": {"target_modules": ["lm_head"], "save_embedding_layers": False},
    }
    folder = tmp_path / "adapter"
    lora.tuned(reference.model, folder, **settings[part])
    also, _ = of_table(tied, tmp_path / "also")
    asked = [[folder], [also, folder], [folder, also]][: 1 if part == "table" else 3]
    for adapter in asked:
        packed, processor = load(str(packed_tied), adapter=adapter)
        plain, _ = load(str(tied), adapter=adapter)
        inputs = processor("What is it?", images=[picture()])
        assert "lm_head" in packed.language_model
        assert distance(packed(inputs)[0], plain(inputs)[0]) < 0.05


def test_an_update_of_a_tied_head_and_another_head_are_refused(tied, adapters, tmp_path):
    both = [adapters("biases and whole modules")[0], of_table(tied, tmp_path / "adapter")[0]]
    for pair in (both, both[::-1]):
        with pytest.raises(UsageError, match=r"another adapter changes language_model\.lm_head"):
            load(str(tied), adapter=pair)


def test_mlx_lms_and_pefts_updates_of_a_table_add_up_in_any_order(tied, adapters, tmp_path):
    both = [adapters("embedding")[0], of_table(tied, tmp_path / "adapter")[0]]
    one, other = (load(str(tied), adapter=pair)[0] for pair in (both, both[::-1]))
    for name, array in parameters(one).items():
        assert mx.allclose(array, parameters(other)[name], atol=1e-5), name
    alone, _ = load(str(tied), adapter=both[1])
    head, table = one.language_model.lm_head, alone.language_model.model.embed_tokens
    assert mx.allclose(head.weight, table.weight, atol=1e-5)


def test_both_readings_of_mlx_vlms_older_folders_are_told(folders, adapters, tmp_path, capsys):
    """Once, in whatever way it is read; not where the other one is chosen, nor of newer folders."""
    old = to_mlx(adapters("lora")[0], tmp_path / "old", old=True)
    base = str(folders["hub"])
    model, _ = load(base, adapter=old)
    load(base, adapter=old)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: adapter {old}: its update counts 2 times (alpha / rank)")
    assert line.endswith(f"to count 6 times (alpha): if yours is of then, say {old}:3")
    as_trained, _ = load(base, adapter=f"{old}:3")
    load(base, adapter=to_mlx(adapters("lora")[0], tmp_path / "new"))
    assert not capsys.readouterr().err
    assert not equal(as_trained, model)
    said = []
    convert(folders["hub"], tmp_path / "fused", adapter=old, report=said.append)
    assert said[0] == line


def test_a_scale_counts_a_part_of_it_and_several_add_up(folders, adapters, tmp_path):
    folder, _ = adapters("lora")
    base = str(folders["hub"])
    whole_one = load(base, adapter=str(folder))[0]
    halves = load(base, adapter=[f"{folder}:0.5", (folder, 0.5)])[0]
    for name, array in parameters(whole_one).items():
        assert mx.allclose(array, parameters(halves)[name], atol=1e-5), name
    assert equal(load(base, adapter=f"{folder}:0")[0], load(base)[0])
    odd = shutil.copytree(folder, tmp_path / "name:2")  # a folder of that name, not a scale
    assert equal(load(base, adapter=str(odd))[0], whole_one)


def test_the_prefix_cache_tells_models_with_other_adapters_apart(folders, adapters):
    folder, _ = adapters("lora")
    named = [None, folder, (folder, 0.5), adapters("dora")[0]]
    identities = [load(str(folders["hub"]), adapter=one)[0].identify() for one in named]
    assert len(set(identities)) == len(named)


def test_an_adapter_is_known_by_what_was_read(folders, adapters, tmp_path):
    """Not by what its folder has become, nor by when its files were written."""
    folder = shutil.copytree(adapters("lora")[0], tmp_path / "mine")
    model, _ = load(str(folders["hub"]), adapter=folder)
    before = model.identify()
    file = folder / "adapter_model.safetensors"
    written = file.stat()
    save_file({name: 2 * array for name, array in load_file(file).items()}, file)
    os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))
    assert model.identify() == before
    assert load(str(folders["hub"]), adapter=folder)[0].identify() != before
    shutil.rmtree(folder)
    assert model.identify() == before


def broken(folder, target, change):
    """An adapter with one thing wrong with it."""
    shutil.copytree(folder, target)
    file = target / "adapter_model.safetensors"
    arrays = load_file(file)
    first = next(iter(sorted(arrays)))  # a lora_A
    config = {}
    if change == "no folder":
        return target / "nowhere"
    if change == "no config":
        (target / "adapter_config.json").unlink()
    elif change == "no weights":
        file.unlink()
    elif change == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    elif change == "half of an update":
        arrays.pop(first.replace("lora_A", "lora_B"))
    elif change == "a tensor too many":
        arrays["base_model.model.model.language_model.layers.0.x.weight"] = arrays[first]
    elif change == "of another shape":
        arrays[first] = np.ascontiguousarray(arrays[first][:, :-1])
    elif change == "of another rank":
        config = {"r": 4}
    elif change == "of another base":
        arrays = {name.replace("layers.", "blocks."): array for name, array in arrays.items()}
    elif change == "deeper":
        arrays = {name.replace("layers.0.", "layers.9."): array for name, array in arrays.items()}
    elif change == "empty":
        arrays = {}
    elif change == "not finite":
        arrays[first] = np.full_like(arrays[first], np.nan)
    elif change == "no matrix":
        arrays[first] = np.array(1, np.float32)
    elif change == "alpha is no number":
        config = {"lora_alpha": float("nan")}
    elif change == "alpha is endless":
        config = {"lora_alpha": 10**400}
    elif change == "alpha is huge":
        config = {"lora_alpha": 1e307}
    elif change == "alpha is missing":
        config = {"lora_alpha": None}
    elif change == "rank is 0":
        config = {"r": 0}
    elif change == "of no rank":
        arrays = {name: array.take([], int("lora_B" in name)) for name, array in arrays.items()}
        config = {"r": 3}
    elif change == "a word for true":
        config = {"use_rslora": "false"}
    elif change == "whole numbers":
        arrays[first] = arrays[first].astype(np.int32)
    elif change == "too large":
        arrays = {name: 1e25 * array for name, array in arrays.items()}
    elif change == "patterns are a list":
        config = {"rank_pattern": ["q_proj"]}
    elif change == "a pattern that never ends":
        config = {"rank_pattern": {"([a-z._0-9]+)+X": 3}}
    elif change == "two of one weight":
        other = to_original(first)
        arrays[other] = arrays[first]
        arrays[other.replace("lora_A", "lora_B")] = arrays[first.replace("lora_A", "lora_B")]
    elif change == "another kind":
        config = {"peft_type": "IA3"}
    elif change == "moves its base":
        config = {"init_lora_weights": "pissa_niter_4"}
    elif change == "unknown setting":
        config = {"layer_replication": [[0, 2]]}
    elif change == "no format":
        (target / "adapter_config.json").write_text('{"x": 1}')
    if file.is_file() and change != "truncated":
        save_file(arrays, file)
    if config:
        path = target / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def test_a_part_that_adapters_may_not_change_is_told_from_another_base():
    tower = "vision_tower.vision_tower.model.patch_embed.0.weight"
    with pytest.raises(UsageError, match="or of a part that adapters may not change"):
        native_names({"model_type": "llava_qwen2"}, [tower], "x")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("no folder", "no such folder"),
        ("no config", "no adapter_config.json"),
        ("no format", "neither PEFT's nor"),
        ("no weights", "no weights in it"),
        ("truncated", "truncated"),
        ("half of an update", "lora_B.weight is missing"),
        ("a tensor too many", "layers.0.x.weight is no weight of a llava model"),
        ("of another shape", "it is of another base"),
        ("of another rank", "of rank 4 by its adapter_config.json"),
        ("empty", "its file of weights is empty"),
        ("not finite", "has values that are not finite"),
        ("no matrix", "of rank 3 by its adapter_config.json"),
        ("alpha is no number", "lora_alpha nan is no number"),
        ("alpha is endless", "lora_alpha 10000000000000000000 is no number"),
        ("alpha is huge", "lora_alpha 1e+307 is no number"),
        ("alpha is missing", "lora_alpha None is no number"),
        ("rank is 0", "r 0 or lora_alpha"),
        ("of no rank", "of rank 3 by its adapter_config.json"),
        ("a word for true", "use_rslora is neither true nor false"),
        ("whole numbers", "holds whole numbers"),
        ("too large", "is larger than any weight"),
        ("patterns are a list", "is no object"),
        ("a pattern that never ends", "is not of names"),
        ("two of one weight", "two of its names are of the same weight"),
        ("of another base", "it is of another base"),
        ("deeper", "this model (llava) has no"),
        ("another kind", "only LORA is known"),
        ("moves its base", "moves the base's weights"),
        ("unknown setting", "sets layer_replication"),
    ],
)
def test_a_wrong_adapter_gets_one_line(folders, adapters, tmp_path, change, said):
    folder = broken(adapters("lora")[0], tmp_path / "adapter", change)
    with pytest.raises(UsageError) as refused:
        load(str(folders["hub"]), adapter=folder)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


LAYERS = ["model.layers.1.self_attn.q_proj", "layers.11.mlp.up_proj", "q_proj", "a.layers.2.fc1"]


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj", "proj", r"layers.1.self_attn.q_proj", r"layers\.\d+\.mlp.*", r".*proj",
        "^q_proj$", r"layers\.[1-2]\..*|q_proj", r"^model.*\d+.*q_proj", r"self_attn",
        r".*\.fc\d", "up_proj|fc1", r"layers.\d.*", "", r"\d+.mlp.up_proj", "^model|fc1$",
    ],
)  # fmt: skip
def test_patterns_match_as_pefts(pattern):
    theirs = [bool(re.match(rf"(.*\.)?({pattern})$", layer)) for layer in LAYERS]
    assert [_matched({pattern: True}, layer, False) for layer in LAYERS] == theirs


def test_no_pattern_takes_long():
    """Hundreds of places at once, each step looks at every one of them only once."""
    layer = "a." * 200 + "b"
    assert _matched({".*" * 60 + "X": True}, layer, False) is False
    assert _matched({r"\d+" * 60 + "X": True}, "1" * 200, False) is False


def test_convert_fuses_no_numbers_that_make_no_weights(folders, adapters, tmp_path):
    folder = broken(adapters("lora")[0], tmp_path / "adapter", "not finite")
    with pytest.raises(UsageError, match="values that are not finite"):
        convert(folders["hub"], tmp_path / "fused", adapter=folder)
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("named", [3, ("x", "y"), ("x", 1e9), ("x", True), "folder:2000", ["a", 4]])
def test_what_is_no_adapter_is_refused_before_a_model_is_looked_for(named):
    with pytest.raises(UsageError, match="adapter"):
        load("no/such-model", adapter=named, offline=True)


def test_two_that_do_not_add_up_are_refused(folders, adapters):
    modules, _ = adapters("biases and whole modules")
    dora, _ = adapters("dora")
    table, _ = adapters("embedding, the table too")
    for pair in ([modules, modules], [dora, dora], [table, table]):
        with pytest.raises(UsageError, match="another adapter changes"):
            load(str(folders["hub"]), adapter=pair)
    with pytest.raises(UsageError, match="no scale goes with"):
        load(str(folders["hub"]), adapter=(modules, 0.5))


def test_a_tower_that_is_changed_is_not_run_by_a_package_of_the_base(folders, adapters):
    with pytest.raises(UsageError, match="changes the vision tower, which coreml would run"):
        load(
            str(folders["hub"]),
            adapter=adapters("tower and connector")[0],
            vision_backend="coreml",
        )


def test_a_hostile_bin_runs_nothing(folders, adapters, tmp_path):
    folder = shutil.copytree(adapters("lora")[0], tmp_path / "hostile")
    (folder / "adapter_model.safetensors").unlink()

    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"x": Harm()}, folder / "adapter_model.bin")
    with pytest.raises(UsageError):
        load(str(folders["hub"]), adapter=folder)
    assert not (tmp_path / "harm").exists()
