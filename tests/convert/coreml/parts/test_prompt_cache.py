"""The prompt cache: what a host takes over is what it would have computed, in both forms."""

import json
from dataclasses import replace

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.check.interpreter import Package
from mlx_vlm_edge_convert.coreml.package.save import save_package
from mlx_vlm_edge_convert.coreml.parts import prompt_cache
from mlx_vlm_edge_convert.coreml.parts.prompt_cache import write_prompt_cache
from mlx_vlm_edge_convert.coreml.run.host import DecoderHost
from safetensors.numpy import load_file, save_file

from mlx_vlm_edge.errors import UsageError

from .test_decoder import FORMS, QWEN2, make, random_model

IDS = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]  # of two prefill passes of 8


@pytest.fixture(scope="module", params=FORMS)
def exported(request, tools, tmp_path_factory):
    """A float16 decoder of each form with its prompt cache: the part, its folder and its entry."""
    folder = tmp_path_factory.mktemp(request.param)
    part = make(random_model(QWEN2), request.param, "fp16")
    save_package(part, folder / "decoder.mlpackage")
    part.write_files(folder)
    entry, parity = write_prompt_cache(part, folder / "decoder.mlpackage", IDS)
    assert parity.passed
    assert parity.error == 0
    return part, folder, {**part.describe(), "prompt_cache": entry}


def opened(exported):
    _, folder, entry = exported
    return DecoderHost.open(folder, entry, Package(folder / "decoder.mlpackage"))


def test_greedy_tokens_are_the_same_with_and_without(exported):
    """Whichever ids follow, in prefill passes that are cut elsewhere."""
    host = opened(exported)
    for rest in ([40], [41, 42, 43], list(range(50, 62))):
        ids = [*IDS, *rest]
        host.start()
        expected = list(host.generate(host.embed(ids), 5))
        assert host.begin(ids) == len(IDS)
        assert list(host.generate(host.embed(rest), 5)) == expected
        assert host.offset == len(ids) + 4


def test_a_prompt_that_begins_otherwise_is_run_from_its_first_other_id(exported):
    host = opened(exported)
    for ids, count in (([1, 6, 7], 0), ([5, 6, 50, 8, 9], 2), ([*IDS[:4]], 4), ([], 0)):
        host.step(3)
        assert host.begin(ids) == count == host.offset
    other = [5, 6, 50, 8, 9]
    host.start()
    expected = list(host.generate(host.embed(other), 4))
    host.begin(other)
    assert list(host.generate(host.embed(other[2:]), 4)) == expected


def test_a_bundle_without_one_begins_at_the_start(exported):
    part, folder, entry = exported
    entry = {name: value for name, value in entry.items() if name != "prompt_cache"}
    host = opened((part, folder, entry))
    host.step(3)
    assert host.begin(IDS) == host.offset == 0


def keys_off_by_one(arrays, axis):
    """Of both it would be none: attention does not see in which order positions lie."""
    return arrays | {"keys": np.roll(arrays["keys"], 1, axis)}


def values_for_keys(arrays, axis):
    return {"keys": arrays["values"], "values": arrays["keys"]}


def layers_swapped(arrays, axis):
    return {name: array[::-1].copy() for name, array in arrays.items()}


def heads_swapped(arrays, axis):
    return arrays | {"values": arrays["values"][:, ::-1].copy()}


def one_head_of_zeros(arrays, axis):
    arrays["keys"][0, 1] = 0
    return arrays


def one_position_of_zeros(arrays, axis):
    np.moveaxis(arrays["values"], axis, 0)[3] = 0
    return arrays


FAULTS = (
    keys_off_by_one, values_for_keys, layers_swapped, heads_swapped, one_head_of_zeros,
    one_position_of_zeros,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(exported, tmp_path, monkeypatch, fault):
    part, folder, _ = exported
    (tmp_path / "decoder.mlpackage").symlink_to(folder / "decoder.mlpackage")
    part.write_files(tmp_path)
    save, axis = prompt_cache.save_arrays, part.geometry.position_axis
    monkeypatch.setattr(
        prompt_cache, "save_arrays", lambda arrays, path: save(fault(arrays, axis), path)
    )
    _, parity = write_prompt_cache(part, tmp_path / "decoder.mlpackage", IDS)
    assert parity.error > 100 * parity.limit


@pytest.mark.parametrize("change", ["cut off", "another shape", "integers", "elsewhere", "no ids"])
def test_a_damaged_one_is_one_line(exported, tmp_path, change):
    part, folder, entry = exported
    entry = json.loads(json.dumps(entry))
    part.write_files(tmp_path)
    path = tmp_path / "prompt_cache.safetensors"
    arrays = load_file(folder / path.name)
    if change == "another shape":
        arrays["keys"] = arrays["keys"][:1].copy()
    if change == "integers":
        arrays["values"] = arrays["values"].astype(np.int32)
    save_file(arrays, path)
    if change == "cut off":
        path.write_bytes(path.read_bytes()[:-10])
    if change == "elsewhere":
        entry["prompt_cache"]["file"] = "../prompt_cache.safetensors"
    if change == "no ids":
        entry["prompt_cache"]["ids"] = [0.5]
    with pytest.raises(UsageError, match="the prompt cache is damaged") as caught:
        DecoderHost.open(tmp_path, entry, Package(folder / "decoder.mlpackage"))
    assert "\n" not in str(caught.value)


def test_float32_caches_of_the_host_stay_float32(tools, tmp_path):
    part = make(random_model(QWEN2), "readonly", "fp32")
    save_package(part, tmp_path / "decoder.mlpackage")
    part.write_files(tmp_path)
    _, parity = write_prompt_cache(part, tmp_path / "decoder.mlpackage", IDS)
    assert parity.passed
    arrays = load_file(tmp_path / "prompt_cache.safetensors")
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    assert replace(part.geometry, dtype="float16").cache_shape == part.decoder.cache_shape
