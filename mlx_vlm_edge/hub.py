"""A model's name (alias, Hub id or folder) -> a local folder, without network where it is here.

The Hugging Face cache is read directly: a model that is on the machine starts without importing
huggingface_hub. What is not here is downloaded, because it was named, after saying how much.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import UsageError

ALIASES: dict[str, str] = {
    "fastvlm-0.5b": "apple/FastVLM-0.5B",
    "fastvlm-1.5b": "apple/FastVLM-1.5B",
    "fastvlm-7b": "apple/FastVLM-7B",
    "smolvlm-256m": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "smolvlm-500m": "HuggingFaceTB/SmolVLM-500M-Instruct",
    "smolvlm-2.2b": "HuggingFaceTB/SmolVLM-Instruct",
    "smolvlm2-256m": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    "smolvlm2-500m": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    "smolvlm2-2.2b": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    "idefics3-8b": "HuggingFaceM4/Idefics3-8B-Llama3",
    "fuyu-8b": "adept/fuyu-8b",
    "eve-7b": "BAAI/EVE-7B-v1.0",
    "eve-7b-hd": "BAAI/EVE-7B-HD-v1.0",
    "eve-7b-hd-v2": "BAAI/EVE-7B-HD-v2.0",
    "mobilevlm-v2-1.7b": "mtgv/MobileVLM_V2-1.7B",
    "mobilevlm-v2-3b": "mtgv/MobileVLM_V2-3B",
    "mobilevlm-v2-7b": "mtgv/MobileVLM_V2-7B",
    "mobilevlm-1.7b": "mtgv/MobileVLM-1.7B",
    "mobilevlm-3b": "mtgv/MobileVLM-3B",
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
    "llava-onevision-0.5b": "lmms-lab/llava-onevision-qwen2-0.5b-ov",
}
DEMO = "demo"
_DEMO_FOLDER = Path(__file__).parent / "demo"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[\w./-]+")
_WEIGHTS = {
    "model.safetensors.index.json": (".safetensors",),
    "pytorch_model.bin.index.json": (".bin", ".pth"),
}


@dataclass(frozen=True)
class CachedModel:
    """A model in the Hub cache: its id, its folder, the bytes it takes, whether it is complete."""

    repo: str
    folder: Path
    nbytes: int
    complete: bool


def locate(name: str, *, revision: str | None = None, offline: bool = False) -> Path:
    """The folder of a model, downloaded first when it is not on the machine.

    Raises UsageError for an unknown name, a folder without a model, and when a download is needed
    but `offline` or HF_HUB_OFFLINE forbids it or the Hub cannot be reached.
    """
    path = expanded(name)
    if revision is not None and (name == DEMO or path.is_dir()):
        raise UsageError(f"--revision is for models of the Hub, not for {name}")
    if name == DEMO:
        return _DEMO_FOLDER
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{name}: no config.json in it; name a folder with a model")
        return path
    if path.is_file():
        raise UsageError(f"{name} is a file; name the folder it is in")
    repo = repo_id(name)
    if found := local_snapshot(repo, revision):
        return found
    if offline or _forbidden():
        raise UsageError(
            f"{repo} is not on this machine and downloads are off; without --offline "
            f"(and HF_HUB_OFFLINE), `mlx-vlm-edge models pull {name}` gets it"
        )
    from .download import download

    return download(repo, revision)


def expanded(name: str) -> Path:
    """A path with its ~ expanded. Raises UsageError for a name that cannot be a path."""
    try:
        path = Path(name).expanduser()
        path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{name[:80]}: no such folder ({reason})") from None
    return path


def pull(name: str, *, revision: str | None = None) -> Path:
    """Download a model, or what is missing of it. Raises UsageError when that cannot be done."""
    repo = repo_id(name)
    if _forbidden():
        raise UsageError(f"HF_HUB_OFFLINE is set: unset it to download {repo}")
    from .download import download

    return download(repo, revision)


def repo_id(name: str) -> str:
    """The Hub id of an alias or of a Hub id itself. Raises UsageError for anything else."""
    if alias := ALIASES.get(name.lower()):
        return alias
    if _REPO.fullmatch(name) and ".." not in name:
        return name
    if name == DEMO:
        raise UsageError("demo is bundled with the program: nothing to download or remove")
    if name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise UsageError(f"{name}: no such folder")
    import difflib

    near = difflib.get_close_matches(name.lower(), [*ALIASES, DEMO], n=2, cutoff=0.5)
    meant = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(ALIASES)}."
    raise UsageError(
        f"no model is called {name!r}; {meant} A Hub id (owner/name) will do, to run one a folder"
    )


def cache_folder() -> Path:
    """The Hub cache, by the environment variables that huggingface_hub reads."""
    environment: Mapping[str, str] = os.environ
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := environment.get(variable):
            return Path(folder).expanduser()
    if home := environment.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    cache = Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "huggingface" / "hub"


def local_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The folder of a complete snapshot in the Hub cache, None when there is none.

    revision: a branch, a tag or a whole commit hash; the main branch by default.
    """
    wanted = revision or "main"
    if not _REVISION.fullmatch(wanted) or ".." in wanted:
        raise UsageError(f"revision {wanted!r} is not a branch, a tag or a commit")
    home = cache_folder() / _cache_name(repo)
    reference = home / "refs" / wanted
    commit = reference.read_text().strip() if reference.is_file() else wanted
    snapshot = home / "snapshots" / commit
    return snapshot if is_complete(snapshot) else None


def is_complete(folder: Path) -> bool:
    """Whether a folder has a config and all its weights: every shard of its index, or a file."""
    if not (folder / "config.json").is_file():
        return False
    for index, suffixes in _WEIGHTS.items():
        if (folder / index).is_file():
            try:
                shards = set(json.loads((folder / index).read_text())["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError):
                return False
            return all((folder / str(shard)).is_file() for shard in shards)
        if any(path.suffix in suffixes and path.is_file() for path in folder.iterdir()):
            return True
    return False


def cached_models() -> Iterator[CachedModel]:
    """Every model in the Hub cache that a family of ours can read, or that is not all there."""
    cache = cache_folder()
    for home in sorted(cache.glob("models--*--*")) if cache.is_dir() else []:
        repo = home.name.removeprefix("models--").replace("--", "/", 1)
        snapshots = sorted((home / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
        if not snapshots or not _supported(snapshots[-1]):
            continue
        blobs = [path for path in home.rglob("*") if path.is_file() and not path.is_symlink()]
        nbytes = sum(path.stat().st_size for path in blobs)
        yield CachedModel(repo, home, nbytes, is_complete(snapshots[-1]))


def _supported(snapshot: Path) -> bool:
    from .models import FAMILIES

    try:
        config = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") in FAMILIES


def _cache_name(repo: str) -> str:
    return "models--" + repo.replace("/", "--")


def _forbidden() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
