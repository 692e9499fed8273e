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
        self.fails: set[tuple[str, str, str]] = set()  # predictions that fail
        # ("load" or "run", package, function, units) that end the process
        self.kills: set[tuple[str, str, str, str]] = set()
        self.packages: dict[str, Package] = {}
        self.states: dict[int, Any] = {}
        for name in ("asked", "answered"):
            os.mkfifo(folder / name)

    def run(self, program: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A program with its pipes; what it says and how it ends."""
        self.calls, self.units, self.states = [], [], {}
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
        return {"dies": True} if ("load", package, function, units) in self.kills else {}

    def _run(
        self, package: str, function: str, units: str, state: int, inputs: dict[str, Any]
    ) -> dict[str, Any]:
        self.calls.append((package, function))
        self.units.append((package, function, units))
        if ("run", package, function, units) in self.kills:
            return {"dies": True}
        if (package, function, units) in self.fails:
            return {"error": "this one fails"}
        if package not in self.packages:
            self.packages[package] = Package(self.bundle / package)
        runs = self.packages[package]
        if state and state not in self.states:
            self.states[state] = runs.new_state(function)
        arrays = {name: self._array(**entry) for name, entry in inputs.items()}
        outputs = {}
        for name, array in runs.run(function, arrays, self.states.get(state)).items():
            file = self.folder / f"out_{name}"
            array.astype(np.float16).tofile(file)
            outputs[name] = {"shape": array.shape, "file": str(file)}
        return {"outputs": outputs}

    @staticmethod
    def _array(dtype: str, shape: list[int], file: str, width: int = 0) -> np.ndarray:
        raw = Path(file).read_bytes()
        if dtype != "bgra":
            return np.frombuffer(raw, DTYPES[dtype]).reshape(shape)
        rgb = np.frombuffer(raw, np.uint8).reshape(shape)[:, :width, 2::-1]
        return rgb.transpose(2, 0, 1)[None].astype(np.float32)
