"""Adapters of families whose original code does not run here: PEFT merges them into the published
weights, under the published names, and such a checkpoint is what ours has to equal."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_edge import load
from mlx_vlm_edge.checkpoint.adapter_choice import AdapterChoice
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.loading.load import LoadOptions
from mlx_vlm_edge.loading.variants import Variants

from ..parity import distance
from ..reference import cambrian, lora, moe_llava

PARITY = 1e-5
EXPERTS = r".*experts\.\d+\.(up_proj|down_proj|w1|w2|c_proj|fc1|fc2)"
GATES = r".*deepspeed_moe\.gate\.wg"
OTHERS = r".*(\.self_attn\.(v_proj|o_proj|dense)|attn\.c_attn|attn\.c_proj|image_spatial_proj\.2)"
MIXTURES = [
    *((base, kind) for base in moe_llava.BASES for kind in (EXPERTS, OTHERS)),
    ("stablelm", GATES),
]
SAMPLERS = r".*(vision_sampler_(0|layers\.\d+).*(proj_in|o_proj|q_proj\.1)|mm_projector_aux_1\.2)"
DECODER = r".*(layers\.\d+\.(self_attn\.q_proj|mlp\.down_proj)|lm_head)"


def published(base, target, weights):
    """A copy of a published folder with other numbers in one file."""
    ignored = shutil.ignore_patterns("*.safetensors", "*.index.json")
    shutil.copytree(base, target, ignore=ignored)
    mx.save_safetensors(str(target / "model.safetensors"), weights)
    return target


def tuned(base, root, **settings):
    """An adapter of a published folder, and that folder with PEFT's merge of it."""
    weights = moe_llava.weights(base)
    peft = lora.tuned(lora.skeleton(weights), root / "adapter", **settings)
    return root / "adapter", published(base, root / "merged", lora.merged(peft))


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(1).integers(0, 256, (70, 90, 3), np.uint8)


def answers_as_merged(source, adapter, merged, picture):
    """Loaded with the adapter, and asked for it by its name, as the merged checkpoint does."""
    model, processor = load(str(merged))
    inputs = processor("What is it?", images=[picture])
    want = np.array(model(inputs)[0])
    ours = np.array(load(str(source), adapter=adapter)[0](inputs)[0])
    assert distance(ours, want) < PARITY
    checked = Variants(str(source), LoadOptions(), {"a": AdapterChoice(adapter)})
    plain, _ = load(str(source))
    named = np.array(checked.of(plain)["a"](inputs)[0])
    assert distance(named, want) < PARITY
    assert distance(np.array(plain(inputs)[0]), want) > 100 * PARITY


@pytest.mark.parametrize(("base", "layers"), MIXTURES)
def test_mixtures_answer_as_with_pefts_merge(base, layers, picture, tmp_path):
    source = moe_llava.folder_of(base)
    answers_as_merged(source, *tuned(source, tmp_path, target_modules=layers), picture)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return cambrian.hub_cache(tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("layers", [SAMPLERS, DECODER])
def test_cambrian_answers_as_with_pefts_merge(layers, picture, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    source = cambrian.checkpoint(tmp_path)
    whole = {"modules_to_save": ["norm"]} if layers == DECODER else {}
    adapter, merged = tuned(source, tmp_path, target_modules=layers, **whole)
    answers_as_merged(source, adapter, merged, picture)


def test_cambrians_towers_are_refused_by_name(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    source = cambrian.checkpoint(tmp_path)
    adapter, _ = tuned(source, tmp_path, target_modules=r".*layers\.0\.self_attn\.q_proj")
    path = adapter / "adapter_model.safetensors"
    arrays = mx.load(str(path))
    tower = "base_model.model.model.vision_tower_aux_list.0.vision_tower.blocks.0.attn.proj"
    renamed = {f"{tower}.{name.partition('q_proj.')[2]}": array for name, array in arrays.items()}
    mx.save_safetensors(str(path), renamed)
    with pytest.raises(UsageError) as refused:
        load(str(source), adapter=adapter)
    assert "a part that adapters may not change" in str(refused.value)
    assert "\n" not in str(refused.value)
