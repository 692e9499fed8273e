"""Chips: names, variants, ceilings by their formula, and what is said of an unsure figure."""

import subprocess

import pytest
from mlx_vlm_edge_bench.estimate import chips

from mlx_vlm_edge.errors import UsageError


def test_a_chip_is_found_by_any_of_its_names():
    chip = chips.find("m1-max")
    assert chip == chips.find("Apple M1 Max") == chips.find("M1 MAX ") == chips.find("m1-max-32")
    assert chips.find("Apple A17 Pro GPU").id == "a17-pro"
    assert chips.find("A16 Bionic").id == "a16"
    assert (chip.cores, chip.bandwidth, chip.memory) == (32, 400, (32, 64))
    assert chip.fp32 == pytest.approx(32 * 128 * 2 * 1.296 / 1000)
    assert chip.matrix is None


def test_fewer_cores_are_slower_and_may_have_a_narrower_memory():
    small = chips.find("m3-max-30")
    assert small.id == "m3-max-30"
    assert small.fp32 == pytest.approx(chips.find("m3-max").fp32 * 30 / 40)
    assert (small.bandwidth, chips.find("m3-max").bandwidth) == (300, 400)
    assert (chips.find("m4-max-32").bandwidth, chips.find("m4-max").bandwidth) == (410, 546)
    assert chips.find("m1-max-24").bandwidth == chips.find("m1-max").bandwidth


def test_matrix_units_are_those_of_m5_and_a19():
    with_units = {chip.id for chip in chips.known() if chip.matrix}
    assert with_units == {"m5", "m5-pro", "m5-max", "m5-ultra", "a19", "a19-pro"}


def test_unconfirmed_figures_are_named():
    doubtful = {chip.id: chip.unconfirmed for chip in chips.known() if chip.unconfirmed}
    assert doubtful["m5-max"] == ("GPU clock", "matrix units")
    assert doubtful["a18"] == ("bandwidth",)
    assert "m1-max" not in doubtful


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m1-mx", "did you mean m1-max"),
        ("m1-max-28", "no M1 Max has 28 GPU cores; known are 24, 32"),
        ("", "known are m1, "),
        ("Apple processor", "no figures of a chip"),
        ("x" * 500, "no figures of a chip"),
    ],
)
def test_an_unknown_chip_is_one_line(name, message):
    with pytest.raises(UsageError, match=message) as error:
        chips.find(name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_every_figure_has_a_tag_and_known_sources():
    tags, sources, used = chips.tags(), chips.sources(), set()
    for chip in chips.known():
        for value in chips.figures(chip.id).values():
            for figure in value if isinstance(value, list) else [value]:
                if isinstance(figure, dict):
                    assert figure["tag"] in tags
                    assert figure["sources"]
                    used.update(figure["sources"])
    assert used <= sources.keys()


def answers(brand):
    return lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=f"{brand}\n")


def test_this_macs_chip_is_found_by_its_brand(monkeypatch):
    monkeypatch.setattr(subprocess, "run", answers("Apple M4 Pro"))
    assert chips.own().id == "m4-pro"
    monkeypatch.setattr(subprocess, "run", answers("Intel(R) Core(TM) i7"))
    with pytest.raises(UsageError, match="i7 and no chip of Apple's: name a chip"):
        chips.own()


def test_elsewhere_a_chip_is_asked_for(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(UsageError, match="no Mac: name a chip, --chip m1-max"):
        chips.own()
