"""Apple's chips, by name: "m1-max", "m1-max-24" for one of fewer GPU cores, "Apple M1 Max".

`chips.json` has every figure with a tag (A Apple's, M measured, S stated, U unconfirmed, D derived)
and the keys of its sources. A derived figure is per GPU core; the ceilings are those of FP16.
"""

import difflib
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlx_vlm_edge.checkpoint.files import read_json
from mlx_vlm_edge.errors import UsageError

_FILE = Path(__file__).parent / "chips.json"
_USED = {
    "gpu_cores": "GPU cores",
    "fp32_tflops_per_core": "GPU clock",
    "matrix_tflops_per_core": "matrix units",
    "bandwidth_gbs": "bandwidth",
}
_OLDER = ("m1", "m2", "a15", "a16")  # whose quantised matmuls are further below the plain ones


@dataclass(frozen=True)
class Chip:
    """fp32, matrix: TFLOPS of the GPU's arithmetic units and, None where it has none, of its
    matrix units. bandwidth: GB/s. memory: GB, every size sold. neural_engine: TFLOPS in FP16.

    unconfirmed: which of the figures that an estimate uses are.
    """

    id: str
    name: str
    cores: int
    fp32: float
    matrix: float | None
    bandwidth: float
    memory: tuple[int, ...]
    neural_engine: float | None
    unconfirmed: tuple[str, ...]

    @property
    def older(self) -> bool:
        """Whether quantised matmuls lose as much as they do on the M1 and M2 families."""
        return self.id.split("-")[0] in _OLDER


@cache
def _data() -> Mapping[str, Any]:
    return read_json(_FILE)


def sources() -> Mapping[str, str]:
    """Key -> where a figure is from."""
    origins: Mapping[str, str] = _data()["sources"]
    return origins


def figures(identity: str) -> Mapping[str, Any]:
    """All figures of a chip, each with its tag and sources."""
    entry: Mapping[str, Any] = _data()["chips"][identity]
    return entry


def tags() -> Mapping[str, str]:
    """Letter -> what it says of a figure."""
    meanings: Mapping[str, str] = _data()["tags"]
    return meanings


def known() -> list[Chip]:
    """Every chip in its largest variant."""
    return [_chip(identity, None) for identity in _data()["chips"]]


def find(name: str) -> Chip:
    """The chip of a name; of several variants the largest unless the name ends in GPU cores.

    find("m1-max"), find("m1-max-24"), find("Apple M1 Max"). Raises UsageError with near matches
    for a name that is not known.
    """
    identity = re.sub(r"[\s_]+", "-", name.strip().lower()).removeprefix("apple-")
    identity = re.sub(r"-(?:bionic|gpu)\b", "", identity)
    data = _data()["chips"]
    if identity in data:
        return _chip(identity, None)
    base, _, cores = identity.rpartition("-")
    if base in data and cores.isdigit():
        options = data[base]["gpu_cores"]["value"]
        if int(cores) not in options:
            raise UsageError(
                f"no {data[base]['name']} has {cores} GPU cores; known are "
                f"{', '.join(map(str, options))}"
            )
        return _chip(base, int(cores))
    near = difflib.get_close_matches(identity, data, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(data)}"
    raise UsageError(f"no figures of a chip called {name[:40]!r}; {meant}")


def _chip(identity: str, cores: int | None) -> Chip:
    entry = figures(identity)
    count = cores or max(entry["gpu_cores"]["value"])
    matrix = entry.get("matrix_tflops_per_core")
    bandwidth = _bandwidth(entry["bandwidth_gbs"], count)
    engine = entry.get("neural_engine_fp16_tflops")
    doubtful = {key: entry[key]["tag"] == "U" for key in _USED if key in entry and key[0] != "b"}
    doubtful["bandwidth_gbs"] = bandwidth["tag"] == "U"
    largest = count == max(entry["gpu_cores"]["value"])
    return Chip(
        id=identity if largest else f"{identity}-{count}",
        name=f"{entry['name']}, {count} GPU cores",
        cores=count,
        fp32=count * entry["fp32_tflops_per_core"]["value"],
        matrix=count * matrix["value"] if matrix else None,
        bandwidth=bandwidth["value"],
        memory=tuple(entry["memory_gb"]["value"]),
        neural_engine=engine["value"] if engine else None,
        unconfirmed=tuple(_USED[key] for key, is_so in doubtful.items() if is_so),
    )


def _bandwidth(options: list[dict[str, Any]], cores: int) -> dict[str, Any]:
    """The entry for so many GPU cores, the only one where they do not matter."""
    return next((o for o in options if o.get("gpu_cores") == cores), options[-1])


def own() -> Chip:
    """This machine's chip, by its brand string; the largest variant of it.

    Raises UsageError where that cannot be told, or is no chip of Apple's.
    """
    try:
        answer = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"],
            capture_output=True,
            text=True,
            check=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        raise UsageError(
            "this machine is no Mac: name a chip, --chip m1-max (see --chips)"
        ) from None
    brand = answer.stdout.strip()
    if not brand.startswith("Apple "):
        raise UsageError(
            f"this machine has {brand or 'no name'} and no chip of Apple's: name a "
            "chip, --chip m1-max (see --chips)"
        )
    return find(brand)
