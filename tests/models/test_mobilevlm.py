"""MobileVLM V1 and V2: the golden numbers of the original code, the full sizes, the known traps."""

import json
import math
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_vlm_edge_convert import convert, pipeline
from mlx_vlm_edge_convert.families import decoder
from mlx_vlm_edge_convert.families import mobilevlm as rules
from mlx_vlm_edge_convert.quantize import quantize

from mlx_vlm_edge import load, stream_generate
from mlx_vlm_edge.connectors.ldp import LDP, LDPv2
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.hub.models import ALIASES
from mlx_vlm_edge.language.llama import TextConfig
from mlx_vlm_edge.models import family, mobilevlm
from mlx_vlm_edge.models.build import build

from ..memory import Peak
from ..parity import clip_pixels
from ..reference import published_keys as published

VERSIONS = ("mobilevlm_v1", "mobilevlm_v2")
PICTURES = ("landscape", "portrait")
ASKED = "What is in the image?\nAnswer the question using a single word or phrase."
SAID = "Hello there."


@pytest.fixture(scope="module", params=VERSIONS)
def version(request, golden):
    """The golden folder, what is loaded of it, and the pictures' folder."""
    folder = golden.parent / request.param
    return folder, *load(str(folder))


def expected(folder, name):
    return np.load(folder / f"reference_{name}.npz")


def picture(folder, name):
    return str(folder.parent / VERSIONS[0] / f"{name}.png")


def off(got, want):
    got = np.array(got)
    assert got.shape == want.shape
    return float(np.abs(got - want).max())


@pytest.mark.parametrize("name", PICTURES)
def test_golden_pixels_features_and_visual_tokens(version, name):
    folder, model, processor = version
    want = expected(folder, name)
    pixels = processor(ASKED, images=[picture(folder, name)]).pixels[0]
    x = clip_pixels(pixels.data[None])
    assert off(x.transpose(0, 3, 1, 2), want["pixel_values"]) < 1e-5
    features = model.vision_tower(x)
    assert off(features, want["vision_hidden_m2"]) < 2e-4
    assert off(model.mm_projector(features[:, 1:]), want["projector_out"]) < 1e-4
    assert off(model.encode_image(pixels)[None], want["projector_out"]) < 1e-4


@pytest.mark.parametrize("name", [*PICTURES, "textonly"])
def test_golden_ids_and_logits(version, name):
    folder, model, processor = version
    want = expected(folder, name)
    images = [] if name == "textonly" else [picture(folder, name)]
    inputs = processor(SAID if name == "textonly" else ASKED, images=images)
    ids = [i for i in want["input_ids"][0].tolist() for i in [i] * (144 if i == -200 else 1)]
    assert inputs.input_ids[0].tolist() == ids
    assert inputs.visual.tolist() == [at for at, token in enumerate(ids) if token == -200]
    assert off(model(inputs), want["logits"]) < 1e-3


@pytest.mark.parametrize("name", PICTURES)
def test_golden_greedy_ids(version, name):
    """Twelve, not stopped at the end token; with a cache, where the original recomputed all."""
    folder, model, processor = version
    processor.eos_ids = frozenset()
    images = [picture(folder, name)]
    pieces = list(stream_generate(model, processor, ASKED, images, max_tokens=12, verbose=True))
    assert [piece.token for piece in pieces[:12]] == expected(folder, name)["greedy_ids"].tolist()
    assert pieces[-1].visual_tokens == 144
    assert 0 < pieces[-1].stages["connector"] < pieces[-1].ttft_e2e


FAULTS = {
    "the layer after": lambda model: model.vision_tower.layers.pop(),
    "norm eps": lambda model: setattr(model.vision_tower.pre_layernorm, "eps", 1e-2),
    "columns before rows": lambda model: setattr(model, "mm_projector", Turned(model.mm_projector)),
    "no bias": lambda model: no_bias(model.mm_projector),
}


class Turned:
    def __init__(self, connector):
        self.connector = connector

    def __call__(self, x):
        x = x.reshape(1, 24, 24, -1).swapaxes(1, 2).reshape(1, 576, -1)
        return self.connector(x)


def no_bias(connector):
    if isinstance(connector, LDPv2):
        connector.peg_bias = mx.zeros_like(connector.peg_bias)
    else:
        connector.blocks[0].reduce.bias = mx.zeros_like(connector.blocks[0].reduce.bias)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(version, fault):
    folder = version[0]
    model, _ = load(str(folder))
    want = expected(folder, "landscape")
    FAULTS[fault](model)
    x = mx.array(want["pixel_values"].transpose(0, 2, 3, 1))
    got = model.mm_projector(model.vision_tower(x)[:, 1:])
    assert off(got, want["projector_out"]) > 1e-3


