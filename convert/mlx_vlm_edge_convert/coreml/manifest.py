"""manifest.json: what an app must know of a bundle, and the hash of every file in it.

docs/bundle.schema.json describes it key by key.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_vlm_edge.checkpoint.files import read_json
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.system_files import of_the_system

from ..save import save_json
from .names import PACKAGE_SUFFIX, TOKENS
from .package.interface import interface
from .package.malformed import reading
from .package.save import save_arrays
from .parity import Check
from .part import MINIMUM, Options, Part
from .parts.encoders import AppPixels
from .phones import budget

FORMAT = 2
NAME = "manifest.json"
UNITS = {"cpu-gpu": "cpuAndGPU", "cpu-ne": "cpuAndNeuralEngine"}  # Core ML's names
# What an app tries in turn, where a trial or a load fails: the Neural Engine's failures are silent.
FALLBACK = {"cpu-gpu": ("cpuOnly",), "cpu-ne": ("cpuAndGPU", "cpuOnly")}
TRIAL, DEVICE = "_trial.safetensors", 5e-2  # how far a device's results may be from what is in it
_KEYS = {"format", "model", "licence", "minimum_os", "parts", "tokens", "files"}
_PART_KEYS = {
    "package", "minimum_os", "functions", "precision", "compute_units", "fallback_units", "memory",
    "parity",
}  # fmt: skip
_PORTS = ("inputs", "outputs")
_TOKENS = {"ids", "token"}  # of a decoder's trial, which its host embeds and picks


def part_entry(
    part: Part, options: Options, package: Path, check: Check | None, findings: Any
) -> dict[str, Any]:
    """What the manifest says of one part. check: None where it was not verified."""
    parity = None
    if check is not None:
        parity = [
            {"inputs": p.inputs, "error": p.error, "limit": p.limit} for p in check.parity
        ]  # fmt: skip
    entry = {
        "package": package.name,
        "minimum_os": MINIMUM[part.minimum],
        "functions": interface(package),
        "precision": options.precision,
        "compute_units": UNITS[options.compute],
        "fallback_units": list(FALLBACK[options.compute]),
        "memory": {"package": _size(package), **part.memory()},
        "parity": parity,
        **part.describe(),
    }
    if check is not None:
        file = package.with_name(f"{part.name}{TRIAL}")
        ports = {port["name"] for name in _PORTS for port in _all(entry["functions"], name)}
        used = {name: x for name, x in check.trial.items() if name in ports | _TOKENS}
        save_arrays(used, file)
        entry["trial"] = {"file": file.name, "limit": DEVICE}
    if check is not None and check.ranges:
        entry["largest_activation"] = max(check.ranges.values())
    if findings is not None:
        entry["lint"] = findings
    return entry


def preprocessing_entry(pixels: AppPixels) -> dict[str, Any]:
    """How a picture becomes the vision part's input; mean and std are in its weights already."""
    return {
        "strategy": pixels.strategy,
        "height": pixels.size[0],
        "width": pixels.size[1],
        "fill": list(pixels.fill),
        "resample": "bicubic",
        "color": "RGB",
        "range": [0, 255],
        "folded": {"scale": 1 / 255, "mean": list(pixels.mean), "std": list(pixels.std)},
    }


def sizes_entry(
    pixels: Mapping[str, AppPixels], parts: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The sizes of pictures by function, that of the preprocessing first; each with its number of
    visual tokens, None where no package gives them."""
    return [
        {"function": name, "height": each.size[0], "width": each.size[1],
         "tokens": _visual_tokens(name, parts)}
        for name, each in pixels.items()
    ]  # fmt: skip


def _visual_tokens(function: str, parts: Mapping[str, Mapping[str, Any]]) -> int | None:
    every = (
        parts[name]["functions"][function] for name in ("vision", "connector") if name in parts
    )
    outputs = (port for each in every for port in each["outputs"] if port["name"] == TOKENS)
    return next((int(port["shape"][1]) for port in outputs), None)


def _all(functions: Mapping[str, Any], kind: str) -> Iterator[Any]:
    """The inputs, or outputs, of all functions."""
    for function in functions.values():
        yield from function[kind]


def _size(package: Path) -> int:
    return sum(path.stat().st_size for path in package.rglob("*") if path.is_file())


def minimum_os(parts: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What the most demanding part needs."""
    systems = [part["minimum_os"] for part in parts]
    return max(systems, key=lambda each: tuple(map(float, each.values())))


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Write manifest.json with the hashes of the files that are in the folder."""
    files = {path.relative_to(folder).as_posix(): digest(path) for path in _files(folder)}
    nbytes = sum((folder / name).stat().st_size for name in files)
    whole = {"format": FORMAT, **content, "memory": budget(nbytes), "files": files}
    save_json(folder / NAME, whole)


def listed(folder: Path) -> Collection[str]:
    """The files of a bundle by its manifest, which are what a later export may replace."""
    try:
        files = read_json(folder / NAME).get("files")
    except UsageError:
        return ()
    return {NAME, *files} if isinstance(files, Mapping) else ()


def _files(folder: Path) -> list[Path]:
    paths = (path for path in folder.rglob("*") if not of_the_system(path.name))
    return sorted(path for path in paths if path.is_file() and path != folder / NAME)


def digest(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: Path) -> dict[str, Any]:
    """A bundle's manifest, checked against its files.

    Raises UsageError for a manifest that is missing, malformed or of another format, a file that is
    missing, extra or changed, and a package whose inputs and outputs are not those it says.
    """
    path = folder / NAME
    with reading(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UsageError(f"{path}: not a bundle of format {FORMAT}; export it again")
        if lacking := _KEYS - content.keys():
            raise UsageError(f"{path}: lacks {min(lacking)}; export it again")
        _check_files(folder, content["files"])
        for name, part in content["parts"].items():
            _check_part(folder, name, part)
    return content


def _check_part(folder: Path, name: str, part: Mapping[str, Any]) -> None:
    path = folder / NAME
    if lacking := _PART_KEYS - part.keys():
        raise UsageError(f"{path}: {name} lacks {min(lacking)}; export it again")
    package = folder / part["package"]
    if package.parent != folder:
        raise UsageError(f"{path}: {part['package']} is no package beside it; export it again")
    if part["functions"] != interface(package):
        raise UsageError(f"{path}: {part['package']} has other inputs or outputs")


def _check_files(folder: Path, files: Mapping[str, str]) -> None:
    present = {path.relative_to(folder).as_posix() for path in _files(folder)}
    if odd := sorted(present ^ files.keys()):
        word = "is not in the manifest" if odd[0] in present else "is missing"
        raise UsageError(f"{folder / odd[0]} {word}; export it again")
    for name, expected in files.items():
        if digest(folder / name) != expected:
            raise UsageError(f"{folder / name} is not as it was exported; export it again")


def package_path(folder: Path, part: Part) -> Path:
    """Where a part's package is in a bundle."""
    return folder / f"{part.name}{PACKAGE_SUFFIX}"
