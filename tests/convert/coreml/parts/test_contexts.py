"""Several contexts in one decoder: functions for each, states of their own, the weights once."""

from dataclasses import replace

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.check.interpreter import Package
from mlx_vlm_edge_convert.coreml.package.interface import interface
from mlx_vlm_edge_convert.coreml.package.save import save_package
from mlx_vlm_edge_convert.coreml.part import Options
from mlx_vlm_edge_convert.coreml.parts import decoder
from mlx_vlm_edge_convert.coreml.parts.decoder import DecoderPart
from mlx_vlm_edge_convert.coreml.parts.prompt_cache import write_prompt_cache
from mlx_vlm_edge_convert.coreml.run.host import DecoderHost, Geometry

from mlx_vlm_edge.errors import UsageError

from ..grid.cells import AGREE, apart
from .test_decoder import (
    FORMS,
    MODEL,
    QWEN2,
    WEIGHT,
    another_activation,
    make,
    random_model,
    turned_the_other_way,
    unmasked,
)

CONTEXTS = (16, 64)
LARGE = ["prefill_context_64", "prefill_32_context_64", "decode_context_64"]


def part_of(model, form, precision="fp32"):
    options = Options(
        compute=FORMS[form], precision=precision, context=CONTEXTS[0], more_contexts=CONTEXTS[1:]
    )
    return DecoderPart(model, options, chunk=8)


@pytest.fixture(scope="module")
def model():
    return random_model(QWEN2)


@pytest.fixture(scope="module", params=FORMS)
def saved(request, tools, model, tmp_path_factory):
    """A float32 package of each form, and the part that it is of."""
    folder = tmp_path_factory.mktemp(request.param)
    part, found = part_of(model, request.param).verified(folder / "decoder.mlpackage")
    assert all(parity.passed for parity in found.parity), found.parity
    part.write_files(folder)
    return part, folder, found


def test_each_context_has_its_functions_and_is_verified(saved):
    part, folder, found = saved
    assert {*Package(folder / "decoder.mlpackage").functions} == {"prefill", "decode", *LARGE}
    told = [parity.inputs for parity in found.parity if "context 64" in parity.inputs]
    assert told == ["context 64, prefill + 8 steps (graph)", "context 64, prefill + 8 steps"]
    small, large = part.describe()["contexts"]
    assert (small["context"], small["decode"]) == (16, "decode")
    assert large == {
        "context": 64, "chunks": {LARGE[0]: 8, LARGE[1]: 32}, "decode": LARGE[2],
        "cache": 4 * small["cache"],
    }  # fmt: skip
    assert small["cache"] == part.memory()["cache"]


def test_weights_are_there_once(saved, model, tmp_path):
    part, folder, _ = saved
    one = replace(part, options=replace(part.options, context=64, more_contexts=()))
    save_package(one, tmp_path / "decoder.mlpackage")
    size, alone = (
        (path / "decoder.mlpackage" / WEIGHT).stat().st_size for path in (folder, tmp_path)
    )
    assert size == pytest.approx(alone, rel=0.01)


def test_a_second_reader_agrees(saved):
    _, folder, _ = saved
    functions = interface(folder / "decoder.mlpackage")
    for names in (["prefill", "decode"], LARGE):
        some = {name: functions[name] for name in names}
        assert apart(folder / "decoder.mlpackage", some) < AGREE


def test_a_host_takes_the_smallest_that_is_enough(saved):
    part, folder, _ = saved
    runs, entry = Package(folder / "decoder.mlpackage"), part.describe()
    for needed, context in ((None, 16), (1, 16), (16, 16), (17, 64), (64, 64)):
        assert Geometry.from_manifest(entry, needed).context == context
    with pytest.raises(UsageError, match="contexts of 16 and 64, none of 65"):
        DecoderHost.open(folder, entry, runs, 65)
    ids = np.random.default_rng(3).integers(0, 96, 40).tolist()
    large = DecoderHost.open(folder, entry, runs, 60)
    small = DecoderHost.open(folder, entry, runs)
    assert np.allclose(large.prefill(large.embed(ids[:9])), small.prefill(small.embed(ids[:9])),
                       rtol=1e-3, atol=1e-3)  # fmt: skip
    tokens = list(large.generate(large.embed(ids[9:]), 20))
    assert len(tokens) == 20
    with pytest.raises(UsageError, match="the prompt takes 40 positions, the package's context"):
        small.prefill(small.embed(ids[9:]))


def test_the_prompt_cache_is_for_every_context(saved, tmp_path):
    part, folder, _ = saved
    ids = [5, 6, 7, 8]
    (tmp_path / "decoder.mlpackage").symlink_to(folder / "decoder.mlpackage")
    part.write_files(tmp_path)
    entry, parity = write_prompt_cache(part, tmp_path / "decoder.mlpackage", ids)
    assert parity.passed
    described = {**part.describe(), "prompt_cache": entry}
    host = DecoderHost.open(tmp_path, described, Package(tmp_path / "decoder.mlpackage"), 64)
    expected = list(host.generate(host.embed([*ids, 9, 10]), 8))
    assert host.begin(ids) == 4
    assert list(host.generate(host.embed([9, 10]), 8)) == expected


def test_a_manifest_from_before_has_its_one_context(saved):
    entry = saved[0].describe()
    del entry["contexts"]
    assert Geometry.from_manifest(entry, 99).context == 16


@pytest.mark.parametrize("change", ["chunks", "decode", "context"])
def test_contexts_that_cannot_be_are_one_line(saved, change):
    entry = saved[0].describe()
    entry["contexts"][1][change] = {"chunks": {"prefill": 65}, "decode": 7, "context": -1}[change]
    with pytest.raises(UsageError, match=r"manifest.json: the decoder's geometry is wrong"):
        Geometry.from_manifest(entry, 64)


@pytest.mark.parametrize(
    ("fault", "function"),
    zip((another_activation, turned_the_other_way, unmasked), LARGE, strict=True),
)
def test_a_fault_of_one_context_is_found(saved, tmp_path, monkeypatch, fault, function):
    """By the check of the context that has it, and by no other."""
    part, _, _ = saved
    sound = decoder.save_package

    def faulty(part, path):
        sound(part, path)
        spec = Package(path).spec
        fault(spec, function)
        (path / MODEL).write_bytes(spec.SerializeToString())

    monkeypatch.setattr(decoder, "save_package", faulty)
    _, found = part.verified(tmp_path / "decoder.mlpackage")
    wrong = [parity.inputs for parity in found.parity if not parity.passed]
    assert "context 64, prefill + 8 steps (graph)" in wrong
    assert all("context 64" in each for each in wrong)


def test_one_context_is_as_it_was(tools, model):
    part = make(model)
    assert part.contexts == [part]
    assert [function.name for function in part.functions()] == ["prefill", "prefill_32", "decode"]
    assert "decode" not in part.describe()["geometry"]


def test_every_context_must_be_possible(model):
    for more, says in (((60,), "no multiple of 8"), ((16, 128), "this model's is 1 to 64")):
        with pytest.raises(UsageError, match=says):
            DecoderPart(model, Options(context=16, more_contexts=more), chunk=8)