# Full sizes: nothing is allocated.


@pytest.fixture(scope="module")
def configs(golden):
    """The published configs by Hub id, without the sheet's own remarks."""
    found = json.loads((golden.parent / "mobilevlm_configs.json").read_text())
    extra = "_extra_litgpt_keys_seen"
    return {
        name: {k: v for k, v in (config | config.get(extra, {})).items() if k[0] != "_"}
        for name, config in found.items()
    }


SIZES = {
    # alias: hidden, inner, layers, heads, arrays, parameters
    "mobilevlm-v2-1.7b": (2048, 5632, 24, 16, 616, 1_674_121_216),
    "mobilevlm-v2-3b": (2560, 6912, 32, 32, 688, 3_014_273_536),
    "mobilevlm-v2-7b": (4096, 11008, 32, 32, 688, 7_062_943_744),
    "mobilevlm-1.7b": (2048, 5632, 24, 16, 634, None),
    "mobilevlm-3b": (2560, 6912, 32, 32, 706, None),
}


def checkpoint(alias):
    hidden, inner, layers, *_ = SIZES[alias]
    connector = published.ldpv2 if "-v2-" in alias else published.ldp
    return published.tower() | connector(hidden) | published.decoder(hidden, inner, layers)


def unallocated(shapes):
    return {name: mx.zeros(shape, dtype=mx.bfloat16) for name, shape in shapes.items()}


def published_config(configs, alias):
    if alias == "mobilevlm-3b":
        return configs["mtgv/MobileVLM_V2-3B"] | {"mm_projector_type": "ldpnet"}
    return configs[ALIASES[alias]]


@pytest.fixture
def head_differs(monkeypatch):
    """Whether the head equals the embedding is asked of values, which these arrays do not have."""
    monkeypatch.setattr(decoder, "_equal", lambda *_: False)


@pytest.mark.parametrize("alias", SIZES)
def test_a_full_size_checkpoint_fits_without_being_allocated(configs, alias, head_differs):
    hidden, _, _, heads, arrays, count = SIZES[alias]
    shapes = checkpoint(alias)
    assert len(shapes) == arrays
    assert count in (None, sum(math.prod(shape) for shape in shapes.values()))
    peak = Peak()
    config, native = rules.to_native(published_config(configs, alias), unallocated(shapes))
    model = build(family(config), config, native)
    assert len(native) == arrays
    text = model.config.text
    assert (text.hidden_size, text.num_attention_heads, text.head_dim) == (
        hidden,
        heads,
        hidden // heads,
    )
    assert isinstance(model.mm_projector, LDPv2 if "-v2-" in alias else LDP)
    own = {name: p.size for name, p in tree_flatten(model.parameters())}
    unused = 12_596_224 + 2 * 1024  # the tower's last layer and final norm: never loaded
    assert sum(own.values()) == sum(math.prod(s) for s in shapes.values()) - unused
    assert peak.bytes < 10_000_000


