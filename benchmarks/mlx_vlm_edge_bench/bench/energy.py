"""The energy of an answer by macOS's powermetrics, which only root may run."""

import platform
import plistlib
import signal
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.parsers.expat import ExpatError

INTERVAL = 100  # milliseconds between samples
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
            ["sudo", "-n", *COMMAND, "-n", "1"], capture_output=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0


def measure(answer: Callable[[], object], answers: int) -> Energy:
    """Sample while `answer` is called so many times. Call only where `unavailable` says nothing."""
    with tempfile.TemporaryFile() as output:  # a pipe would fill up while nobody reads it
        sampler = subprocess.Popen(
            ["sudo", "-n", *COMMAND], stdout=output, stderr=subprocess.DEVNULL
        )
        try:
            for _ in range(answers):
                answer()
        finally:
            sampler.send_signal(signal.SIGTERM)
            sampler.wait()
        output.seek(0)
        return parse(output.read())
