"""What the figures were measured on: chip, memory, system, versions, back end, load, commit.

Nothing here is fatal: what a system does not tell is None.
"""

import os
import platform
import re
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlx_vlm_edge import __version__, blas
from mlx_vlm_edge.loading.memory import Ask, ask, total_memory

PACKAGES = ("mlx", "mlx-metal", "mlx-cpu", "mlx-lm", "numpy", "pillow", "tokenizers")
THREADS = (
    "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
    "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE",
)  # fmt: skip
BUSY = 0.5  # of the cores' time, from which figures are not to be trusted
CHECKOUT = Path(__file__).parents[3]


def record(ask: Ask = ask, system: str = platform.system()) -> dict[str, Any]:
    """The machine and the software, as the JSON record has them."""
    hardware = _mac(ask) if system == "Darwin" else _linux(_read("/proc/cpuinfo"))
    return {
        **hardware,
        "cores": os.cpu_count(),
        "memory_bytes": total_memory(ask, system),
        "os": _system(system),
        "python": platform.python_version(),
        "mlx_vlm_edge": __version__,
        "versions": _versions(),
        "commit": _commit(ask),
        **_backend(),
        "blas": blas.status(),
        "threads": {name: os.environ[name] for name in THREADS if name in os.environ},
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def load_average() -> float | None:
    """Of the last minute."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def same_chip(chip: str | None, claimed: str | None) -> bool:
    """Whether a machine's chip is the one of a claim: "Apple M1 Max" is "M1 Max", not "M1"."""
    return bool(chip and claimed) and str(chip).removeprefix("Apple ").strip() == claimed


def summary(machine: Mapping[str, Any]) -> str:
    """One line for people."""
    gpu = f", {machine['gpu_cores']} GPU cores" if machine.get("gpu_cores") else ""
    memory = machine.get("memory_bytes")
    parts = [
        f"{machine['chip'] or 'unknown chip'} ({machine['cores']} cores{gpu})",
        f"{memory / 2**30:.0f} GB" if memory else "",
        machine["os"],
        f"Python {machine['python']}",
        f"MLX {machine['versions'].get('mlx', '?')} on the {machine['device']}",
        f"mlx-vlm-edge {machine['mlx_vlm_edge']}",
        f"BLAS {_short(machine['blas'])}" if machine["device"] == "CPU" else "",
    ]
    return ", ".join(part for part in parts if part)


def _short(blas: str) -> str:
    """ "fast: /usr/lib/libopenblas.so.0" -> "fast: libopenblas.so.0"."""
    said, _, file = blas.partition(": ")
    return f"{said}: {file.rsplit('/', 1)[-1]}" if file.startswith("/") else blas


def busy(load: float | None, cores: int | None) -> str:
    """A warning when others use the machine as well; "" when they do not."""
    if load is None or not cores or load <= cores * BUSY:
        return ""
    return f"note: the load average is {load} on {cores} cores: on a quiet machine runs spread less"


def _mac(ask: Ask) -> dict[str, Any]:
    cores = re.search(r'"gpu-core-count"\s*=\s*(\d+)', ask(["ioreg", "-rc", "AGXAccelerator"]))
    return {
        "chip": ask(["sysctl", "-n", "machdep.cpu.brand_string"]) or None,
        "model": ask(["sysctl", "-n", "hw.model"]) or None,
        "gpu_cores": int(cores[1]) if cores else None,
    }


def _linux(cpuinfo: str) -> dict[str, Any]:
    line = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return {"chip": line[1].strip() if line else platform.machine() or None}


def _system(system: str) -> str:
    if system == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{system} {platform.release()}"


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _commit(ask: Ask) -> str | None:
    """Of the checkout the package is run from, with a + when files differ from it."""
    if not (CHECKOUT / ".git").exists():
        return None
    git = ["git", "-C", str(CHECKOUT)]
    commit = ask([*git, "rev-parse", "--short=10", "HEAD"])
    changed = ask([*git, "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}{'+' if changed else ''}" if commit else None


def _backend() -> dict[str, Any]:
    import mlx.core as mx

    gpu = mx.default_device() != mx.Device(mx.DeviceType.cpu)
    described = {key: value for key, value in mx.device_info().items() if key != "resource_limit"}
    return {"device": "GPU" if gpu else "CPU", "device_details": described}


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
