"""Which files a model folder is made of, and whether it is whole: the one owner of their names.

In go a folder or a repository's names; out come the files to read, to fetch and to copy, and what
is missing. Hub, download, loader, converter, exporter and tokenizer ask here.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UsageError
from ..system_files import of_the_system
from ..wording import say_once

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"  # of a tower that open_clip published, in its place
PREPROCESSOR_CONFIG = "preprocessor_config.json"
PROCESSOR_CONFIG = "processor_config.json"  # transformers 5 has the preprocessor's content in it
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
TEMPLATE, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
# What a tokenizer is made from; the first that is whole is read.
TOKENIZER_JSON = ("tokenizer.json",)
VOCAB_AND_MERGES = ("vocab.json", "merges.txt")
TOKENIZER_MODEL = ("tokenizer.model",)
QWEN, ARCADE = "qwen.tiktoken", "arcade100k.tiktoken"
TIKTOKEN = ((QWEN,), (ARCADE,))
TOKENIZERS = (TOKENIZER_JSON, VOCAB_AND_MERGES, TOKENIZER_MODEL, *TIKTOKEN)
_BESIDE = frozenset((
    GENERATION_CONFIG, PREPROCESSOR_CONFIG, PROCESSOR_CONFIG, OPEN_CLIP_CONFIG,
    "video_preprocessor_config.json",
    *(name for names in TOKENIZERS for name in names), TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP, ADDED_TOKENS, TEMPLATE, TEMPLATE_JSON,
))  # fmt: skip
_LONGEST_NAME = 200  # characters; more than file systems bear are asked for by no index
_DOCUMENTS = ("LICENSE", "NOTICE", "README")  # and what begins so
# model_types that are a vision tower alone, and those whose pictures the config does not describe.
_TOWERS = ("clip", "clip_vision_model", "siglip", "siglip_vision_model", "convnext", "dinov2")
_PREPROCESSED = ("fast_vlm", "idefics2", "idefics3", "smolvlm")


@dataclass(frozen=True)
class Format:
    """A format of weights: its one file is stem + endings[0], its shards stem-00001-of-00002."""

    stem: str
    endings: tuple[str, ...]

    @property
    def single(self) -> str:
        return self.stem + self.endings[0]

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"

    def among(self, names: Iterable[str]) -> list[str]:
        """Of some names those of a model's weights: its own one file, its shards, or any."""
        ours = sorted(n for n in names if n.endswith(self.endings) and not _is_foreign(n))
        own = re.compile(rf"{self.stem}(-\d+-of-\d+)?\.\w+")
        return [self.single] * (self.single in ours) or list(filter(own.fullmatch, ours)) or ours


SAFETENSORS = Format("model", (".safetensors",))
TORCH = Format("pytorch_model", (".bin", ".pth", ".pt"))
FORMATS = (SAFETENSORS, TORCH)  # safetensors go before PyTorch's
# What has a weight file's ending and is none: adapters, another program's copy, training's state.
_FOREIGN = (
    "adapter", "consolidated", "training_args", "optimizer", "scheduler", "rng_state",
    "mm_projector",
)  # fmt: skip
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)(\.\w+)")


def _is_foreign(name: str) -> bool:
    return name.startswith(_FOREIGN) or of_the_system(name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} when there is no such file. Raises UsageError for any other content."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: not a JSON object")
    return content


def weight_files(folder: Path, formats: Sequence[Format] = FORMATS) -> list[Path]:
    """The files that have a folder's weights, in the first format it has; [] when none.

    The index says which, unless none of its shards are here (it is of another build): then what is
    complete without it is read, and a line on stderr says so. Raises UsageError when a shard is
    missing, or an index names a file of another folder.
    """
    for form in formats:
        shards = _shards(folder / form.index)
        if absent := [name for name in shards if not (folder / name).is_file()]:
            if len(absent) < len(shards) or not any(_unlisted(folder, f) for f in FORMATS):
                raise UsageError(f"{folder}: shard {absent[0]} is missing; download it again")
            say_once(f"{folder / form.index} names files that are not there: it is not used")
            shards = []
        if paths := [folder / name for name in shards or _unlisted(folder, form)]:
            return paths
    return []


def read_whole(folder: Path) -> int:
    """Bytes of weights that take memory as soon as they are read, quantised or not: PyTorch's files
    are copied, safetensors stay on the disk until they are used."""
    paths = [path for path in weight_files(folder) if not path.name.endswith(SAFETENSORS.endings)]
    return sum(path.stat().st_size for path in paths)


def _shards(index: Path) -> list[str]:
    """The names in a shard index, in order; [] without the file."""
    if not index.is_file():
        return []
    named = read_json(index).get("weight_map")
    if not isinstance(named, Mapping) or not all(isinstance(n, str) for n in named.values()):
        raise UsageError(f"{index}: not a readable shard index; download it again")
    names = sorted(set(named.values()))
    for name in names:
        path = PurePosixPath(name)
        odd = "\\" in name or not name.isprintable() or len(name) > _LONGEST_NAME
        if odd or path.is_absolute() or ".." in path.parts:
            raise UsageError(f"{index}: names {name[:80]!r}, which is not a file of this folder")
    return names


