"""The machine and the installation -> a line for each part: there, or missing with what mends it.

Nothing is loaded but MLX; what a system does not tell is left out.
"""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import blas
from ..checkpoint.files import lacking
from ..errors import UsageError
from ..hub.cache import cache_folder, cached_models
from ..hub.models import ALIASES, DEMO, locate
from ..loading.memory import free_memory
from ..wording import first_line, gigabytes, some

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PACKAGE = "mlx-vlm-edge"
PYTHON = (3, 11)
ROOM = 2e9  # bytes of disk below which the smallest real model does not come
EXTRAS = {
    "coreai": "export to Core AI",
    "chat": "`chat` at a terminal",
    "coreml": "`export`, and --vision-backend coreml",
    "cuda": "NVIDIA GPUs",
    "heic": "photos of iPhones",
    "pdf": "pages of PDFs",
    "schema": "answers that follow a schema",
    "serve": "`serve`",
    "video": "films",
}
State = Literal["ok", "optional", "wrong"]


@dataclass(frozen=True)
class Check:
    """What was looked at: "wrong" is essential, "optional" can be done without. mend: a command."""

    name: str
    state: State
    said: str
    mend: str = ""


def checks() -> list[Check]:
    """All of them, in the order in which they are told."""
    return [
        _python(sys.version_info[:2], platform.system(), platform.machine()),
        *_packages(),
        _mlx(),
        _blas(blas.status()),
        _memory(free_memory()),
        _cache(cache_folder()),
        _disk(cache_folder()),
        _demo(locate(DEMO)),
        *extras(),
    ]


def _python(running: Sequence[int], system: str, machine: str) -> Check:
    said = f"{'.'.join(map(str, running))} for {machine}"
    if tuple(running) < PYTHON:
        return Check("Python", "wrong", said, "install Python 3.11 or newer")
    if system == "Darwin" and machine != "arm64":
        mend = "install Python for Apple silicon: this one runs under Rosetta, where MLX cannot"
        return Check("Python", "wrong", said, mend)
    return Check("Python", "ok", said)


def _packages() -> Iterator[Check]:
    """What the package itself asks for."""
    try:
        declared = requires(PACKAGE) or []
    except PackageNotFoundError:
        yield Check("packages", "optional", f"{PACKAGE} is not installed", "pip install -e .")
        return
    lacking = [item for item in _parsed(declared, "") if not _installed(item)]
    if lacking:
        yield Check("packages", "wrong", f"{_names(lacking)} missing or too old", _pip(lacking))
    else:
        yield Check("packages", "ok", "all that it needs are here")


def extras(declared: Sequence[str] | None = None) -> Iterator[Check]:
    """One for each optional part, with the command that installs what it lacks."""
    if declared is None:
        try:
            declared = requires(PACKAGE) or []
        except PackageNotFoundError:
            return
    for extra, purpose in EXTRAS.items():
        parts = list(_parsed(declared, extra))
        lacking = [item for item in parts if not _installed(item)]
        if lacking:
            yield Check(f"[{extra}]", "optional", f"not here, for {purpose}", _pip(lacking))
        elif parts:
            yield Check(f"[{extra}]", "ok", purpose)


def _parsed(declared: Iterable[str], extra: str) -> "Iterator[Requirement]":
    """The requirements of one extra on this system, those of the extras that it names as well.

    extra: "" for what is always needed.
    """
    from packaging.requirements import Requirement

    for text in declared:
        item = Requirement(text)
        marker = item.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if always != (not extra) or (marker and not marker.evaluate({"extra": extra})):
            continue
        if item.name == PACKAGE:
            for other in sorted(item.extras):
                yield from _parsed(declared, other)
        else:
            yield item


def _installed(item: "Requirement") -> bool:
    """Whether a package is here in a version that will do; of mlx[cuda] its back end's as well."""
    names = [item.name, *(f"{item.name}-{extra}" for extra in item.extras)]
    try:
        versions = [version(name) for name in names]
    except PackageNotFoundError:
        backends = [f"{item.name}-cuda-{n}" for n in (12, 13)] if item.extras == {"cuda"} else []
        return any(_has(name) for name in backends)
    return item.specifier.contains(versions[0], prereleases=True)


