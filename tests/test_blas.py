"""Which matrix library MLX calls, proved with one that answers 7 to everything."""

import ctypes
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_vlm_edge import blas

SEVENS = """
void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a,
                 int lda, const float *b, int ldb, float beta, float *c, int ldc) {
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) c[i * ldc + j] = 7;
}
"""
MULTIPLY = """
import mlx.core as mx
mx.set_default_device(mx.cpu)
print((mx.ones((8, 4)) @ mx.ones((4, 8)))[0, 0].item())
"""
OURS = "import mlx_vlm_edge; print(mlx_vlm_edge.blas.status())\n"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MLX brings a fast BLAS elsewhere")


@pytest.fixture(scope="module")
def sevens(tmp_path_factory) -> str:
    if not (compiler := shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("no C compiler to make a library with")
    source = tmp_path_factory.mktemp("blas") / "sevens.c"
    source.write_text(SEVENS)
    library = source.with_suffix(".so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    bare = {key: value for key, value in os.environ.items() if key != blas.VARIABLE}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=bare | environment,
        check=False,
    )


def lines(code: str, **environment: str) -> list[str]:
    done = python("-c", code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_named_library_does_the_matmuls(sevens):
    status, result = lines(OURS + MULTIPLY, MLX_VLM_EDGE_BLAS=sevens)
    assert status == f"fast: {sevens}"
    assert result == "7.0"


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> str:
    """An OpenBLAS that does not know the processor, until it is told as it is loaded."""
    if not (compiler := shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("no C compiler to make a library with")
    source = tmp_path_factory.mktemp("blas") / "old.c"
    source.write_text(f"""#include <stdlib.h>
static const char *core;
__attribute__((constructor)) static void look(void) {{
  core = getenv("OPENBLAS_CORETYPE");
  if (!core) core = "Prescott";
}}
const char *openblas_get_corename(void) {{ return core; }}
{SEVENS}""")
    library = source.with_suffix(".so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


CORE_OF = """
import ctypes, os
library = ctypes.CDLL(os.environ["MLX_VLM_EDGE_BLAS"])
library.openblas_get_corename.restype = ctypes.c_char_p
print(library.openblas_get_corename().decode(), os.environ.get("OPENBLAS_CORETYPE"))
"""


def test_a_library_older_than_the_processor_is_told_what_it_is(old, monkeypatch):
    """And the environment is left as it was, for what else is started."""
    monkeypatch.delenv(blas.CORE, raising=False)
    best = blas.better_core(ctypes.CDLL(old))
    status, result, core = lines(OURS + MULTIPLY + CORE_OF, MLX_VLM_EDGE_BLAS=old)
    assert (status, float(result)) == (f"fast: {old}", 7)
    assert core == f"{best or 'Prescott'} None"
    *_, core = lines(OURS + CORE_OF, MLX_VLM_EDGE_BLAS=old, OPENBLAS_CORETYPE="Zen")
    assert core == "Zen Zen"


def test_the_newest_instructions_decide(old, monkeypatch):
    library = ctypes.CDLL(old)
    monkeypatch.delenv(blas.CORE, raising=False)
    for flags, core in (
        (b"flags : fma avx2 avx512f avx512dq avx512bw avx512vl avx512cd", "SkylakeX"),
        (b"flags : fma avx2 avx512f", "Haswell"),
        (b"flags : sse2", ""),
        (b"Features : asimd", ""),
    ):
        monkeypatch.setattr("builtins.open", lambda *_, flags=flags: io.BytesIO(flags + b"\n"))
        assert blas.better_core(library) == core


def test_off_loads_nothing(sevens):
    assert lines(OURS + MULTIPLY, MLX_VLM_EDGE_BLAS="off") == ["stock: off", "4.0"]


def test_it_is_too_late_once_mlx_is_there(sevens):
    first, status, second = lines(MULTIPLY + OURS + MULTIPLY, MLX_VLM_EDGE_BLAS=sevens)
    assert status == "stock: mlx was imported first"
    assert first == second == "4.0"


@pytest.mark.parametrize("before", ["", "import mlx.core\n"])
@pytest.mark.parametrize("setting", [{}, {"MLX_VLM_EDGE_BLAS": "off"}])
def test_a_preloaded_library_is_told(sevens, before, setting):
    status, result = lines(before + OURS + MULTIPLY, LD_PRELOAD=sevens, **setting)
    assert status == f"loaded before us: {sevens}"
    assert result == "7.0"


def test_without_a_setting_a_library_of_this_machine_is_taken():
    status, result = lines(OURS + MULTIPLY)
    assert result == "4.0"
    if status.startswith("fast: "):
        assert Path(status.removeprefix("fast: ")).is_file()
    else:
        assert status.startswith("stock: no library found")


def test_the_one_beside_python_comes_first(sevens, tmp_path):
    """The `mkl` wheel puts its library there."""
    beside = tmp_path / "lib" / "libmkl_rt.so.3"
    beside.parent.mkdir()
    shutil.copy(sevens, beside)
    status, _ = lines(f"import sys; sys.prefix = {str(tmp_path)!r}\n{OURS}{MULTIPLY}")
    assert status == f"fast: {beside}"


def test_nothing_found_says_what_to_install(monkeypatch):
    monkeypatch.setattr(blas, "_candidates", list)
    monkeypatch.setattr(blas, "_home", lambda library: "")
    monkeypatch.delenv(blas.VARIABLE, raising=False)
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    assert "apt install libopenblas0-pthread" in blas._choose().status


def test_macos_needs_none(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert blas._choose().status.startswith("not used")


@pytest.mark.parametrize("name", ["/no/such/library.so", "libc.so.6", __file__])
def test_a_setting_that_cannot_be_used_is_one_clear_line(name):
    status, result = lines(OURS + MULTIPLY, MLX_VLM_EDGE_BLAS=name)
    assert status == f"stock: {name} cannot be used"
    assert result == "4.0"
    done = python("-m", "mlx_vlm_edge", "generate", "--prompt", "x", MLX_VLM_EDGE_BLAS=name)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"mlx-vlm-edge: error: MLX_VLM_EDGE_BLAS={name}: no library that exports cblas_sgemm; "
        "name another, or off"
    ]
    code = "import mlx_vlm_edge as m\ntry: m.load('x')\nexcept m.UsageError as e: print(e)"
    assert lines(code, MLX_VLM_EDGE_BLAS=name)[0].startswith(f"MLX_VLM_EDGE_BLAS={name}")
    assert python("-m", "mlx_vlm_edge", "--help", MLX_VLM_EDGE_BLAS=name).returncode == 0


def test_no_process_is_started_to_find_one():
    code = (
        "import sys\n"
        "def watch(event, _):\n"
        "    assert event not in ('subprocess.Popen', 'os.system', 'os.posix_spawn', 'os.fork')\n"
        f"sys.addaudithook(watch)\n{OURS}"
    )
    assert len(lines(code)) == 1


def test_no_library_is_loaded_into_a_small_address_space(sevens):
    """OpenBLAS would try for ever to map its buffers."""
    program = [sys.executable, "-c", OURS]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -v 1500000; exec "$@"', "sh", *program],
        env=os.environ | {blas.VARIABLE: sevens},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("stock: the address space is too small")