@pytest.mark.parametrize(
    ("hidden", "inner", "layers"), [(4096, 11008, 32), (5120, 13824, 40)], ids=["7b", "13b"]
)
@pytest.mark.parametrize("layout", ["original", "hub"])
def test_llava_full_size(configs, hidden, inner, layers, layout, head_differs):
    geometry = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128,
    }
    vocab = 32000 if layout == "original" else 32064
    shapes = published.decoder(hidden, inner, layers, vocab)
    if layout == "original":
        shapes |= published.tower() | published.mlp(hidden)
        config = {**configs["mtgv/MobileVLM_V2-7B"], **geometry}
        config |= {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu"}
    else:
        shapes = {f"language_model.{name}": shape for name, shape in shapes.items()}
        shapes |= published.tower("vision_tower.vision_model.")
        for number, inputs in ((1, 1024), (2, hidden)):
            shapes |= published.linear(f"multi_modal_projector.linear_{number}", hidden, inputs)
        config = dict(configs["llava-hf/llava-1.5-7b-hf"])
        if layers == 40:  # the 7B's text_config leaves out what are LlamaConfig's defaults
            config["text_config"] = {**config["text_config"], **geometry}
    config, native = pipeline.source_family(config).to_native(config, unallocated(shapes))
    model = build(family(config), config, native)
    assert model.config.text.vocab_size == vocab
    assert model.config.text.rms_norm_eps == 1e-5
    assert model.config.vision.layers == 23
    sizes = {name: p.size for name, p in tree_flatten(model.mm_projector.parameters())}
    assert hidden != 4096 or sum(sizes.values()) == 20_979_712


@pytest.mark.parametrize("alias", SIZES)
def test_groups_of_64_divide_every_width(configs, alias, head_differs):
    """What `convert --bits 4` does by default; nothing is computed."""
    _, native = rules.to_native(published_config(configs, alias), unallocated(checkpoint(alias)))
    packed, block = quantize(native, 4)
    scaled = [name for name in packed if name.endswith(".scales")]
    assert len(scaled) == 7 * SIZES[alias][2] + 2  # 170 of the 1.7B, with embedding and head
    assert all(name.startswith("language_model.") for name in scaled)
    assert {name for name, kind in block.items() if kind is False} >= {
        name.removesuffix(".weight")
        for name, array in native.items()
        if name.startswith("mm_projector.") and array.ndim == 2
    }
    if alias == "mobilevlm-v2-1.7b":  # what another port, in Swift, came to
        assert sum(array.nbytes for array in packed.values()) == 1_387_208_704


# Traps, by the numbers of the fact sheet's section 5.1.


@pytest.fixture
def copied(golden, tmp_path):
    def copy(version="mobilevlm_v2", drop=(), weights=None, **changes):
        folder = shutil.copytree(golden.parent / version, tmp_path / f"copy{len(drop)}")
        config = json.loads((folder / "config.json").read_text()) | changes
        for key in drop:
            del config[key]
        (folder / "config.json").write_text(json.dumps(config))
        if weights is not None:
            arrays = mx.load(str(folder / "model.safetensors"))
            mx.eval(arrays)
            mx.save_safetensors(str(folder / "model.safetensors"), weights(arrays))
        return str(folder)

    return copy


def test_1_the_tower_of_the_checkpoint_is_used(version, copied, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # no tower anywhere else

    def scaled(arrays):
        name = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
        return arrays | {name: arrays[name] * 2}

    folder = copied(version[0].name, weights=scaled)
    got, want = (load(f)[0].vision_tower.class_embedding for f in (folder, str(version[0])))
    assert mx.array_equal(got, want * 2)


def test_1_without_its_tower_the_one_it_names_is_asked_for(copied, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder = copied(weights=lambda a: {k: v for k, v in a.items() if "vision_tower" not in k})
    with pytest.raises(UsageError, match="models pull openai/clip-vit-large-patch14-336"):
        load(folder)


def test_2_and_3_the_weights_tell_v1_from_v2(copied):
    assert isinstance(load(copied("mobilevlm_v1"))[0].mm_projector, LDP)


@pytest.mark.parametrize(("version_", "kind"), [("mobilevlm_v1", LDP), ("mobilevlm_v2", LDPv2)])
def test_2_the_type_may_be_missing(copied, version_, kind):
    """The original's defaults disagree then: "ldpnet" in its loader, "linear" in its builder."""
    model, _ = load(copied(version_, drop=["mm_projector_type"]))
    assert isinstance(model.mm_projector, kind)


@pytest.mark.parametrize(
    ("version_", "said"),
    [
        ("mobilevlm_v1", "ldpnetv2"),
        ("mobilevlm_v2", "ldpnet"),  # "ldpnetv2" begins with it: the longer one is tested first
        ("mobilevlm_v2", "linear"),
    ],
)
def test_2_a_type_that_is_not_the_weights_is_refused(copied, version_, said):
    with pytest.raises(UsageError, match=f"mm_projector_type '{said}'"):
        load(copied(version_, mm_projector_type=said))


def test_4_other_prompt_formats_are_refused_and_missing_keys_are_fine(copied):
    model, _ = load(copied(drop=["mm_use_im_patch_token", "mm_use_im_start_end"]))
    assert model.config.text.vocab_size == 512
    with pytest.raises(UsageError, match="mm_use_im_patch_token"):
        load(copied(drop=["use_cache"], mm_use_im_patch_token=True))


def test_5_depthwise_biases_are_v2s_only(version):
    names = {name for name, _ in tree_flatten(version[1].mm_projector.parameters())}
    if isinstance(version[1].mm_projector, LDPv2):
        assert {"peg", "peg_bias"} <= names
    else:
        assert not {f"blocks.{i}.depthwise_bias" for i in (0, 1)} & names
        assert not any("pointwise.bias" in name for name in names)


def test_6_each_norm_has_its_own_eps(version, configs):
    model = version[1]
    assert model.vision_tower.layers[0].layer_norm1.eps == 1e-5
    if isinstance(model.mm_projector, LDP):
        assert model.mm_projector.blocks[0].norm1.eps == 1e-5
    eps = {
        a: TextConfig.from_dict(published_config(configs, a), "llama").rms_norm_eps for a in SIZES
    }
    assert {a for a, value in eps.items() if value == 1e-5} == {"mobilevlm-v2-7b"}
    assert {value for a, value in eps.items() if a != "mobilevlm-v2-7b"} == {1e-6}


def test_8_the_3bs_foreign_keys_are_kept_and_not_used(configs):
    config = published_config(configs, "mobilevlm-v2-3b")
    assert config["n_head"] == 16
    text = TextConfig.from_dict(config, "llama")
    assert (text.num_attention_heads, text.head_dim) == (32, 80)


def test_8_a_head_of_80_quantises_its_weights_but_not_its_cache():
    from mlx_vlm_edge.language.cache import QuantizedKVCache

    with pytest.raises(UsageError, match="80"):
        QuantizedKVCache(64, 8).update_and_fetch(*[mx.zeros((1, 2, 3, 80))] * 2)


def test_9_text_is_tokenised_around_the_image(version):
    """As 29871, 13 in LLaMA's vocabulary: the word mark, then the line break."""
    folder, _, processor = version
    ids = processor(ASKED, images=[picture(folder, "portrait")]).input_ids[0].tolist()
    after = len(ids) - 1 - ids[::-1].index(-200) + 1
    token = processor.tokenizer.token_id
    assert ids[after : after + 2] == [token("▁"), token("<0x0A>")]
    assert ids.count(1) == 1
    assert 2 in processor("a</s>b", raw=True).input_ids[0]


def test_10_mobilellama_alone_is_no_vision_model(copied):
    with pytest.raises(UsageError, match="'llama' is not supported"):
        load(copied(model_type="llama"))
    folder = copied(
        drop=["use_cache"],
        weights=lambda a: {k: v for k, v in a.items() if "vision" not in k and "mm_" not in k},
    )
    with pytest.raises(UsageError, match="no MobileVLM connector"):
        load(folder)


def test_13_the_context_is_the_positions_the_model_has(configs):
    """The original's loader says 2,048 for the 7B, whose language model has 4,096 positions."""
    for alias, positions in (("mobilevlm-v2-7b", 4096), ("mobilevlm-v2-1.7b", 2048)):
        vision = {"vision_config": configs["openai/clip-vit-large-patch14-336 vision"]}
        config = mobilevlm.Config.from_dict(published_config(configs, alias) | vision)
        assert config.context == positions


# Conversion.


@pytest.mark.parametrize("kind", ["bin", "shards"])
def test_torch_files_load_as_published(golden, tmp_path, version, kind):
    """One pytorch_model.bin, or several with their index, in bfloat16 as on the Hub."""
    import torch
    from safetensors.torch import load_file

    folder = shutil.copytree(version[0], tmp_path / "bin")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(
        577
    )[None]
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        index = {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = f"pytorch_model-0000{number}-of-00002.bin"
            torch.save({name: tensors[name] for name in part}, folder / file)
            index |= dict.fromkeys(part, file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    model, _ = load(str(folder))
    for name, want in tree_flatten(version[1].parameters()):
        parts: object = model
        for part in name.split("."):
            parts = parts[int(part)] if part.isdigit() else parts[part]
        assert mx.array_equal(parts, want.astype(mx.bfloat16).astype(mx.float32)), name


def test_convert_and_load_again(version, tmp_path):
    lines: list[str] = []
    out = convert(version[0], tmp_path / "out", verify=True, report=lines.append)
    said = "\n".join(lines)
    assert all(f"{part}: max abs 0" in said for part in ("vision tower", "connector"))
    assert mobilevlm.FAMILY.is_native(mx.load(str(out / "model.safetensors")))
    again, _ = load(str(out))
    want = dict(tree_flatten(version[1].parameters()))
    got = dict(tree_flatten(again.parameters()))
    assert got.keys() == want.keys()
    assert all(mx.array_equal(got[name], want[name]) for name in want)
    config = json.loads((out / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 4
    assert config["mm_projector_type"] == version[1].config.projector
    crop = json.loads((out / "preprocessor_config.json").read_text())["crop_size"]
    assert crop == {"height": 336, "width": 336}


def test_a_width_that_no_group_divides_is_said(version, tmp_path):
    """The tiny model's inner width of 344 is no multiple of 32, 64 or 128."""
    with pytest.raises(UsageError, match="344 wide, which groups of 64 do not divide"):
        convert(version[0], tmp_path / "out", bits=4)
