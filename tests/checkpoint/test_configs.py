"""The shipped configs are those of the published checkpoints: every tensor has its place."""

import gzip
import json
import math
import re
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_vlm_edge_convert.families import cambrian, decoder, llava
from mlx_vlm_edge_convert.pipeline import source_family

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.checkpoint.config import PREPROCESSOR
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.hub.models import ALIASES
from mlx_vlm_edge.models import family, family_name
from mlx_vlm_edge.models.build import build

from ..memory import Peak
from ..reference import published_keys as published

KEYS = Path(__file__).parents[1] / "golden" / "keys"
LISTED = {
    "fastvlm-0.5b": "fastvlm_0.5b_mlxvlm",
    "fastvlm-1.5b": "fastvlm_1.5b_mlxvlm",
    "fastvlm-7b": "fastvlm_7b_mlxvlm",
    "idefics2-8b": "idefics2_8b",
    "idefics3-8b": "idefics3_8b",
    "smolvlm-256m": "smolvlm_256m",
    "smolvlm-500m": "smolvlm_500m",
    "smolvlm-2.2b": "smolvlm_2.2b_v1",
    "smolvlm2-256m": "smolvlm_256m",
    "smolvlm2-500m": "smolvlm_500m",
    "smolvlm2-2.2b": "smolvlm2_2.2b",
    "eve-7b": "eve_7b_v1",
    "eve-7b-hd": "eve_7b_v1",
    "fuyu-8b": "fuyu_8b",
    "convllava-7b-768": "convllava_7b_sft",
    "convllava-7b-1024": "convllava_7b_sft",
    "convllava-7b-1536": "convllava_7b_sft",
    "moe-llava-stablelm-1.6b": "moe_llava_stablelm_1.6b_4e",
    "moe-llava-qwen-1.8b": "moe_llava_qwen_1.8b_4e",
    "moe-llava-phi2-2.7b": "moe_llava_phi2_2.7b_4e",
    "moe-llava-stablelm-1.6b-384": "moe_llava_stablelm_1.6b_4e_384",
    "moe-llava-phi2-2.7b-384": "moe_llava_phi2_2.7b_4e_384",
    "cambrian-8b": "cambrian_8b",
    "cambrian-13b": "cambrian_13b",
    "cambrian-34b": "cambrian_34b",
}
# alias: hidden, inner, layers, connector, vocabulary
LLAMAS = {
    "mobilevlm-v2-1.7b": (2048, 5632, 24, published.ldpv2, 32000),
    "mobilevlm-v2-3b": (2560, 6912, 32, published.ldpv2, 32000),
    "mobilevlm-v2-7b": (4096, 11008, 32, published.ldpv2, 32000),
    "mobilevlm-1.7b": (2048, 5632, 24, published.ldp, 32000),
    "mobilevlm-3b": (2560, 6912, 32, published.ldp, 32000),
    "llava-1.5-7b": (4096, 11008, 32, published.mlp, 32064),
    "llava-1.5-13b": (5120, 13824, 40, published.mlp, 32064),
    "sharegpt4v-7b": (4096, 11008, 32, published.mlp, 32000),
    "sharegpt4v-13b": (5120, 13824, 40, published.mlp, 32000),
}
# What is left, in millions of parameters: the published sizes of its parts.
COUNTED = {"llava-onevision-0.5b": 894, "eve-7b-hd-v2": 14_140}


@pytest.fixture(autouse=True)
def nothing_is_allocated(monkeypatch):
    """And no head is compared with its embedding: these arrays have no values."""
    monkeypatch.setattr(decoder, "_equal", lambda *_: False)
    monkeypatch.setattr(cambrian, "repository", lambda name: Path("/towers") / name)
    monkeypatch.setattr(cambrian, "read_checkpoint", cambrian_tower)
    peak = Peak()
    yield
    assert peak.bytes < 10_000_000


CAMBRIAN_TOWERS = ("SigLIP", "openai", "facebook", "laion")
# What of the four is not run: pooling, CLIP's last layer and norm, what training masks with; and
# what is folded: layer scales.
CAMBRIAN_UNUSED = re.compile(
    r"visual\.trunk\.(attn_pool|head)\..*|vision_model\.(encoder\.layers\.23\.|post_layernorm).*"
    r"|.*(mask_token|lambda1|gamma)"
)


def cambrian_tower(folder):
    """Names and shapes of the towers that Cambrian-1's checkpoints leave out."""
    towers = zip(CAMBRIAN_TOWERS, listed("cambrian_towers"), strict=True)
    return next(unallocated(shapes) for word, shapes in towers if word in str(folder))


def unallocated(shapes):
    return {name: mx.zeros(shape, dtype=mx.bfloat16) for name, shape in shapes.items()}


def listed(name):
    with gzip.open(KEYS / f"{name}_keys.json.gz", "rt") as file:
        return json.load(file)


def native(config, shapes):
    """Native weights of a published checkpoint with these names and shapes."""
    weights = unallocated(shapes)
    kind = config["model_type"]
    if kind == "llava":  # its to_native would translate a config of the original repository's
        return llava.rename(weights)
    return source_family(config).to_native(config, weights)[1]


