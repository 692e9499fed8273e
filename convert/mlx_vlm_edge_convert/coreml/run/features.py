"""The vision tower as a Core ML package at run time: pictures -> image features; MLX does the rest.

On a Mac coremltools runs the package on the compute units that were asked for; elsewhere our
interpreter does, which is there to be checked and not to be fast. A package is exported once for
every checkpoint, picture size and precision, and kept in the cache folder; on a Mac with it what
Core ML compiled of it.
"""

import hashlib
import json
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_edge.checkpoint.config import read_config
from mlx_vlm_edge.checkpoint.files import weight_files
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.models.base import VisionLanguageModel

from ...save import new_folder
from ..check.interpreter import Package
from ..emit.toolkit import tools
from ..package.save import save_checked
from ..part import Compute, Options, Precision, Say
from ..parts.encoders import encoder
from ..parts.pictures import drawn_cases
from ..parts.vision import FEATURES, IMAGE, TOKENS, Tower, VisionPart

CACHE = "MLX_VLM_EDGE_CACHE"  # folder of exported packages; ~/.cache/mlx-vlm-edge without it
EXPORTER = 1  # raised when the exporter emits something else: cached packages are made again
UNITS = {"cpu-ne": "CPU_AND_NE", "cpu-gpu": "CPU_AND_GPU"}
PACKAGE, COMPILED = "vision.mlpackage", "vision.mlmodelc"

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def cache_folder() -> Path:
    """Where exported packages are kept."""
    if chosen := os.environ.get(CACHE):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "mlx-vlm-edge" / "coreml"


def identity(folder: Path) -> str:
    """Of a checkpoint: another one when its config changes or a file of weights is replaced.

    Names, sizes and times of the files, since reading gigabytes would take longer than answering.
    """
    files = [path.resolve() for path in weight_files(folder)]
    weights = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    told = json.dumps([read_config(folder), weights], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


@dataclass
class CoreMLFeatures:
    """A model's `encoder`: the same pictures in as its tower has, the same features out.

    Packages take pictures of one size; another size is another package. Tiles run one after the
    other.
    """

    model: VisionLanguageModel
    weights: str
    precision: Precision = "fp16"
    compute: Compute = "cpu-ne"
    say: Say = print
    _runs: dict[tuple[int, int], Run] = field(default_factory=dict)

    def __call__(self, pictures: np.ndarray, mask: np.ndarray | None = None) -> mx.array:
        """uint8 [B, H, W, 3] -> [B, N, C]. Raises UsageError for a size that cannot be exported."""
        if mask is not None and not mask.all():
            raise UsageError(
                "the Core ML vision back end takes whole tiles only, and a picture of this shape "
                "leaves one partly filled: use --vision-backend mlx"
            )
        size = (pictures.shape[1], pictures.shape[2])
        self.prepare(size)
        run, dtype = self._runs[size], np.float16 if self.precision == "fp16" else np.float32
        found: list[np.ndarray] = []
        for picture in pictures:
            outputs = run({IMAGE: picture.transpose(2, 0, 1)[None].astype(dtype)})
            found.append(outputs[FEATURES] if FEATURES in outputs else outputs[TOKENS])
        text = self.model.language_model.model.norm.weight.dtype
        return mx.array(np.concatenate(found)).astype(text)

    def prepare(self, size: tuple[int, int]) -> None:
        """Have the package for pictures of (height, width) ready to run."""
        if size in self._runs:
            return
        folder = cache_folder() / self._key(size)
        if not folder.is_dir():
            self.say(f"exporting the vision tower to Core ML at {size[1]}x{size[0]} (once)")
            self._export(size, folder)
        self._runs[size] = _runner(folder, self.compute, self.say)

    def _key(self, size: tuple[int, int]) -> str:
        told = [EXPORTER, self.weights, *size, self.precision, self.compute]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]

    def _export(self, size: tuple[int, int], folder: Path) -> None:
        options = Options(self.precision, self.compute, size, fused=False, image_input=False)
        tower = Tower(encoder(self.model, size, None), options)
        part = VisionPart(tower, options, drawn_cases(tower.encoder))
        with new_folder(folder) as partial, self._set_aside():
            save_checked(part, partial / PACKAGE, self.say)

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """MLX's own features for a moment, which a new package is compared with."""
        self.model.encoder = None
        try:
            yield
        finally:
            self.model.encoder = self


def _runner(folder: Path, compute: Compute, say: Say) -> Run:
    """What predicts with a cached package on this machine."""
    package = folder / PACKAGE
    if sys.platform != "darwin":
        interpreted = Package(package)
        return lambda inputs: interpreted.run("main", inputs)
    ct, compiled = tools().ct, folder / COMPILED
    if not compiled.exists():
        say("compiling it for this Mac (once)")
        ct.models.utils.compile_model(str(package), str(compiled))
    units = getattr(ct.ComputeUnit, UNITS[compute])
    model = ct.models.CompiledMLModel(str(compiled), compute_units=units)
    predict: Run = model.predict
    return predict


def attach(
    model: VisionLanguageModel,
    weights: str,
    setting: str,
    say: Say,
    size: tuple[int, int] | None = None,
) -> CoreMLFeatures:
    """Let Core ML compute a model's image features, by "coreml" with ":fp32" or ":cpu-gpu" behind.

    weights: `identity` of the checkpoint, or another name that no other weights have. size:
    (height, width) of pictures whose package is there when this returns, by default the model's.
    Raises UsageError for another setting and for a family that has no tower to export.
    """
    precision, compute = parse(setting)
    usual = encoder(model, None, None).pixels.size
    own: Any = weakref.proxy(model)  # which owns its encoder: no ring keeps gigabytes alive
    features = CoreMLFeatures(own, weights, precision, compute, say)
    model.encoder = features
    features.prepare(size or usual)
    return features


def parse(setting: str) -> tuple[Precision, Compute]:
    """ "coreml:fp32:cpu-gpu" -> ("fp32", "cpu-gpu"); fp16 on the Neural Engine without them."""
    name, *choices = setting.split(":")
    precision: Any = _one_of(choices, ("fp16", "fp32"))
    compute: Any = _one_of(choices, tuple(UNITS))
    if name != "coreml" or choices:
        raise UsageError(
            f"vision back end {setting!r} is not known: mlx, or coreml with :fp16 or :fp32 and "
            ":cpu-ne or :cpu-gpu behind it"
        )
    return precision or "fp16", compute or "cpu-ne"


def _one_of(choices: list[str], known: Iterable[str]) -> str | None:
    """The first choice that is known, taken out of the list."""
    found = next((choice for choice in choices if choice in known), None)
    if found is not None:
        choices.remove(found)
    return found
