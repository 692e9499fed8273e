"""`doctor`: what is essential, what can be done without, and the commands that mend either."""

import json
import shlex
import sys
from types import SimpleNamespace

import pytest

from mlx_vlm_edge.cli import main
from mlx_vlm_edge.doctor import checks
from mlx_vlm_edge.doctor.checks import Check

DECLARED = [
    "numpy>=1.26",
    "nobody-has-this>=2; sys_platform == 'nowhere'",
    "missing-one>=3; extra == 'pdf'",
    "numpy>=1.26; extra == 'video'",
    "missing-two; extra == 'schema'",
    "mlx-vlm-edge[schema]; extra == 'serve'",
    "missing-three>=1; extra == 'serve'",
    "numpy>=999; extra == 'heic'",
    "missing-for-us; extra == 'dev'",
]


def test_extras_are_the_package_s_own_and_name_what_pypi_has():
    told = {check.name: check for check in checks.extras(DECLARED)}
    assert told["[video]"].state == "ok"
    assert {name for name, check in told.items() if check.state == "optional"} == {
        "[pdf]", "[schema]", "[serve]", "[heic]",
    }  # fmt: skip
    command = shlex.split(told["[serve]"].mend)
    assert command[1:] == ["-m", "pip", "install", "missing-two", "missing-three>=1"]
    assert "'numpy>=999'" in told["[heic]"].mend
    assert "mlx-vlm-edge" not in "".join(check.mend for check in told.values())


def test_a_package_that_is_needed_and_missing_is_wrong(monkeypatch):
    monkeypatch.setattr(checks, "requires", lambda _: [*DECLARED, "missing-four>=1"])
    (check,) = checks._packages()
    assert (check.state, check.said) == ("wrong", "missing-four missing or too old")
    monkeypatch.setattr(checks, "requires", lambda _: DECLARED)
    (check,) = checks._packages()
    assert check.state == "ok"


@pytest.mark.parametrize(
    ("running", "system", "machine", "state"),
    [
        ((3, 12), "Darwin", "arm64", "ok"),
        ((3, 12), "Darwin", "x86_64", "wrong"),
        ((3, 10), "Linux", "x86_64", "wrong"),
        ((3, 11), "Linux", "x86_64", "ok"),
    ],
)
def test_python(running, system, machine, state):
    assert checks._python(running, system, machine).state == state


def test_blas():
    assert checks._blas("fast: /usr/lib/libopenblas.so.0").state == "ok"
    assert checks._blas("not used: MLX has a fast BLAS here").state == "ok"
    slow = checks._blas("stock: no library found (on Debian: apt install x)")
    assert (slow.state, slow.said) == ("optional", "stock: no library found")
    assert slow.mend.startswith("apt install libopenblas0-pthread")


def test_a_full_disk_and_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    folder = tmp_path / "not" / "yet"
    assert checks._disk(folder, lambda _: SimpleNamespace(free=1e9)).state == "optional"
    assert checks._disk(folder, lambda _: SimpleNamespace(free=1e11)).state == "ok"
    assert checks._cache(folder).state == "ok"
    monkeypatch.setattr(checks.os, "access", lambda *_: False)
    assert checks._cache(folder).state == "wrong"


def test_a_model_in_the_cache_that_is_not_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--apple--FastVLM-0.5B").mkdir()
    told = checks._cache(tmp_path)
    assert told.state == "optional"
    assert told.mend == "mlx-vlm-edge models pull apple/FastVLM-0.5B"


def test_a_demo_model_without_its_weights(tmp_path):
    assert checks._demo(tmp_path).state == "wrong"


def test_mlx_that_does_not_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    told = checks._mlx()
    assert (told.state, bool(told.mend)) == ("wrong", True)


def test_doctor_here(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "WRONG" not in shown
    assert "ok    demo model" in shown
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"]
    assert told["machine"]["memory_bytes"] > 1e9
    assert {"Python", "MLX", "BLAS", "memory", "disk"} <= {row["name"] for row in told["checks"]}


def test_what_is_wrong_is_the_exit_code(capsys, monkeypatch):
    told = [Check("MLX", "wrong", "no", "install it"), Check("[pdf]", "optional", "no", "pip")]
    monkeypatch.setattr(checks, "checks", lambda: told)
    assert main(["doctor"]) == 1
    assert "WRONG MLX    no\n             install it\n" in capsys.readouterr().out
    monkeypatch.setattr(checks, "checks", lambda: told[1:])
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]


def test_report_without_a_model(capsys):
    assert main(["doctor", "--report", "x.json"]) == 2
    assert "name a model" in capsys.readouterr().err
