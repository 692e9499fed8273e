"""A model -> a bundle for apps: Core ML packages, what they need beside them, manifest.json.

Each package is run after it was saved, by the interpreter, and compared with the MLX model; what
leaves float16 is repaired and verified again. A bundle that fails does not stay on disk.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_edge import __version__
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.hub import expanded, locate
from mlx_vlm_edge.image import fit, open_image
from mlx_vlm_edge.loading import build, read_checkpoint
from mlx_vlm_edge.models import family
from mlx_vlm_edge.models.base import VisionLanguageModel
from mlx_vlm_edge.prompt import Processor
from mlx_vlm_edge.tokenizer import Tokenizer

from ..save import copy_files, new_folder
from . import lint, manifest
from .encoders import Encoder, Preprocessing, encoder
from .package import save_package
from .parts import Check, Options, Part
from .prompts import prompt_entry
from .toolkit import tools
from .vision import Case, Connector, Tower, VisionPart

PARTS = ("vision", "connector", "decoder")
TOKENIZER = ("tokenizer.json", "tokenizer.model")
Report = Callable[[str], None]


def export(
    source: str | Path,
    out: str | Path,
    *,
    parts: Sequence[str] = PARTS,
    options: Options | None = None,
    image: str | Path | None = None,
    verify: bool = True,
    show_lint: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> Path:
    """Write the bundle of `source` (a folder, Hub id or alias) to the folder `out`.

    parts: of PARTS; a connector that is fused into the vision part is left out. image: a picture to
    verify on, a drawn one without it. verify: run every package and compare it with MLX; without
    it, ranges are not audited either.
    Raises UsageError for every mistake, and when a package is not what MLX computes.
    """
    say, options = report or (lambda _: None), options or Options()
    tools()
    folder, target = locate(str(source)), expanded(str(out))
    model, processor = _load(folder, parts)
    built, pixels = _parts(model, processor, parts, options, image)
    with new_folder(target, overwrite=overwrite, holds=manifest.NAME) as partial:
        entries = {}
        for part in built:
            path = manifest.package_path(partial, part)
            part, check = _save(part, path, verify, say)
            part.write_files(partial)
            findings = _lint(path, say) if show_lint else None
            entries[part.name] = manifest.part_entry(part, options, path, check, findings)
        _copy(folder, processor, partial)
        content = {
            "model": _model_entry(model, folder),
            "parts": entries,
            "tokens": _tokens(model, processor),
            "prompt": prompt_entry(processor),
            "context": options.context if "decoder" in entries else None,
        }
        if pixels is not None:
            content["preprocessing"] = manifest.preprocessing_entry(pixels)
        manifest.write(partial, content)
    return target


def _load(folder: Path, parts: Sequence[str]) -> tuple[VisionLanguageModel, Processor | None]:
    """The model, lazily, all but its language model in float32; no processor without tokenizer."""
    config, arrays = read_checkpoint(folder)
    module = family(config.get("model_type"))
    model = build(module, config, arrays)
    for name, part in model.children().items():
        if name != "language_model" and isinstance(part, nn.Module):
            part.apply(_float32)
    if not any((folder / name).is_file() for name in TOKENIZER) and "decoder" not in parts:
        return model, None
    processor: Processor = module.Processor(model.config, Tokenizer.from_folder(folder))
    return model, processor


def _float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def _parts(
    model: VisionLanguageModel,
    processor: Processor | None,
    wanted: Sequence[str],
    options: Options,
    image: str | Path | None,
) -> tuple[list[Part], Preprocessing | None]:
    """The parts to export, and how pictures are made ready for them."""
    built: list[Part] = []
    made: Encoder | None = None
    if {"vision", "connector"} & {*wanted}:
        made = encoder(model, options.size, options.strategy)
        cases = _cases(made, image)
        if "vision" in wanted:
            built.append(VisionPart(Tower(made, options), options, cases, made.notes, made.arrays))
        if "connector" in wanted and not ("vision" in wanted and options.fused):
            built.append(VisionPart(Connector(made), options, cases))
    if "decoder" in wanted:
        built.append(import_module(".decoder", __package__).part(model, processor, options))
    return built, None if made is None else made.preprocessing


def _cases(made: Encoder, image: str | Path | None) -> list[Case]:
    """A picture, and random pixels, which drive activations further than pictures do."""
    pixels = made.preprocessing
    height, width = pixels.size
    if image is None:
        name, picture = "a drawn picture", _drawn(height, width)
    else:
        name = "the given picture"
        fitted = fit(open_image(image), (width, height), pixels.strategy, pixels.fill)
        picture = np.asarray(fitted)
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return [Case(name, picture, made), Case("random pixels", noise, made)]


def _drawn(height: int, width: int) -> np.ndarray:
    """Slopes of colour with rings, a dark disc and a bright bar: uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    rings = 128 + 100 * np.sin(40 * (x**2 + y**2))
    picture = np.stack([255 * x, 255 * y, rings], axis=-1)
    picture[(x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.03] = (20, 10, 30)
    picture[(abs(x - 0.75) < 0.05) & (y > 0.1)] = (250, 240, 60)
    return picture.astype(np.uint8)


def _save(part: Part, path: Path, verify: bool, say: Report) -> tuple[Part, Check | None]:
    """Save a part, and hold it against MLX. Raises UsageError when it is not what MLX computes."""
    if not verify:
        say(f"{part.name}: writing {path.name}")
        save_package(part, path)
        return part, None
    say(f"{part.name}: writing {path.name} and comparing it with the MLX model")
    part, check = part.verified(path)
    if told := _told(part):
        say(f"  {part.name}: activations leave float16: {told}")
    for parity in check.parity:
        say(f"  {part.name}, {parity.inputs}: relative error {parity.error:.2e}")
    for parity in check.parity:
        if not parity.passed:
            raise UsageError(
                f"the exported {part.name} is wrong: off by {parity.error:.2e} (relative) on "
                f"{parity.inputs}, more than {parity.limit:.0e}; nothing was kept"
            )
    return part, check


def _told(part: Part) -> str:
    repair = part.describe().get("range_repair", {})
    powers = ", ".join(f"{site} by 2^{k}" for site, k in repair.get("powers_of_two", {}).items())
    islands = len(repair.get("float32", ()))
    held = [f"held smaller, {powers}"] if powers else []
    return "; ".join([*held, *([f"{islands} operations in float32"] if islands else [])])


def _lint(path: Path, say: Report) -> dict[str, int]:
    findings = lint.lint(path)
    for line in lint.summary(findings):
        say(f"  lint: {line}")
    if not findings:
        say(f"  lint: {path.name} is lint-clean")
    return lint.counts(findings)


def _copy(folder: Path, processor: Processor | None, partial: Path) -> None:
    """The tokenizer, as tokenizer.json in any case, and what its readers look up elsewhere."""
    copied = copy_files(folder, partial)
    shutil.copyfile(folder / "config.json", partial / "config.json")
    if processor is not None and "tokenizer.json" not in copied:
        processor.tokenizer.backend.save(str(partial / "tokenizer.json"))


def _model_entry(model: VisionLanguageModel, folder: Path) -> dict[str, Any]:
    source = model.config.source
    return {
        "name": _name(folder),
        "model_type": source.get("model_type"),
        "exporter": f"mlx-vlm-edge {__version__}",
        "coremltools": tools().ct.__version__,
    }


def _name(folder: Path) -> str:
    """A folder's name, or the repository's where it is a snapshot in the Hub's cache."""
    if folder.parent.name != "snapshots":
        return folder.name
    return folder.parents[1].name.removeprefix("models--").replace("--", "/")


def _tokens(model: VisionLanguageModel, processor: Processor | None) -> dict[str, Any]:
    """Ids an app needs: image is the placeholder that stands for one visual token."""
    source: Mapping[str, Any] = model.config.source
    image = source.get("image_token_index", source.get("image_token_id"))
    own = model.config.eos_token_ids if processor is None else processor.eos_ids
    return {"image": image, "eos": sorted(own), "bos": source.get("bos_token_id")}
