"""A model -> a bundle for apps: Core ML packages, what they need beside them, manifest.json.

Each package is run after it was saved, by the interpreter, and compared with the MLX model; what
leaves float16 is repaired and verified again. A bundle that fails does not stay on disk.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

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
from .names import MAIN, sized_name
from .package.save import save_package
from .part import Options, Part
from .parts.decoder import DecoderPart, refuse_groups, refuse_head
from .parts.encoders import AppPixels, Encoder, encoder, encoders
from .parts.pictures import drawn_cases, picture_cases
from .parts.prompt_cache import STEPS, write_prompt_cache
from .parts.vision import Case, Connector, Tower, View, VisionPart
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
    ids = None if processor is None else processor.rows
    forget = partial(_read_again, model.language_model, folder)
    waiting, pixels = _parts(model, parts, options, image, ids, forget)
    prompt, tokens = prompt_entry(processor), _tokens(model, processor)
    config = model.config.source
    del model  # a part lets go of what is its alone, one after the other
    with new_folder(target, overwrite=overwrite, listed=manifest.listed) as fresh:
        entries = {}
        while waiting:
            entry, part = _written(waiting.pop(0), fresh, options, verify, show_lint, say)
            if verify and prompt is not None and isinstance(part, DecoderPart):
                entry |= _prompt_cache(part, fresh, prompt["before_image"], say)
            entries[part.name] = entry
        _copy(folder, processor, fresh)
        if processor is None:
            say(f"{folder} has no tokenizer: the bundle is without tokenizer and prompt")
        elif prompt is None:
            say("the bundle is without a prompt: this family's is not text around one picture")
        content: dict[str, Any] = {
            "model": _model_entry(config, folder),
            "licence": licence(folder),
            "minimum_os": manifest.minimum_os(entries.values()),
            "parts": entries,
            "tokens": tokens,
            "prompt": prompt,
            "context": options.context if "decoder" in entries else None,
        }
        if pixels:
            entry = manifest.preprocessing_entry(pixels[MAIN])
            content["preprocessing"] = entry | {"vectors": write_vectors(fresh, pixels)}
            content["sizes"] = manifest.sizes_entry(pixels, entries)
        card.write(fresh, content)
        manifest.write(fresh, content)
    return target


def _written(
    part: Part, folder: Path, options: Options, verify: bool, show_lint: bool, say: Report
) -> tuple[dict[str, Any], Part]:
    """Write a part into the bundle: the manifest's entry, and the part as it was saved."""
    path, check = manifest.package_path(folder, part), None
    if verify:
        part, check = saved_and_checked(part, path, say)
    else:
        _save(part, path, say)
    part.write_files(folder)
    findings = _lint(path, say) if show_lint else None
    entry = manifest.part_entry(part, options, path, check, findings)
    if options.coreai and isinstance(part, VisionPart) and part.name == "vision":
        entry["coreai"] = write_asset(part, path.with_suffix(".aimodel"), verify, say)
    return entry, part


def precheck(out: Path, options: Options, image: str | Path | None, overwrite: bool) -> None:
    """Raises UsageError for what is wrong whichever the model: before one is looked for."""
    tools()
    _refuse_repeated(options)
    if options.coreai:
        authoring()
    refuse_groups(options)
    refuse_head(options)
    check_target(out, overwrite=overwrite, listed=manifest.listed)
    if image is not None:
        open_image(image)


def _refuse_repeated(options: Options) -> None:
    sizes = [size for size in (options.size, *options.more_sizes) if size is not None]
    if twice := next((size for size in sizes if sizes.count(size) > 1), None):
        raise UsageError(f"--image-size {twice[1]}x{twice[0]} is there twice: leave one out")
    contexts = [options.context, *options.more_contexts]
    if again := next((each for each in contexts if contexts.count(each) > 1), None):
        raise UsageError(f"--context {again} is there twice: leave one out")
    if options.coreai and options.more_sizes:
        raise UsageError("--format coreai takes one --image-size")


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


def _read_again(language_model: Any, folder: Path) -> None:
    """Weights that were computed with are gigabytes; the same ones, unread, are none."""
    config, arrays = native_checkpoint(folder)
    language_model.update(build(family(config), config, arrays).language_model.parameters())


