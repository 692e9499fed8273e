"""What stands behind the stand-ins for Apple's modules: the interpreter in Core ML's place, Pillow
in Image I/O's. Swift's side of the pipes is apple/Link.swift."""

import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
from mlx_vlm_edge_convert.coreml.check.interpreter import Package
from PIL import Image

from .swift_build import Toolchain

DTYPES = {"float16": np.float16, "float32": np.float32, "int32": np.int32}
ORIENTATION = 274  # EXIF tag


class Link:
    """Runs programs against a bundle; `calls` has the package and function of each prediction."""

    def __init__(self, toolchain: Toolchain, bundle: Path, folder: Path) -> None:
        self.toolchain, self.bundle, self.folder = toolchain, bundle, folder
        self.calls: list[tuple[str, str]] = []
        self.units: list[tuple[str, str, str]] = []  # the same with the compute units
        self.loads: list[tuple[str, str]] = []  # package and function of each model
        self.fails: set[tuple[str, str, str]] = set()  # predictions that fail
        # ("load" or "run", package, function, units) that end the process
        self.kills: set[tuple[str, str, str, str]] = set()
        self.failing = 0  # predictions that fail next
        self.wrong: set[tuple[str, str]] = (
            set()
        )  # packages that compute nonsense, and on what units
        self.spoils_logits = False  # so that only the package's own token is right
        # What each function writes its outputs into, and its inputs that are an IOSurface's.
        self.backed: dict[tuple[str, str], set[str]] = {}
        self.shared: dict[tuple[str, str], set[str]] = {}
        self.packages: dict[str, Package] = {}
        self.states: dict[int, Any] = {}
        self.written: list[str] = []  # states, by their names
        for name in ("asked", "answered"):
            os.mkfifo(folder / name)

    def run(self, program: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A program with its pipes; what it says and how it ends."""
        self.calls, self.loads, self.units, self.states = [], [], [], {}
        home = {"HOME": str(self.folder), "XDG_CACHE_HOME": str(self.folder / "cache")}
        environment = self.toolchain.environment(LINK_FOLDER=str(self.folder), **home, **more)
        # Opened for both ways here, so that neither side waits for the other to come or go.
        asked = os.open(self.folder / "asked", os.O_RDWR)
        answered = os.open(self.folder / "answered", os.O_RDWR)
        server = threading.Thread(target=self._serve, args=(asked, answered), daemon=True)
        server.start()
        try:
            return subprocess.run(
                [program, *arguments], env=environment, capture_output=True, text=True, check=False
            )
        finally:
            os.write(asked, b"\n")
            server.join()
            os.close(asked)
            os.close(answered)

    def _serve(self, asked: int, answered: int) -> None:
        with open(asked, closefd=False) as lines:
            for line in lines:
                if line == "\n":
                    return
                told = json.loads(line)
                try:
                    reply = getattr(self, f"_{told.pop('call')}")(**told)
                except Exception as error:  # noqa: BLE001 - the program's to tell
                    reply = {"error": repr(error)}
                os.write(answered, json.dumps(reply).encode() + b"\n")

    def _picture(self, file: str) -> dict[str, Any]:
        try:
            image = Image.open(file)
            image.load()
        except OSError:
            return {}
        model, array = image.mode, np.asarray(image)
        if array.dtype.itemsize > 1:
            array = ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
            model = "L"
        elif model not in ("L", "CMYK"):
            array = np.asarray(image.convert("RGBA"))
            model = "P" if model == "P" else "RGBA"
        path = self.folder / "picture"
        path.write_bytes(np.ascontiguousarray(array).tobytes())
        orientation = image.getexif().get(ORIENTATION, 1)
        return {
            "width": image.width, "height": image.height, "model": model, "bytes": str(path),
            "orientation": orientation,
        }  # fmt: skip

    def _load(self, package: str, function: str, units: str) -> dict[str, Any]:
        self.loads.append((package, function))
        return {"dies": True} if ("load", package, function, units) in self.kills else {}

    def _fail(self, count: int) -> dict[str, Any]:
        """The program's own wish: so many predictions from now on fail."""
        self.failing = count
        return {}

    def _run(
        self, package: str, function: str, units: str, state: int, inputs: dict[str, Any],
        backed: list[str],
    ) -> dict[str, Any]:  # fmt: skip
        self.calls.append((package, function))
        self.units.append((package, function, units))
        self.backed[package, function] = set(backed)
        self.shared[package, function] = {x for x in inputs if inputs[x].pop("shared", False)}
        if self.failing:
            self.failing -= 1
            return {"error": "this one fails"}
        if ("run", package, function, units) in self.kills:
            return {"dies": True}
        if (package, function, units) in self.fails:
            return {"error": "this one fails"}
        runs = self._package(package, function, state)
        arrays = {name: self._array(**entry) for name, entry in inputs.items()}
        outputs = {}
        for name, array in runs.run(function, arrays, self.states.get(state)).items():
            if name == "logits" and self.spoils_logits:
                array = array.min() + array.max() - array  # the last is first
            if (package, units) in self.wrong:
                array = np.roll(array, 1)
            file = self.folder / f"out_{name}"
            whole = np.issubdtype(array.dtype, np.integer)
            dtype = "int32" if whole else "float16"
            array.astype(DTYPES[dtype]).tofile(file)
            outputs[name] = {"dtype": dtype, "shape": array.shape, "file": str(file)}
        return {"outputs": outputs}

    def _state(
        self, package: str, function: str, state: int, name: str,
        values: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """What a state holds, or new values for all of it."""
        runs = self._package(package, function, state)
        if values is not None:
            values.pop("shared")
            runs.write(self.states[state], name, self._array(**values))
            self.written.append(name)
            return {}
        array, file = runs.read(self.states[state], name), self.folder / f"state_{name}"
        array.astype(np.float16).tofile(file)
        return {"shape": array.shape, "file": str(file)}

    def _package(self, package: str, function: str, state: int) -> Package:
        """A package, and its state where it has one of this number."""
        if package not in self.packages:
            self.packages[package] = Package(self.bundle / package)
        runs = self.packages[package]
        if state and state not in self.states:
            self.states[state] = runs.new_state(function)
        return runs

    @staticmethod
    def _array(dtype: str, shape: list[int], file: str, width: int = 0) -> np.ndarray:
        raw = Path(file).read_bytes()
        if dtype != "bgra":
            return np.frombuffer(raw, DTYPES[dtype]).reshape(shape)
        rgb = np.frombuffer(raw, np.uint8).reshape(shape)[:, :width, 2::-1]
        return rgb.transpose(2, 0, 1)[None].astype(np.float32)
