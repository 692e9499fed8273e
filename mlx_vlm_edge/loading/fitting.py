"""A model's name, its settings and a limit of memory -> nothing, or a refusal with what would fit.

Asked before anything is read, and before anything is fetched where the config is shipped.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..checkpoint.files import read_whole, weight_files
from ..errors import UsageError
from ..hub.cache import usable_snapshot
from ..hub.models import ALIASES, DEMO, PYTORCH, expanded, obtain, repo_id
from ..wording import gigabytes
from .load import LoadOptions

if TYPE_CHECKING:
    from .cost import Blueprint

Size = tuple[int, int]  # width, height
LARGE = 2400  # pixels of a side, of which no family makes more tokens than of fewer
BUFFERS = 1 << 30  # bytes of freed buffers that MLX may keep for reuse
PLAINLY = 4  # times the bytes of its weights, in which any model fits: float32 of 16 bits, and more


def limit_buffers(limit: int | None = None) -> None:
    """Have MLX keep no more than 1 GiB of freed buffers, and take no more than `limit` in all.

    Without a limit Metal keeps as much as the machine has. A smaller one, as of a CPU, stays.
    """
    before = mx.set_cache_limit(BUFFERS)
    if before < BUFFERS:
        mx.set_cache_limit(before)
    if limit is not None:
        mx.set_memory_limit(limit)


def check_fits(
    name: str,
    options: LoadOptions,
    limit: int | None,
    answer: int,
    adapters: int = 0,
    rows: int = 1,
    caches: Mapping[str, Any] | None = None,
) -> tuple[int, int]:
    """How many of `rows` questions about a picture, answered together in that many tokens each,
    have room for their KV caches, and how many tokens the context leaves of these. Raises
    UsageError, with the setting that would fit, where not even one has room.

    limit: bytes; None for what the machine has, which is not asked further where it is plainly
    enough. adapters: bytes of those that requests name. caches: the options in `memory.Caches`.
    """
    total = limit or _total()
    if total is None:
        return rows, answer
    if limit is None and (_weights(name, options) + adapters) * PLAINLY * rows < total:
        return rows, answer
    from . import memory

    config = _config(name, options)
    _check_reading(name, config, options, total)
    cost = _needed(config, options)
    kept = memory.Caches(**(caches or {}))
    wanted = kept.positions(cost, cost.prompt_tokens + answer)
    try:
        room = memory.fit(name, cost, total, wanted, adapters, kept)
    except UsageError as error:
        least = cost.prompt_tokens + 1
        fitting = (
            f"{said} takes {gigabytes(size + adapters)}"
            for said, size in _smaller(config, options, least, kept.prefill_step_size)
            if size + adapters <= total
        )
        raise UsageError("; ".join([str(error), *list(fitting)[:1]])) from None
    if room < wanted:
        raise UsageError(
            f"{name} in {gigabytes(total)} has room for {room:,} positions, {wanted:,} are wanted: "
            f"--max-tokens {room - cost.prompt_tokens} fits"
        )
    tokens = max(0, wanted - cost.prompt_tokens)
    return memory.rows(cost, total, wanted, rows, adapters, kept), tokens


def _check_reading(name: str, config: dict[str, Any], options: LoadOptions, total: int) -> None:
    """Raises UsageError where not even the files go into memory, as PyTorch's do before any weight
    is quantised."""
    from . import memory

    folder = _folder(name, options)
    if folder is not None:
        size = read_whole(folder)
    else:
        alone = repo_id(name).lower() in {ALIASES[alias].lower() for alias in PYTORCH}
        size = memory.needed(config, dtype="bfloat16").parameters if alone else 0
    least = size + memory.PROGRAM
    if size and least > total:
        raise UsageError(
            f"{name} would take {gigabytes(least)} or more while it is read, at any --bits "
            f"(PyTorch's files go into memory whole), and {gigabytes(total)} are there: "
            f"`mlx-vlm-edge convert {name} -o DIR`, on a larger machine, makes a model that is "
            "read in parts"
        )


def _smaller(
    config: dict[str, Any], options: LoadOptions, least: int, step: int
) -> Iterator[tuple[str, int]]:
    """Settings that take less, from the one that changes least; bytes of each."""
    from . import memory

    changes: dict[str, dict[str, Any]] = {"--dtype bfloat16": {"dtype": "bfloat16"}}
    if not config.get("quantization"):
        changes |= {f"--bits {bits}": {"bits": bits} for bits in (8, 4)}
        changes["--bits 4 --dtype bfloat16"] = {"bits": 4, "dtype": "bfloat16"}
    for said, change in changes.items():
        if all(getattr(options, key) == value for key, value in change.items()):
            continue
        parts = memory.by_use(_needed(config, replace(options, **change)), least, step=step)
        yield said, sum(parts.values())


def _needed(config: dict[str, Any], options: LoadOptions) -> Any:
    from . import memory

    counted = partial(memory.needed, config, dtype=options.dtype, quantize=options.bits)
    asked = options.preprocessing
    asked = replace(asked, auto=False)  # a blank picture would be made small
    if isinstance(options.visual_tokens, int):
        with suppress(UsageError):  # of this picture: the user's own may have as many
            return counted(asked=asked)
        asked = replace(asked, budget=None)
    return counted(asked=asked)


def check_pictures(name: str, options: LoadOptions, sizes: Sequence[Size]) -> None:
    """Raises UsageError for a number of visual tokens that a picture of these, all in one prompt,
    does not have. A share fits any, and costs nothing here; of resolution auto the largest side
    counts, since what is in a picture is not known yet."""
    if not isinstance(options.visual_tokens, int):
        return
    plan = _plan(name, options)
    for size in sizes:
        _check_picture(plan, size, len(sizes))


def check_any_picture(name: str, options: LoadOptions, sizes: Iterable[Size]) -> None:
    """`check_pictures` of prompts with one of the pictures each: raises UsageError, about the first
    one, where none of them has as many visual tokens."""
    if not isinstance(options.visual_tokens, int):
        return
    plan, first = _plan(name, options), None
    for size in dict.fromkeys(sizes):
        try:
            return _check_picture(plan, size, 1)
        except UsageError as error:
            first = first or error
    if first is not None:
        raise first


def _plan(name: str, options: LoadOptions) -> "Blueprint":
    from .cost import blueprint

    plan = blueprint(_config(name, options), asked=options.preprocessing)
    if plan.asked.auto:  # for which a blank picture would be made small
        side = plan.config.adapted(plan.asked).sides[-1]
        plan = replace(plan, asked=replace(plan.asked, auto=False, resolution=side))
    return plan


def _check_picture(plan: "Blueprint", size: Size, among: int) -> None:
    try:
        plan.pixels(_smaller_picture(size), among)
    except UsageError:  # which is rare, and may be of the rounding
        plan.pixels(size, among)


def _smaller_picture(size: Size) -> Size:
    """A size of the same shape that is soon resized, and makes the same tokens in all families but
    for a rounding."""
    scale = min(1.0, LARGE / max(size))
    width, height = (max(1, round(side * scale)) for side in size)
    return width, height


def _config(name: str, options: LoadOptions) -> dict[str, Any]:
    """The native config; of a model that nothing is known of, once it is fetched."""
    from ..checkpoint.config import read_config
    from .cost import known_config, native

    if (known := known_config(name, options.revision)) is not None:
        return known
    folder = obtain(name, revision=options.revision, offline=options.offline)
    return native(read_config(folder))


def _weights(name: str, options: LoadOptions) -> float:
    """Bytes of a model's weights on the disk; infinite of one that is not here."""
    if name == DEMO:
        return 0
    folder = _folder(name, options)
    if folder is None:
        return float("inf")
    try:
        return sum(file.stat().st_size for file in weight_files(folder))
    except (UsageError, OSError):  # which `load` tells
        return 0


def _folder(name: str, options: LoadOptions) -> Path | None:
    """Of a model that is here."""
    path = obtain(name) if name == DEMO else expanded(name)
    return path if path.is_dir() else usable_snapshot(repo_id(name), options.revision)


def _total() -> int | None:
    """Bytes of memory that the machine has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None
