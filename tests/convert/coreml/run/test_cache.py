"""Which package belongs to which checkpoint, size and exporter: another name, another package."""

import pytest
from mlx_vlm_edge_convert.coreml.run import cache


@pytest.mark.parametrize("more", [(), ("9.0",)])
def test_sources_that_change_make_other_packages(tmp_path, more):
    (tmp_path / "emit").mkdir()
    (tmp_path / "emit" / "vit.py").write_text("SITE = 1")
    (tmp_path / "names.py").write_text("IMAGE = 1")
    rooms = [tmp_path / "emit", tmp_path / "names.py"]
    seen = [cache.sources(rooms, *more)]
    assert cache.sources(rooms, *more) == seen[0]
    (tmp_path / "emit" / "vit.py").write_text("SITE = 2")
    seen.append(cache.sources(rooms, *more))
    (tmp_path / "emit" / "vit.py").rename(tmp_path / "emit" / "vit2.py")
    seen.append(cache.sources(rooms, *more))
    (tmp_path / "names.py").write_text("IMAGE = 2")
    seen += [cache.sources(rooms, *more), cache.sources(rooms, *more, "10.0")]
    assert len({*seen}) == 5


def test_the_exporter_s_own_sources_are_in_every_key(monkeypatch):
    before = cache.key("weights", (64, 64), "fp16", "cpu-ne")
    assert before == cache.key("weights", (64, 64), "fp16", "cpu-ne")
    monkeypatch.setattr(cache, "exporter", lambda: "another one")
    assert cache.key("weights", (64, 64), "fp16", "cpu-ne") != before


def test_a_package_belongs_to_weights_size_and_precision():
    keys = {
        cache.key(weights, size, precision, compute)
        for weights in ("a", "b")
        for precision in ("fp16", "fp32")
        for compute in ("cpu-ne", "cpu-gpu")
        for size in ((64, 64), (64, 128), (128, 64))
    }
    assert len(keys) == 24
