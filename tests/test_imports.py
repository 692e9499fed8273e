"""Who imports whom, and when: no circles, and a cold start counted in modules, not in seconds."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from .tools.import_circles import circle, imports_of

ROOT = Path(__file__).parents[1]
PACKAGES = ("mlx_vlm_edge", "convert/mlx_vlm_edge_convert", "benchmarks/mlx_vlm_edge_bench")
HEAVY = {"transformers", "torch", "mlx_lm", "huggingface_hub", "coremltools", "timm", "requests"}
FIRST_BYTE_SECONDS = 1.0
LIST = "import json, sys; print(); print(json.dumps(sorted(sys.modules)))"


# What a conversion may use of the runtime; whatever is not here (a server, say) it may not.
OF_THE_CONVERTER = {
    "checkpoint", "connectors", "errors", "hub", "kernels", "language", "models", "paths",
    "picture", "system_files", "text", "timings", "vision", "whole_file", "wording",
}  # fmt: skip


@pytest.fixture(scope="module")
def imports():
    return imports_of(*(ROOT / package for package in PACKAGES))


def test_no_file_imports_itself_by_way_of_others(imports):
    assert {name.partition(".")[0] for name in imports} == {Path(name).name for name in PACKAGES}
    assert circle(imports) == []


@pytest.mark.parametrize(
    ("planted", "line", "reported"),
    [
        ("mlx_vlm_edge/errors.py", "from . import cli", "mlx_vlm_edge.errors"),
        (
            "convert/mlx_vlm_edge_convert/rules.py",
            "def late():\n    from .families import fastvlm",
            "mlx_vlm_edge_convert.rules",
        ),
        (
            "benchmarks/mlx_vlm_edge_bench/bench/figures.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import table",
            "mlx_vlm_edge_bench.bench.figures",
        ),
    ],
    ids=["plain", "inside a function", "for types only"],
)
def test_a_planted_circle_is_reported(tmp_path, planted, line, reported):
    for package in PACKAGES:
        only_python = shutil.ignore_patterns("__pycache__", "*.json", "*.safetensors", "*.html")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=only_python)
    with (tmp_path / planted).open("a") as file:
        file.write(f"\n{line}\n")
    script = ROOT / "tests" / "tools" / "import_circles.py"
    done = subprocess.run(
        [sys.executable, str(script), *PACKAGES],
        capture_output=True,
        cwd=tmp_path,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    around = done.stdout.strip().split(" imports ")
    assert around[0] == around[-1]
    assert reported in around


def test_the_converter_uses_the_parts_of_the_runtime_that_it_may(imports):
    used = {
        name.split(".")[1]
        for module, names in imports.items() if module.startswith("mlx_vlm_edge_convert")
        for name in names if name.startswith("mlx_vlm_edge.")
    }  # fmt: skip
    assert used <= OF_THE_CONVERTER


def test_a_family_is_imported_by_its_own_files_alone(imports):
    """docs/architecture.md promises that a new one touches nothing else."""
    from mlx_vlm_edge.models import FAMILIES

    families = {f"mlx_vlm_edge.models.{name}" for name in FAMILIES.values()}
    assert families <= imports.keys()
    exporters = {"mlx_vlm_edge_convert.coreml.parts.encoders"}
    others = {
        module: names & families
        for module, names in imports.items()
        if names & families and module not in exporters
        and not module.startswith(("mlx_vlm_edge.models.", "mlx_vlm_edge_convert.families."))
    }  # fmt: skip
    assert others == {}


def modules_after(code: str, **environment: str) -> set[str]:
    """The modules loaded in a fresh interpreter that ran `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{LIST}"],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


@pytest.fixture(scope="module")
def bare() -> set[str]:
    return modules_after("")


def command(*arguments: str) -> str:
    return f"""
from mlx_vlm_edge.cli import main
try:
    code = main({list(arguments)!r})
except SystemExit as ended:
    code = ended.code
assert code == 0, code
"""


def test_importing_the_package_is_free(bare):
    loaded = modules_after("import mlx_vlm_edge") - bare
    assert packages(loaded) & {"mlx", "numpy", "PIL", "tokenizers"} == set()
    assert len(loaded) < 20, loaded


def test_help_loads_nothing_but_the_parser(bare):
    loaded = modules_after(command("--help")) - bare
    assert packages(loaded) & ({"mlx", "numpy", "PIL", "tokenizers"} | HEAVY) == set()
    assert len(loaded) < 40, sorted(loaded)


def test_the_help_of_generate_loads_no_model_code(bare):
    loaded = modules_after(command("generate", "--help")) - bare
    assert packages(loaded) & ({"mlx", "numpy", "PIL", "tokenizers"} | HEAVY) == set()
    assert len(loaded) < 60, sorted(loaded)


@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
def test_generate_loads_no_heavy_package(native_folder, tmp_path, bare, image):
    from PIL import Image

    path = tmp_path / "picture.png"
    Image.new("RGB", (192, 192), "red").save(path)
    arguments = ["generate", "--model", str(native_folder), "--prompt", "Hi", "--max-tokens", "3"]
    arguments += ["--image", str(path)] if image else []
    loaded = modules_after(command(*arguments)) - bare
    assert packages(loaded) & HEAVY == set()
    assert not any(name.startswith("mlx_vlm_edge_convert") for name in loaded)
    assert not loaded & {"secrets", "difflib", "urllib.request", "jinja2", "asyncio"}
    assert len(loaded) < 370, len(loaded)


SERVE = """
import json, os, sys, threading, time, urllib.error, urllib.request
from mlx_vlm_edge.cli import main

def first_byte():
    while True:
        try:
            status = urllib.request.urlopen("http://127.0.0.1:{port}/health").status
        except urllib.error.HTTPError as error:
            status = error.code
        except OSError:
            time.sleep(0.01)
            continue
        taken = time.process_time()
        while status == 503:  # until the model is there, so that what it imports is seen
            time.sleep(0.01)
            try:
                status = urllib.request.urlopen("http://127.0.0.1:{port}/health").status
            except urllib.error.HTTPError:
                pass
        print(json.dumps([taken, status, sorted(sys.modules)]), flush=True)
        os._exit(0)

threading.Thread(target=first_byte).start()
main(["serve", "--model", "demo", "--port", "{port}"])
"""


def test_serve_loads_no_heavy_package_and_answers_at_once():
    """The first byte of /health costs processor time of this process alone, so no clock; the
    threads that load the model meanwhile are counted in."""
    pytest.importorskip("uvicorn", reason="serving is an extra")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", SERVE.replace("{port}", str(port))],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seconds, status, modules = json.loads(done.stdout)
    assert status == 200
    assert packages(set(modules)) & HEAVY == set()
    assert seconds < FIRST_BYTE_SECONDS


def test_a_published_folder_loads_no_heavy_package(hf_folder):
    code = f"from mlx_vlm_edge import load; load({str(hf_folder)!r})"
    assert packages(modules_after(code)) & HEAVY == set()


@pytest.mark.parametrize("name", ["load", "generate", "stream_generate", "UsageError"])
@pytest.mark.parametrize(
    "before",
    ["", "import mlx_vlm_edge.loading.load, mlx_vlm_edge.generation", "import mlx_vlm_edge.cli"],
)
def test_public_names_are_callables_whatever_was_imported_before(name, before):
    """No submodule may have a public function's name: importing it would take its place."""
    code = f"{before}\nfrom mlx_vlm_edge import {name}\nimport mlx_vlm_edge as p\n"
    modules_after(f"{code}assert callable({name}) and p.{name} is {name}")


def test_an_unknown_name_is_an_attribute_error():
    import mlx_vlm_edge

    with pytest.raises(AttributeError):
        mlx_vlm_edge.no_such_name  # noqa: B018