def _unlisted(folder: Path, form: Format) -> list[str]:
    """A folder's weights of a format by their names alone; shards are numbered, none may lack."""
    names = form.among(path.name for path in folder.iterdir())
    for name in names:
        if not (folder / name).is_file():
            raise UsageError(f"{folder / name}: links to a file that is not there: fetch it again")
        if shard := _SHARD.fullmatch(name):
            _check_numbers(folder, shard, names)
    return names


def _check_numbers(folder: Path, shard: re.Match[str], names: Collection[str]) -> None:
    """Raises UsageError unless every shard of one's numbering is there."""
    stem, width, count, ending = shard[1], len(shard[2]), shard[3], shard[4]
    first = 0 if f"{stem}-{0:0{width}}-of-{count}{ending}" in names else 1
    for number in range(first, first + int(count)):  # ends at the first that is missing
        name = f"{stem}-{number:0{width}}-of-{count}{ending}"
        if name not in names:
            raise UsageError(f"{folder}: shard {name} is missing; download it again")


def tokenizer_files(folder: Path) -> tuple[str, ...]:
    """Of TOKENIZERS the first that a folder has; () when none."""
    whole = (names for names in TOKENIZERS if all((folder / name).is_file() for name in names))
    return next(whole, ())


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """What a folder says about preprocessing, {} when nothing.

    Where both files do, the processor's counts, as in transformers 5, which alone writes it.
    """
    nested = read_json(folder / PROCESSOR_CONFIG).get("image_processor") or {}
    if not isinstance(nested, dict):
        raise UsageError(f"{folder / PROCESSOR_CONFIG}: image_processor is not a JSON object")
    return nested or read_json(folder / PREPROCESSOR_CONFIG)


def read_chat_template(folder: Path) -> str | None:
    """A folder's chat template: of a file of its own, else the processor's, else the tokenizer's.

    Where several are named, "default" is taken. Raises UsageError for one that cannot be read.
    """
    own = folder / TEMPLATE
    if own.is_file():
        try:
            return own.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"{own}: cannot be read ({error})") from error
    for name in (TEMPLATE_JSON, PROCESSOR_CONFIG, TOKENIZER_CONFIG):
        if (entry := read_json(folder / name).get("chat_template")) is not None:
            return _template(folder / name, entry)
    return None


def _template(path: Path, entry: Any) -> str | None:
    """A template: text, {name: text}, or [{"name": ..., "template": ...}]; None without default."""
    if isinstance(entry, list) and all(isinstance(item, Mapping) for item in entry):
        entry = {item.get("name"): item.get("template") for item in entry}
    default = entry.get("default") if isinstance(entry, Mapping) else entry
    nameless = default is None and isinstance(entry, Mapping) and None in entry
    if not isinstance(default, str | None) or isinstance(entry, list) or nameless:
        raise UsageError(f"{path}: chat_template is neither text nor named texts")
    return default


def lacking(folder: Path, *, as_published: bool = False) -> str:
    """What a folder lacks to be a whole model, in words; "" when it is whole.

    as_published: it has all that its repository has, so that what not every one has is not missed.
    """
    open_clip = (folder / OPEN_CLIP_CONFIG).is_file()
    if not (folder / CONFIG).is_file() and not open_clip:
        return CONFIG
    try:
        model_type = read_json(folder / CONFIG).get("model_type")
        if not weight_files(folder):
            return "weights"
        described = model_type not in _PREPROCESSED or bool(read_preprocessor(folder))
    except UsageError as error:
        return str(error)
    if dangling := [name for name in beside(folder) if not (folder / name).is_file()]:
        return dangling[0]
    if model_type in _TOWERS or open_clip:
        return ""
    if not tokenizer_files(folder):
        return "a tokenizer"
    if as_published or (described and (folder / TOKENIZER_CONFIG).is_file()):
        return ""
    return TOKENIZER_CONFIG if described else PREPROCESSOR_CONFIG


def beside(folder: Path) -> list[str]:
    """What a folder has beside its config and weights, in order, dangling links included."""
    return sorted(p.name for p in folder.iterdir() if _is_beside(p.name) and not p.is_dir())


def needed(names: Iterable[str]) -> list[str]:
    """Of a repository's files, those a model needs: weights of one format, no subfolders."""
    top = [name for name in names if "/" not in name]
    present = ((form.among(top), form.index) for form in FORMATS)
    weights, index = next((some for some in present if some[0]), ([], ""))
    wanted = {CONFIG, index, *weights}
    return sorted(name for name in top if name in wanted or _is_beside(name))


def _is_beside(name: str) -> bool:
    return name in _BESIDE or name.startswith(_DOCUMENTS)