def count(model):
    return sum(parameter.size for _, parameter in tree_flatten(model.parameters()))


def test_every_alias_has_a_config_and_every_config_an_alias():
    assert configs.names() == sorted(ALIASES)
    assert set(LISTED) | set(LLAMAS) | set(COUNTED) == set(ALIASES)


@pytest.mark.parametrize("alias", ALIASES)
def test_a_config_says_where_it_is_from_and_its_family_takes_it(alias):
    config = configs.read(alias)
    origin = configs.origin(alias)
    assert origin.source
    assert not [key for key in config if key.startswith("_")]
    kind = family(config)
    parsed = kind.Config.from_dict(config)
    assert parsed.source == config
    assert parsed.eos_token_ids
    for key in filter(None, origin.unconfirmed.split(", ")):
        said = json.dumps(config)
        assert key.split(" ")[0] in said or "left out" in key, key
    assert (PREPROCESSOR in config) == (family_name(config) in ("idefics2", "idefics3"))


@pytest.mark.parametrize("alias", LISTED)
def test_a_listed_checkpoint_fits_its_config(alias):
    """`build` refuses a tensor without a place, a place without one, and any other shape."""
    shapes = listed(LISTED[alias])
    config = configs.read(alias)
    model = build(family(config), config, native(config, shapes))
    if alias.startswith("convllava"):  # whose layer scales are folded, its last norm not run
        unused = (
            "layer_scale_parameter",
            "vision_tower.layernorm.weight",
            "vision_tower.layernorm.bias",
        )
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(unused)}
    if alias.startswith("moe-llava"):  # whose features are those before the tower's last layer
        last = config["vision_config"]["num_hidden_layers"] - 1
        unused = (f"vision_model.encoder.layers.{last}.", "post_layernorm", "vision_model.head.")
        shapes = {k: v for k, v in shapes.items() if not any(part in k for part in unused)}
    if alias.startswith("cambrian"):
        for tower in listed("cambrian_towers"):
            shapes |= {name: at for name, at in tower.items() if not CAMBRIAN_UNUSED.match(name)}
        shapes["embeddings.position_embeddings"] = (1 + 27 * 27, 1536)  # resized from 37 x 37
    if not alias.startswith("fastvlm"):  # whose tower is folded
        assert count(model) == sum(math.prod(shape) for shape in shapes.values())
    head = "language_model.lm_head.weight"
    if alias.startswith("fastvlm"):
        assert config["tie_word_embeddings"] == (head not in shapes)


@pytest.mark.parametrize("alias", ["cambrian-8b", "cambrian-13b", "cambrian-34b"])
def test_the_published_towers_of_cambrian_are_the_shipped_ones(alias):
    """Which the published config.json does not describe; no shape says that SigLIP takes 384."""
    shipped = configs.read(alias)
    flat = {**shipped["text_config"], **shipped}
    del flat["text_config"], flat["vision_config"]
    config, _ = cambrian.to_native(flat, unallocated(listed(LISTED[alias])))
    views = [family(c).Config.from_dict(c).views for c in (config, shipped)]
    sides, wanted = ([view.tower.image_size for view in each] for each in views)
    assert sides == wanted == [384, 336, 378, 1024]


@pytest.mark.parametrize("alias", LLAMAS)
def test_a_llama_checkpoint_fits_its_config(alias):
    hidden, inner, layers, connector, vocabulary = LLAMAS[alias]
    shapes = published.tower() | connector(hidden)
    shapes |= published.decoder(hidden, inner, layers, vocabulary)
    config = configs.read(alias)
    model = build(family(config), config, native(config, shapes))
    unused = 12_596_224 + 2 * 1024  # the tower's last layer and final norm: never loaded
    assert count(model) == sum(math.prod(shape) for shape in shapes.values()) - unused


@pytest.mark.parametrize("alias", COUNTED)
def test_the_others_have_the_published_size(alias):
    config = configs.read(alias)
    kind = family(config)
    model = kind.Model(kind.Config.from_dict(config))
    assert count(model) / 1e6 == pytest.approx(COUNTED[alias], rel=0.005)


def test_eve_v2_fits_what_its_original_builds():
    import torch

    from ..reference import eve2 as theirs

    config = configs.read("eve-7b-hd-v2")
    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in theirs.Eve2(config).state_dict().items()}
    build(family(config), config, native(config, shapes))


def test_a_wrong_size_is_found():
    config = configs.read("smolvlm-256m")
    config["text_config"]["num_hidden_layers"] += 1
    weights = native(config, listed("smolvlm_256m"))
    with pytest.raises(UsageError, match=r"lacks language_model\.model\.layers\.30"):
        build(family(config), config, weights)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fastvlm-05b", "did you mean fastvlm-0.5b"),
        ("", "models list --available"),
        ("../config", "no config is shipped"),
    ],
)
def test_an_unknown_name_is_one_line(name, message):
    with pytest.raises(UsageError, match=message) as error:
        configs.read(name)
    assert "\n" not in str(error.value)


def test_a_name_may_be_written_in_capitals():
    assert configs.read("FastVLM-0.5B") == configs.read("fastvlm-0.5b")