def _float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def _parts(
    model: VisionLanguageModel,
    wanted: Sequence[str],
    options: Options,
    image: str | Path | None,
    ids: int | None,
    forget: Callable[[], None],
) -> tuple[list[Part], dict[str, AppPixels]]:
    """The parts to export, and how a picture becomes what each function of one tower takes; nothing
    of that where it becomes tiles.

    ids: how many of the vocabulary's are tokens. forget: the decoder's.
    """
    built: list[Part] = []
    pixels: dict[str, AppPixels] = {}
    if {"vision", "connector"} & {*wanted}:
        towers = encoders(model, options.size, options.strategy)
        if len(towers) > 1:
            _check_several(wanted, options, len(towers))
            options = replace(options, fused=False)
            for name, tower in towers.items():
                own = {"preprocessing": manifest.preprocessing_entry(tower.pixels)}
                built += _tower_parts({MAIN: tower}, name, wanted, options, image, own)
        else:
            sizes = {MAIN: towers["vision"]}
            for size in options.more_sizes:
                sizes[sized_name(*size)] = encoder(model, size, options.strategy)
            built += _tower_parts(sizes, "vision", wanted, options, image, {})
            if not towers["vision"].notes.get("tiles"):  # each family's own way, not one resize
                pixels = {function: each.pixels for function, each in sizes.items()}
    if "decoder" in wanted:
        built.append(DecoderPart(model.language_model, options, tokens=ids, forget=forget))
    return built, pixels


def _tower_parts(
    sizes: Mapping[str, Encoder],
    name: str,
    wanted: Sequence[str],
    options: Options,
    image: str | Path | None,
    notes: Mapping[str, Any],
) -> Iterator[Part]:
    """A tower, and its connector where that is apart, with a function for each size of pictures."""
    tower = sizes[MAIN]
    cases = {function: _cases(each, image) for function, each in sizes.items()}
    if "vision" in wanted:
        views = {f: View(Tower(each, options, name), cases[f]) for f, each in sizes.items()}
        vision = _vision_part(views, options, {**tower.notes, **notes}, tower.arrays)
        if options.coreai:
            refuse_untranslated(vision)
        yield vision
    if "connector" in wanted and not ("vision" in wanted and options.fused):
        views = {f: View(Connector(each), cases[f]) for f, each in sizes.items()}
        yield _vision_part(views, options, {}, {})


def _cases(tower: Encoder, image: str | Path | None) -> list[Case]:
    return drawn_cases(tower) if image is None else picture_cases(tower, image)


def _vision_part(
    views: Mapping[str, View],
    options: Options,
    notes: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> VisionPart:
    others = {function: view for function, view in views.items() if function != MAIN}
    first = views[MAIN]
    return VisionPart(first.segment, options, first.cases, notes, arrays, others=others)


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
    part: DecoderPart, folder: Path, ids: Sequence[int], say: Report
) -> dict[str, Any]:
    """The manifest's entry of it; nothing where a prompt begins with its picture, or the context
    has no room behind its first ids."""
    if not 0 < len(ids) <= part.options.context - STEPS:
        return {}
    entry, parity = write_prompt_cache(part, manifest.package_path(folder, part), ids)
    judge("the prompt cache", [parity], say)
    return {"prompt_cache": entry}


def _lint(path: Path, say: Report) -> dict[str, int]:
    findings = lint.lint(path)
    for line in lint.summary(findings):
        say(f"  lint: {line}")
    if not findings:
        say(f"  lint: {path.name} is lint-clean")
    return lint.counts(findings)


def _copy(folder: Path, processor: Processor | None, bundle: Path) -> None:
    """The tokenizer as our processor uses it, with what other files and the family add to it, as
    tokenizer.json in any case; and what its readers look up elsewhere."""
    copy_files(folder, bundle)
    shutil.copyfile(folder / CONFIG, bundle / CONFIG)
    if processor is not None:
        (tokenizer,) = TOKENIZER_JSON
        processor.tokenizer.backend.save(str(bundle / tokenizer))


def _model_entry(source: Mapping[str, Any], folder: Path) -> dict[str, Any]:
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
