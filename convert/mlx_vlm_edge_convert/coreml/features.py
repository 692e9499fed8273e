"""The vision tower as a Core ML package at run time: pictures -> image features; MLX does the rest.

On a Mac coremltools runs the package on the compute units that were asked for; elsewhere our
interpreter does, which is there to be checked and not to be fast. A package is exported once for
every checkpoint, picture size and precision, and kept in the cache folder; on a Mac with it what
Core ML compiled of it.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.models.base import VisionLanguageModel

from ..new_folder import new_folder
from .check.verify import saved_and_checked
from .names import FEATURES, IMAGE, MAIN, PACKAGE_SUFFIX, TOKENS
from .part import Compute, Options, Precision, Say, Size, UnexportableError
from .parts.encoders import encoder
from .parts.pictures import drawn_cases
from .parts.vision import Tower, VisionPart
from .run import cache
from .run.runner import Runner, runner

PACKAGE = f"vision{PACKAGE_SUFFIX}"
DTYPES = {"fp16": np.float16, "fp32": np.float32}  # of what goes in, by precision


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
    label: str = ""  # of the model, for people
    _runners: dict[Size, Runner] = field(default_factory=dict)

    def __call__(self, pictures: np.ndarray) -> mx.array:
        """uint8 [B, H, W, 3] -> [B, N, C]. Raises UsageError for a size that cannot be exported."""
        size = (pictures.shape[1], pictures.shape[2])
        self.prepare(size)
        package, dtype = self._runners[size], DTYPES[self.precision]
        features: list[np.ndarray] = []
        for picture in pictures:
            with self._named(size):
                outputs = package.run(MAIN, {IMAGE: picture.transpose(2, 0, 1)[None].astype(dtype)})
            features.append(outputs[FEATURES] if FEATURES in outputs else outputs[TOKENS])
        text = self.model.language_model.model.norm.weight.dtype
        return mx.array(np.concatenate(features)).astype(text)

    def prepare(self, size: Size) -> None:
        """Have the package for pictures of this size ready to run."""
        if size in self._runners:
            return
        folder = self._folder(size)
        if not folder.is_dir():
            self.say(f"exporting the vision tower to Core ML at {size[1]}x{size[0]} (once)")
            with _exporting(self.compute):
                self._export(size, folder)
        with self._named(size):
            self._runners[size] = runner(folder / PACKAGE, self.compute, folder, self.say)

    def _folder(self, size: Size) -> Path:
        return cache.folder() / cache.key(self.weights, size, self.precision, self.compute)

    @contextmanager
    def _named(self, size: Size) -> Iterator[None]:
        """An error of a cached package says which it is, and how to be rid of it."""
        try:
            yield
        except UsageError as error:
            folder = self._folder(size)
            raise UsageError(
                f"{folder}: {error}. If it is damaged, `mlx-vlm-edge models rm --coreml "
                f"{folder.name}` removes it, and it is exported anew"
            ) from error

    def _export(self, size: Size, folder: Path) -> None:
        options = Options(self.precision, self.compute, size, fused=False, image_input=False)
        tower = Tower(encoder(self.model, size, None), options)
        part = VisionPart(tower, options, drawn_cases(tower.encoder))
        with new_folder(folder, listed=lambda _: ()) as partial, self._set_aside():
            saved_and_checked(part, partial / PACKAGE, self.say)
            model = self.label or self.model.config.source.get("model_type")
            cache.describe(
                partial, model=model, size=size, precision=self.precision, compute=self.compute
            )

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """MLX's own features for a moment, which a new package is compared with."""
        self.model.encoder = None
        try:
            yield
        finally:
            self.model.encoder = self


def attach(
    model: VisionLanguageModel,
    weights: str,
    setting: str,
    say: Say,
    size: Size | None = None,
    label: str = "",
) -> CoreMLFeatures:
    """Let Core ML compute a model's image features, by "coreml" with ":fp32" or ":cpu-gpu" behind.

    weights: `checkpoint.identity` of the folder, or another name that no other weights have. size:
    of pictures whose package is there when this returns, by default the model's. label: what the
    model is called where packages are listed.
    Raises UsageError for another setting and for a family that has no tower to export.
    """
    precision, compute = parse(setting)
    with _exporting(compute):
        usual = encoder(model, None, None).pixels.size
    own: Any = weakref.proxy(model)  # which owns its encoder: no ring keeps gigabytes alive
    features = CoreMLFeatures(own, weights, precision, compute, say, label)
    model.encoder = features
    features.prepare(size or usual)
    return features


@contextmanager
def _exporting(compute: Compute) -> Iterator[None]:
    """What cannot be exported is told with the flag that is there: `export` has others."""
    try:
        yield
    except UnexportableError as error:
        units = "" if compute == "cpu-ne" else f":{compute}"
        wider = f"--vision-backend coreml:fp32{units}"
        remedy = wider if error.wider else "leave the vision backend out"
        raise UsageError(f"{error.cause}: {remedy}") from None


def parse(setting: str) -> tuple[Precision, Compute]:
    """ "coreml:fp32:cpu-gpu" -> ("fp32", "cpu-gpu"); fp16 on the Neural Engine without them."""
    name, *choices = setting.split(":")
    precision: Any = next((choice for choice in choices if choice in DTYPES), "fp16")
    compute: Any = next((choice for choice in choices if choice in get_args(Compute)), "cpu-ne")
    unknown = {*choices} - {precision, compute}
    if name != "coreml" or unknown or len({*choices}) < len(choices):
        raise UsageError(
            f"vision back end {setting!r} is not known: mlx, or coreml with :fp16 or :fp32 and "
            ":cpu-ne or :cpu-gpu behind it"
        )
    return precision, compute
