"""Which package belongs to which checkpoint, size and exporter: another name, another package."""

import fcntl
import io
import json

import pytest
from mlx_vlm_edge_convert.coreml.run import cache

from mlx_vlm_edge.cli import main


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


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A cache with a package, one that is not described, and what a kill left."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    for name, size in {"aa": 3000, "bb": 2000, ".cc.partial": 1000}.items():
        (tmp_path / "cache" / name / "vision.mlpackage").mkdir(parents=True)
        (tmp_path / "cache" / name / "vision.mlpackage" / "weight.bin").write_bytes(bytes(size))
    for name in ("aa", ".cc.partial"):
        cache.describe(
            tmp_path / "cache" / name, model="apple/FastVLM-0.5B", size=(512, 1024),
            precision="fp16", compute="cpu-ne",
        )  # fmt: skip
    (tmp_path / "cache" / ".cc.lock").touch()
    return tmp_path / "cache"


def test_the_cache_is_listed(packages, capsys):
    assert main(["models", "list", "--coreml"]) == 0
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["aa", "bb", ".cc.partial"]
    assert "apple/FastVLM-0.5B, 1024x512, fp16, cpu-ne" in shown.out
    assert shown.out.count("unfinished, or of an older version") == 2
    assert shown.err == f"3 in {packages}\n"
    assert main(["models", "list", "--coreml", "--json"]) == 0
    first, second, _ = json.loads(capsys.readouterr().out)
    assert first["size"] == [512, 1024]
    assert first["bytes"] > 3000
    assert second == {"name": "bb", "bytes": 2000}


@pytest.mark.parametrize("about", ["", "7", "{}", "[" * 100_000, '{"size": [1]}', '{"size": 3}'])
def test_a_description_that_is_damaged_is_none(packages, about):
    (packages / "aa" / cache.ABOUT).write_text(about)
    entry = next(entry for entry in cache.entries() if entry.name == "aa")
    assert entry.description == "unfinished, or of an older version"


@pytest.mark.parametrize(
    ("name", "left"),
    [("aa", {"bb", ".cc.partial"}), ("apple/FastVLM-0.5B", {"bb", ".cc.partial"}),
     (".cc.partial", {"aa", "bb"}), (None, set())],
)  # fmt: skip
def test_packages_are_removed_by_name_or_all(packages, name, left, capsys):
    assert main(["models", "rm", "--coreml", "--yes", *([name] if name else [])]) == 0
    assert {path.name for path in packages.iterdir()} == left
    assert "removed" in capsys.readouterr().err


def test_what_another_process_writes_now_stays(packages):
    with (packages / ".cc.lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["models", "rm", "--coreml", "--yes"]) == 0
    assert {path.name for path in packages.iterdir()} == {".cc.lock", ".cc.partial"}


def test_what_is_not_there_is_one_line(packages, capsys, monkeypatch):
    assert main(["models", "rm", "--coreml", "dd", "--yes"]) == 2
    assert "dd is no package of" in capsys.readouterr().err
    assert main(["models", "rm"]) == 2
    assert "name the model to remove" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert main(["models", "rm", "--coreml"]) == 1
    assert len([*packages.iterdir()]) == 4
    monkeypatch.setenv(cache.VARIABLE, str(packages / "none"))
    assert main(["models", "list", "--coreml"]) == 0
    assert capsys.readouterr().out == ""
