"""A fast matrix library for MLX's CPU back end on Linux, loaded before MLX is.

MLX's Linux wheel brings the reference BLAS, which is some forty times slower than OpenBLAS or MKL.
The first `cblas_sgemm` in the process's global scope wins, so whoever exports one must be loaded
globally before `mlx.core`. `mlx_vlm_edge/__init__.py` calls `prepare`. Nothing to do on macOS.
"""

import _ctypes
import ctypes
import os
import sys
from typing import NamedTuple

from .errors import UsageError

VARIABLE = "MLX_VLM_EDGE_BLAS"  # "off", or a library's path or name
SYMBOL = "cblas_sgemm"
# Bytes. OpenBLAS maps buffers for every thread as it is loaded, and tries for ever where it cannot.
LEAST_ADDRESS_SPACE = 2 << 30
CORE = "OPENBLAS_CORETYPE"  # its own variable
OLDEST = (b"Prescott", b"Core2", b"Nehalem")
CORES = {
    "SkylakeX": {b"avx512f", b"avx512dq", b"avx512bw", b"avx512vl", b"avx512cd"},
    "Haswell": {b"avx2", b"fma"},
}
# pip and conda put these beside Python; the pip wheel `mkl` is the fastest where it is installed.
BESIDE_PYTHON = ("libmkl_rt.so.", "libopenblas.so.0")
# Debian's and Arch's name, Fedora's with threads, the development package's.
BY_NAME = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so")


class Blas(NamedTuple):
    """What MLX computes float32 matmuls with: a short line, and the user's mistake if any."""

    status: str
    mistake: str = ""


_blas = Blas("not loaded yet")


class _Symbol(ctypes.Structure):
    """Dl_info of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _home(library: ctypes.CDLL) -> str:
    """The file that SYMBOL comes from when it is looked up in a library; "" when it is not there.

    ctypes.CDLL(None) is the process's global scope, where MLX looks first.
    """
    try:
        function = getattr(library, SYMBOL)
        lookup = ctypes.CDLL(None).dladdr
    except AttributeError:
        return ""
    symbol = _Symbol()
    lookup(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(symbol))
    return os.path.realpath(os.fsdecode(symbol.file or b""))


def _load(name: str) -> str:
    """Load a library for the whole process if it exports SYMBOL -> its file, or "" if not."""
    try:
        library = ctypes.CDLL(name)
        if not (home := _home(library)):
            return ""
        core = better_core(library)
        if core:
            _ctypes.dlclose(library._handle)
            os.environ[CORE] = core
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        finally:
            if core:
                del os.environ[CORE]  # it is read as the library is loaded
        return home
    except OSError:
        return ""


def better_core(library: ctypes.CDLL) -> str:
    """What an OpenBLAS is to take this processor for; "" where it knows it, or is told.

    One that is older than the processor takes it for the oldest there is, whose kernels are five
    times slower: 0.3.21, Debian 12's, a Xeon of 2024.
    """
    if CORE in os.environ or not hasattr(library, "openblas_get_corename"):
        return ""
    library.openblas_get_corename.restype = ctypes.c_char_p
    if library.openblas_get_corename() not in OLDEST:
        return ""
    try:
        with open("/proc/cpuinfo", "rb") as cpus:
            flags = set(next((line for line in cpus if line.startswith(b"flags")), b"").split())
    except OSError:
        return ""
    return next((core for core, needed in CORES.items() if needed <= flags), "")


def _candidates() -> list[str]:
    folder = os.path.join(sys.prefix, "lib")
    files = sorted(os.listdir(folder), reverse=True) if os.path.isdir(folder) else []
    beside = [file for name in BESIDE_PYTHON for file in files if file.startswith(name)]
    return [os.path.join(folder, file) for file in beside] + list(BY_NAME)


def _address_space() -> float:
    """Bytes that this process may map. (The module for it would be one more to import.)"""
    try:
        with open("/proc/self/limits", "rb") as limits:
            line = next(line for line in limits if line.startswith(b"Max address space"))
    except (OSError, StopIteration):
        return float("inf")
    limit = line.split()[3]
    return float("inf") if limit == b"unlimited" else float(limit)


def _choose() -> Blas:
    if sys.platform != "linux":
        return Blas("not used: MLX has a fast BLAS here")
    if _address_space() < LEAST_ADDRESS_SPACE:
        return Blas("stock: the address space is too small for another's buffers (see ulimit -v)")
    setting, mlx_is_there = os.environ.get(VARIABLE, ""), "mlx.core" in sys.modules
    present = _home(ctypes.CDLL(None))
    if present and (os.environ.get("LD_PRELOAD") or not mlx_is_there):
        return Blas(f"loaded before us: {present}")
    if setting == "off":
        return Blas("stock: off")
    if mlx_is_there:
        return Blas("stock: mlx was imported first")
    for name in [setting] if setting else _candidates():
        if home := _load(name):
            return Blas(f"fast: {home}")
    if setting:
        mistake = f"{VARIABLE}={setting}: no library that exports {SYMBOL}; name another, or off"
        return Blas(f"stock: {setting} cannot be used", mistake)
    return Blas("stock: no library found (on Debian: apt install libopenblas0-pthread)")


def prepare() -> None:
    """Load the library named by $MLX_VLM_EDGE_BLAS, or else the first that is found."""
    global _blas
    _blas = _choose()


def status() -> str:
    """One line for benchmark records: "fast: FILE", "loaded before us: FILE" or "stock: why"."""
    return _blas.status


def check() -> None:
    """Raises UsageError when $MLX_VLM_EDGE_BLAS names no usable library."""
    if _blas.mistake:
        raise UsageError(_blas.mistake)
