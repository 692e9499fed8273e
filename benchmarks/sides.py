"""The two programs as processes: persistent workers, fresh ones, and their command lines."""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_vlm_edge.blas import CORE, better_core

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
DROPPED = (
    "PYTHONPATH", "PYTHONSTARTUP", "LD_PRELOAD", "MLX_VLM_EDGE_MODEL", "VIRTUAL_ENV",
    "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE",  # it chooses as it does for users
)  # fmt: skip
STOCK = "stock"


class FailedError(RuntimeError):
    """A program ended where it should not have; the text has what it said last."""


def environment(name: str, blas: str, threads: int) -> dict[str, str]:
    """What a side runs in: one BLAS and its threads for both, no network.

    Our own loader of a BLAS is off, so that none is loaded on one side only.
    """
    kept = {key: value for key, value in os.environ.items() if key not in DROPPED}
    kept |= dict.fromkeys(THREADS, str(threads))
    kept |= {"HF_HUB_OFFLINE": "1", "MLX_VLM_EDGE_BLAS": "off", "TOKENIZERS_PARALLELISM": "false"}
    if blas != STOCK:
        kept["LD_PRELOAD"] = blas
        kept |= _core(blas)
    if name == "ours":
        kept["PYTHONPATH"] = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "convert")))
    return kept


def _core(blas: str) -> dict[str, str]:
    """What an OpenBLAS older than this processor has to be told; ours would find that by itself."""
    try:
        core = better_core(ctypes.CDLL(blas))
    except OSError:  # what a side that cannot load it will say
        return {}
    return {CORE: core} if core else {}


class Side:
    """One program: its interpreter and environment; `open` starts a worker that stays."""

    def __init__(self, name: str, python: str, blas: str, threads: int) -> None:
        self.name, self.python = name, python
        self.environment = environment(name, blas, threads)

    def open(self) -> "Worker":
        return Worker(self)

    def once(self, order: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """A fresh process for one order: seconds from its start to the reply, and the reply."""
        began = time.perf_counter()
        worker = Worker(self)
        try:
            reply = worker.ask(order)
            return time.perf_counter() - began, reply
        finally:
            worker.close()

    def first_text(self, arguments: Sequence[str]) -> tuple[float, dict[str, Any]]:
        """The command line: seconds from its start to the first byte on stdout, and the text."""
        with tempfile.TemporaryFile() as said:
            began = time.perf_counter()
            process = subprocess.Popen(
                [self.python, *arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, env=self.environment,
            )  # fmt: skip
            assert process.stdout is not None
            text = process.stdout.read(1)
            seconds = time.perf_counter() - began
            text += process.stdout.read()
            if process.wait() or not text.strip():
                raise FailedError(f"{self.name}: {' '.join(arguments[:3])} ...: {_tail(said)}")
        return seconds, {"text": text.decode("utf-8", "replace")}

    def has(self, module: str) -> bool:
        """Whether this interpreter could import a module."""
        program = f"import importlib.util as u; print(u.find_spec({module!r}) is not None)"
        done = subprocess.run(
            [self.python, "-c", program],
            capture_output=True, text=True, env=self.environment, check=False,
        )  # fmt: skip
        if done.returncode:
            raise FailedError(f"{self.python} does not run: {done.stderr.strip()[-300:]}")
        return done.stdout.strip() == "True"


class Worker:
    """A running worker.py of one side; asks are answered in order."""

    def __init__(self, side: Side) -> None:
        self.name = side.name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed in close
        self._process = subprocess.Popen(
            [side.python, str(HERE / "worker.py"), side.name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
            env=side.environment,
        )  # fmt: skip

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Raises FailedError with what the program said last when there is no answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            print(json.dumps(order), file=stdin, flush=True)
        except BrokenPipeError:
            raise FailedError(f"{self.name}: {order['do']}: {_tail(self._said)}") from None
        line = stdout.readline()
        if not line:
            raise FailedError(f"{self.name}: {order['do']}: {_tail(self._said)}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._said.close()


def _tail(file: Any, letters: int = 1500) -> str:
    file.seek(0)
    return str(file.read().decode("utf-8", "replace")[-letters:]).strip() or "it said nothing"


def pair(ours: str | None, peer: str, blas: str, threads: int) -> tuple[Side, Side]:
    both = ("ours", ours or sys.executable), ("peer", peer)
    first, second = (Side(name, python, blas, threads) for name, python in both)
    return first, second
