"""A model -> a bundle for apps: Core ML packages, what they need beside them, manifest.json.

Each package is run after it was saved, by the interpreter, and compared with the MLX model; what
leaves float16 is repaired and verified again. A bundle that fails does not stay on disk.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_edge import __version__
from mlx_vlm_edge.checkpoint.files import CONFIG, TOKENIZER_JSON, tokenizer_files
from mlx_vlm_edge.checkpoint.licence import licence
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.hub.models import expanded, obtain
from mlx_vlm_edge.models import family
from mlx_vlm_edge.models.base import VisionLanguageModel
from mlx_vlm_edge.models.build import build
from mlx_vlm_edge.picture.image import open_image
from mlx_vlm_edge.picture.preprocessing import AS_PUBLISHED
from mlx_vlm_edge.text.prompt import Processor
from mlx_vlm_edge.text.tokenizer import Tokenizer

from ..new_folder import check_target, new_folder
from ..pipeline import native_checkpoint
from ..save import copy_files
from . import card, manifest
from .check import lint
from .check.verify import judge, saved_and_checked
from .coreai import authoring, refuse_untranslated, write_asset
from .emit.toolkit import tools
from .package.save import save_package
from .part import Options, Part
from .parts.decoder import DecoderPart, refuse_groups
from .parts.encoders import AppPixels, Encoder, encoders
from .parts.pictures import drawn_cases, picture_cases
from .parts.prompt_cache import STEPS, write_prompt_cache
from .parts.vision import Connector, Tower, VisionPart
from .prompts import prompt_entry
from .run.cache import label
from .vectors import write_vectors

PARTS = ("vision", "connector", "decoder")
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
    target = expanded(str(out))
    precheck(target, options, image, overwrite)
    folder = obtain(str(source))
    model, processor = _load(folder, parts)
    built, pixels = _parts(model, parts, options, image)
    prompt = prompt_entry(processor)
    with new_folder(target, overwrite=overwrite, listed=manifest.listed) as partial:
        entries = {}
        for part in built:
            path = manifest.package_path(partial, part)
            check = None
            if verify:
                part, check = saved_and_checked(part, path, say)
            else:
                _save(part, path, say)
            part.write_files(partial)
            findings = _lint(path, say) if show_lint else None
            entries[part.name] = manifest.part_entry(part, options, path, check, findings)
            if verify and prompt is not None and isinstance(part, DecoderPart):
                entries[part.name] |= _prompt_cache(part, path, prompt["before_image"], say)
            if options.coreai and isinstance(part, VisionPart) and part.name == "vision":
                asset = path.with_suffix(".aimodel")
                entries[part.name]["coreai"] = write_asset(part, asset, verify, say)
        _copy(folder, processor, partial)
        if processor is None:
            say(f"{folder} has no tokenizer: the bundle is without tokenizer and prompt")
        elif prompt is None:
            say("the bundle is without a prompt: this family's is not text around one picture")
        content = {
            "model": _model_entry(model, folder),
            "licence": licence(folder),
            "minimum_os": manifest.minimum_os(entries.values()),
            "parts": entries,
            "tokens": _tokens(model, processor),
            "prompt": prompt,
            "context": options.context if "decoder" in entries else None,
        }
        if pixels is not None:
            entry = manifest.preprocessing_entry(pixels)
            content["preprocessing"] = entry | {"vectors": write_vectors(partial, pixels)}
        card.write(partial, content)
        manifest.write(partial, content)
    return target


def precheck(out: Path, options: Options, image: str | Path | None, overwrite: bool) -> None:
    """Raises UsageError for what is wrong whichever the model: before one is looked for."""
    tools()
    if options.coreai:
        authoring()
    refuse_groups(options)
    check_target(out, overwrite=overwrite, listed=manifest.listed)
    if image is not None:
        open_image(image)


def _load(folder: Path, parts: Sequence[str]) -> tuple[VisionLanguageModel, Processor | None]:
    """The model, lazily, all but its language model in float32; no processor without tokenizer."""
    config, arrays = native_checkpoint(folder)
    kind = family(config)
    model = build(kind, config, arrays)
    for name, part in model.children().items():
        if name != "language_model" and isinstance(part, nn.Module):
            part.apply(_float32)
    if not tokenizer_files(folder) and "decoder" not in parts:
        return model, None
    return model, kind.Processor(model.config, Tokenizer.from_folder(folder), AS_PUBLISHED)


def _float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def _parts(
    model: VisionLanguageModel,
    wanted: Sequence[str],
    options: Options,
    image: str | Path | None,
) -> tuple[list[Part], AppPixels | None]:
    """The parts to export, and how a picture becomes what they take."""
    built: list[Part] = []
    towers: dict[str, Encoder] = {}
    if {"vision", "connector"} & {*wanted}:
        towers = encoders(model, options.size, options.strategy)
    if len(towers) > 1:
        _check_several(wanted, options, len(towers))
        options = replace(options, fused=False)
    for name, tower in towers.items():
        cases = drawn_cases(tower) if image is None else picture_cases(tower, image)
        if "vision" in wanted:
            notes = {**tower.notes}
            if len(towers) > 1:
                notes["preprocessing"] = manifest.preprocessing_entry(tower.pixels)
            segment = Tower(tower, options, name)
            vision = VisionPart(segment, options, cases, notes, tower.arrays)
            if options.coreai:
                refuse_untranslated(vision)
            built.append(vision)
        if "connector" in wanted and not ("vision" in wanted and options.fused):
            built.append(VisionPart(Connector(tower), options, cases))
    if "decoder" in wanted:
        built.append(DecoderPart(model.language_model, options))
    pixels = [tower.pixels for tower in towers.values()]
    return built, pixels[0] if len(pixels) == 1 else None


def _check_several(wanted: Sequence[str], options: Options, count: int) -> None:
    """Raises UsageError for what a model of several vision towers cannot be."""
    if "connector" in wanted:
        raise UsageError(
            f"this model has {count} vision towers and one connector for all, which cannot be "
            "exported: use --part vision"
        )
    if options.coreai:
        raise UsageError(f"--format coreai takes one vision tower, and this model has {count}")


def _save(part: Part, path: Path, say: Report) -> None:
    say(f"{part.name}: writing {path.name}")
    save_package(part, path)
    for line in part.warnings():
        say(f"  {part.name}: {line}")


def _prompt_cache(
    part: DecoderPart, package: Path, ids: Sequence[int], say: Report
) -> dict[str, Any]:
    """The manifest's entry of it; nothing where a prompt begins with its picture, or the context
    has no room behind its first ids."""
    if not 0 < len(ids) <= part.options.context - STEPS:
        return {}
    entry, parity = write_prompt_cache(part, package, ids)
    judge("the prompt cache", [parity], say)
    return {"prompt_cache": entry}


def _lint(path: Path, say: Report) -> dict[str, int]:
    findings = lint.lint(path)
    for line in lint.summary(findings):
        say(f"  lint: {line}")
    if not findings:
        say(f"  lint: {path.name} is lint-clean")
    return lint.counts(findings)


def _copy(folder: Path, processor: Processor | None, partial: Path) -> None:
    """The tokenizer as our processor uses it, with what other files and the family add to it, as
    tokenizer.json in any case; and what its readers look up elsewhere."""
    copy_files(folder, partial)
    shutil.copyfile(folder / CONFIG, partial / CONFIG)
    if processor is not None:
        (tokenizer,) = TOKENIZER_JSON
        processor.tokenizer.backend.save(str(partial / tokenizer))


def _model_entry(model: VisionLanguageModel, folder: Path) -> dict[str, Any]:
    source = model.config.source
    return {
        "name": label(folder),
        "model_type": source.get("model_type"),
        "exporter": f"mlx-vlm-edge {__version__}",
        "coremltools": tools().ct.__version__,
    }


def _tokens(model: VisionLanguageModel, processor: Processor | None) -> dict[str, Any]:
    """Ids an app needs: image is the placeholder that stands for one visual token."""
    source: Mapping[str, Any] = model.config.source
    image = source.get("image_token_index", source.get("image_token_id"))
    own = model.config.eos_token_ids if processor is None else processor.eos_ids
    return {"image": image, "eos": sorted(own), "bos": source.get("bos_token_id")}
