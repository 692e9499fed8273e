"""The energy of an answer by macOS's powermetrics, which only root may run."""

import platform
import plistlib
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.parsers.expat import ExpatError

INTERVAL = 100  # milliseconds between samples
LONGEST = 600  # seconds, after which a sampler that could not be ended ends by itself
PATIENCE = 20  # seconds that root's commands have
COMMAND = (
    "powermetrics", "--samplers", "cpu_power,gpu_power,ane_power", "-f", "plist",
    "-i", str(INTERVAL),
)  # fmt: skip
PARTS = ("cpu_energy", "gpu_energy", "ane_energy")  # millijoules
ONLY_ROOT = (
    "energy: not measured: powermetrics may only be run by root; "
    "`sudo -v` first lets it run without being asked"
)
ONLY_MACOS = "energy: not measured: only macOS tells it (powermetrics)"
ENDED = (
    "energy: not measured: powermetrics ended before the answers did; `sudo -v` first, and fewer "
    f"--runs where they take longer than {LONGEST // 60} minutes"
)
NOT_ENDED = (
    "energy: not measured: powermetrics, which is root's, could not be ended; it ends by itself "
    f"within {LONGEST // 60} minutes. `sudo -v` first lets it be ended"
)


class NotMeasuredError(Exception):
    """Why a sampler's figures are of no use, in one line."""


@dataclass(frozen=True)
class Energy:
    """Joules of processor, GPU and Neural Engine together, over the seconds that were sampled."""

    joules: float
    seconds: float

    def record(self, answers: int) -> dict[str, float]:
        return {
            "joules_per_answer": self.joules / answers,
            "watts": self.joules / self.seconds if self.seconds else 0.0,
            "answers": answers,
        }


def parse(output: bytes) -> Energy:
    """powermetrics' plists, with NUL bytes between them; a last one that is cut off is left out."""
    joules = seconds = 0.0
    for document in output.split(b"\0"):
        if not document.strip():
            continue
        try:
            sample: dict[str, Any] = plistlib.loads(document)
        except (plistlib.InvalidFileException, ExpatError, ValueError):
            continue
        elapsed = sample.get("elapsed_ns", 0) / 1e9
        joules += _joules(sample.get("processor") or {}, elapsed)
        seconds += elapsed
    return Energy(joules, seconds)


def _joules(processor: dict[str, Any], elapsed: float) -> float:
    """Of one sample, from the power of all parts in milliwatts or else from their energies."""
    if "combined_power" in processor:
        return float(processor["combined_power"]) / 1e3 * elapsed
    return sum(float(processor.get(part, 0)) for part in PARTS) / 1e3


def unavailable(system: str = platform.system(), may_run: Callable[[], bool] | None = None) -> str:
    """Why energy cannot be measured here, in one line; "" when it can."""
    if system != "Darwin":
        return ONLY_MACOS
    return "" if (may_run or _may_run)() else ONLY_ROOT


def _may_run() -> bool:
    try:
        asked = subprocess.run(
            ["sudo", "-n", *COMMAND, "-n", "1"], capture_output=True, timeout=PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0


def measure(answer: Callable[[], object], answers: int) -> Energy:
    """Sample while `answer` is called so many times. Call only where `unavailable` says nothing.

    Raises NotMeasuredError after the answers, and whatever they raise.
    """
    samples = LONGEST * 1000 // INTERVAL
    with tempfile.TemporaryFile() as output:  # a pipe would fill up while nobody reads it
        sampler = subprocess.Popen(
            ["sudo", "-n", *COMMAND, "-n", str(samples)], stdout=output, stderr=subprocess.DEVNULL
        )
        try:
            for _ in range(answers):
                answer()
            whole = sampler.poll() is None
        finally:
            ended = _end(sampler)
        if not (whole and ended):
            raise NotMeasuredError(NOT_ENDED if whole else ENDED)
        output.seek(0)
        return parse(output.read())


def _end(sampler: "subprocess.Popen[bytes]") -> bool:
    """Whether the sampler has ended. It is root's, whom only root may signal, and sudo passes on no
    signal that comes from its own process group."""
    kill = ["sudo", "-n", "kill", str(sampler.pid)]
    try:
        if sampler.poll() is None:
            subprocess.run(kill, capture_output=True, timeout=PATIENCE, process_group=0, check=True)
        sampler.wait(PATIENCE)
    except (OSError, subprocess.SubprocessError):
        return False
    return True