def _has(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def _names(items: "Sequence[Requirement]") -> str:
    return some(item.name for item in items)


def _pip(items: "Sequence[Requirement]") -> str:
    """A command that installs packages by the names that they have on PyPI."""
    named = []
    for item in items:
        chosen = f"[{','.join(sorted(item.extras))}]" if item.extras else ""
        named.append(f"'{item.name}{chosen}{item.specifier}'")
    return f"{Path(sys.executable).name} -m pip install {' '.join(named)}"


def _mlx() -> Check:
    """Whether MLX can be imported, and computes on its device."""
    try:
        import mlx.core as mx

        device = "CPU" if mx.default_device() == mx.Device(mx.DeviceType.cpu) else "GPU"
        right = bool((mx.ones((2, 3)) @ mx.ones((3, 2)) == 3).all().item())
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        return Check(
            "MLX", "wrong", first_line(error), "python -m pip install --force-reinstall mlx"
        )
    said = f"{version('mlx')} on the {device}"
    if not right:
        return Check("MLX", "wrong", f"{said} computes wrongly", f"{PACKAGE} doctor --selftest")
    if sys.platform == "darwin" and device == "CPU":
        mend = "run it outside of a virtual machine: Metal sees no GPU here"
        return Check("MLX", "wrong", said, mend)
    return Check("MLX", "ok", said)


def _blas(status: str) -> Check:
    """A CPU without a fast BLAS works, some forty times slower."""
    said, _, why = status.partition(": ")
    if said != "stock" or "off" in why:
        return Check("BLAS", "ok", status)
    mend = "apt install libopenblas0-pthread, or what has cblas_sgemm here"
    return Check("BLAS", "optional", f"stock: {why.partition(' (')[0]}", mend)


def _memory(free: int | None) -> Check:
    return Check("memory", "ok", f"{gigabytes(free)} free" if free else "the system does not tell")


def _cache(folder: Path) -> Check:
    """The Hub cache: whether it can be written, and what of ours is in it."""
    near = next(part for part in (folder, *folder.parents) if part.exists())
    if not os.access(near, os.W_OK):
        mend = "export HF_HUB_CACHE=FOLDER names one that can be written"
        return Check("Hub cache", "wrong", f"{folder} cannot be written", mend)
    models = list(cached_models(ALIASES.values()))
    broken = [model.repo for model in models if not model.complete]
    if broken:
        said = f"{folder}: {some(broken)} not all here"
        return Check("Hub cache", "optional", said, f"{PACKAGE} models pull {sorted(broken)[0]}")
    return Check("Hub cache", "ok", f"{folder}: models in it: {len(models)}")


def _disk(folder: Path, usage: Callable[[Path], Any] = shutil.disk_usage) -> Check:
    near = next(part for part in (folder, *folder.parents) if part.exists())
    free = usage(near).free
    said = f"{gigabytes(free)} free for models"
    if free < ROOM:
        mend = f"{PACKAGE} models rm NAME, or export HF_HUB_CACHE=FOLDER on another disk"
        return Check("disk", "optional", said, mend)
    return Check("disk", "ok", said)


def _demo(folder: Path) -> Check:
    """The bundled model: a damaged installation shows here."""
    try:
        reason = lacking(folder)
    except UsageError as error:
        reason = str(error)
    if reason:
        return Check("demo model", "wrong", reason, "install the package again")
    return Check("demo model", "ok", "bundled and whole")


def lines(machine: str, told: Sequence[Check]) -> Iterator[str]:
    """For people: the machine, then each check, what mends it below."""
    yield machine
    signs: Mapping[State, str] = {"ok": "ok", "optional": "-", "wrong": "WRONG"}
    width = max(len(check.name) for check in told)
    for check in told:
        yield f"{signs[check.state]:6}{check.name:{width}}  {check.said}"
        if check.mend:
            yield f"{'':{width + 8}}{check.mend}"
