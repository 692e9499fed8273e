"""What a model will take of memory, held against what the machine has, before it is read.

`needed` and `fit` are what a caller asks before `load`; sizes are bytes.
"""

import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoint.quantization import GROUP_SIZE
from ..errors import UsageError
from ..language.cache import KV_GROUP_SIZE, QUANTIZED_KV_START
from ..language.decoder import PREFILL_STEP
from ..picture.preprocessing import AS_PUBLISHED, Preprocessing
from ..wording import gigabytes
from .cost import SQUARE, Cost, Size, blueprint, question
from .cost import cost as count

Ask = Callable[[Sequence[str]], str]  # a command -> what it prints, "" when that cannot be had
PROGRAM = 300_000_000  # the interpreter, and the buffers that MLX keeps for reuse
ANSWER = 256  # positions that an answer takes
PAGES = ("Pages free", "Pages inactive", "Pages speculative", "Pages purgeable")
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@dataclass(frozen=True)
class Caches:
    """How KV caches are kept and filled, as the options of `generate` say that are called so."""

    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = KV_GROUP_SIZE
    quantized_kv_start: int = QUANTIZED_KV_START
    prefill_step_size: int = PREFILL_STEP

    def positions(self, cost: Cost, wanted: int) -> int:
        """How many of so many positions are ever in one."""
        return min(wanted, cost.context, self.max_kv_size or wanted)

    def each(self, cost: Cost) -> int:
        """Bytes that a position takes once it is quantised, with its groups' scales and biases."""
        if self.kv_bits is None:
            return cost.cached
        groups = 2 * (cost.numbers // self.kv_group_size) * (cost.cached // cost.numbers)
        return cost.numbers * self.kv_bits // 8 + groups

    def nbytes(self, cost: Cost, positions: int) -> int:
        """Of one of so many positions, at its largest: all of it is quantised, once it begins."""
        if self.kv_bits is None:
            return positions * cost.cached
        before = min(positions, self.quantized_kv_start)
        return max(before * cost.cached, positions * self.each(cost))

    def room(self, cost: Cost, nbytes: int) -> int:
        """How many positions one may have in so many bytes."""
        begins = self.quantized_kv_start * cost.cached <= nbytes
        return nbytes // (self.each(cost) if begins else cost.cached)


PLAIN = Caches()


def needed(
    config: Mapping[str, Any],
    *,
    dtype: str | None = None,
    quantize: int | None = None,
    asked: Preprocessing = AS_PUBLISHED,
    image: Size = SQUARE,
) -> Cost:
    """What a model costs as `load` would hold it on this device, asked about a picture.

    config: native (`cost.config_of`, `cost.native`). Nothing is read; a fraction of a second.
    """
    block = config.get("quantization")
    if quantize is not None:
        block = {"bits": quantize, "group_size": GROUP_SIZE}
    plan = blueprint(config, dtype=dtype, quantization=block, asked=asked)
    return count(plan, question(plan, image))


def fit(
    name: str,
    cost: Cost,
    limit: int | None,
    wanted: int | None = None,
    adapters: int = 0,
    caches: Caches = PLAIN,
) -> int:
    """How many positions the KV cache may have within `limit` bytes: `wanted`, or fewer.

    wanted: by default the prompt and ANSWER more. limit: None where it is not known, so that all is
    right. adapters: bytes of those that requests name. Raises UsageError with the figures where
    not even the prompt and one token fit.
    """
    wanted = cost.prompt_tokens + ANSWER if wanted is None else wanted
    if limit is None:
        return wanted
    least, step = cost.prompt_tokens + 1, caches.prefill_step_size
    refuse_too_large(name, by_use(cost, min(least, wanted), adapters, step), limit)
    spare = limit - sum(by_use(cost, 0, adapters, step).values())
    return min(wanted, caches.room(cost, spare))


def rows(
    cost: Cost,
    limit: int,
    positions: int,
    wanted: int,
    adapters: int = 0,
    caches: Caches = PLAIN,
) -> int:
    """How many of `wanted` answers may be under way together within `limit` bytes, each with a KV
    cache of so many positions; 1 where not even that fits."""
    spare = limit - sum(by_use(cost, 0, adapters, caches.prefill_step_size).values())
    each = caches.nbytes(cost, positions)
    prompt = min(positions, cost.prompt_tokens) * cost.cached  # one at a time is not quantised yet
    return max(1, min(wanted, 1 + (spare - max(each, prompt)) // each))


def by_use(
    cost: Cost, positions: int, adapters: int = 0, step: int = PREFILL_STEP
) -> dict[str, int]:
    """Bytes by what they are for. positions: of the KV cache. adapters: bytes of those that
    requests name. step: positions of a prompt computed together. The activations' are an estimate.
    """
    memory = cost.memory(positions, step)
    return {
        "weights": memory["weights"],
        "adapters": adapters,
        "KV cache": memory["cache"],
        "activations (estimated)": memory["activations"],
        "program": PROGRAM,
    }


def of_question(cost: Cost) -> dict[str, int]:
    """`by_use` of a short question about a picture and its answer."""
    return by_use(cost, cost.prompt_tokens + ANSWER)


def refuse_too_large(name: str, parts: Mapping[str, int], limit: int | None) -> None:
    """Raises UsageError with the figures when the parts together are more than there is."""
    total = sum(parts.values())
    if limit is None or total <= limit:
        return
    shown = " + ".join(f"{gigabytes(size)} {part}" for part, size in parts.items() if size)
    raise UsageError(
        f"{name} would take {gigabytes(total)} ({shown}) and {gigabytes(limit)} are there: "
        "take a smaller model, fewer bits or bfloat16, or close other programs"
    )


def parse_size(text: str) -> int:
    """ "6GB", "512 MB", "4.5g" or bytes -> bytes. Raises UsageError for what is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise UsageError(f"{text!r} is no size of memory, as 6GB or 512MB is")
    return size


def usable() -> int | None:
    """What a model may take now: what is free and, on Metal, no more than the system recommends."""
    details: dict[str, Any] = mx.device_info()
    limit = details.get("max_recommended_working_set_size")
    known = [int(size) for size in (free_memory(), limit) if size]
    return min(known) if known else None


def ask(command: Sequence[str]) -> str:
    """Run a short command of the system's own."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def free_memory(ask: Ask = ask, system: str = platform.system()) -> int | None:
    """Bytes that can be had without swapping, None where the system does not tell."""
    if system == "Darwin":
        return parse_vm_stat(ask(["vm_stat"]))
    return parse_meminfo("MemAvailable")


def total_memory(ask: Ask = ask, system: str = platform.system()) -> int | None:
    """Bytes that the machine has, None where the system does not tell."""
    if system == "Darwin":
        text = ask(["sysctl", "-n", "hw.memsize"])
        return int(text) if text.isdigit() else None
    return parse_meminfo("MemTotal")


def parse_vm_stat(text: str) -> int | None:
    """macOS's vm_stat: free, inactive, speculative and purgeable pages, in bytes."""
    size = re.search(r"page size of (\d+) bytes", text)
    counts = dict(re.findall(r"^([^:\n]+):\s+(\d+)\.?$", text, re.MULTILINE))
    if not size or not any(name in counts for name in PAGES):
        return None
    return int(size[1]) * sum(int(counts.get(name, 0)) for name in PAGES)


def parse_meminfo(name: str, text: str | None = None) -> int | None:
    """A line of Linux's /proc/meminfo in bytes."""
    if text is None:
        path = Path("/proc/meminfo")
        text = path.read_text() if path.is_file() else ""
    line = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(line[1]) * 1024 if line else None
