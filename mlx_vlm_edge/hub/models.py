"""A model's name (alias, Hub id or folder) -> a local folder, without network where it is here.

The Hugging Face cache is read directly: a model that is on the machine starts without importing
huggingface_hub. What is not here is downloaded, because it was named, after saying how much.
"""

import os
import re
import sys
from pathlib import Path

from ..checkpoint.files import CONFIG
from ..errors import UnreachableError, UsageError
from ..paths import expand
from .cache import local_snapshot, snapshot_folder, usable_snapshot

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
    "idefics2-8b": "HuggingFaceM4/idefics2-8b",
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
    "sharegpt4v-7b": "Lin-Chen/ShareGPT4V-7B",
    "sharegpt4v-13b": "Lin-Chen/ShareGPT4V-13B",
    "convllava-7b-768": "ConvLLaVA/ConvLLaVA-sft-768",
    "convllava-7b-1024": "ConvLLaVA/ConvLLaVA-sft-1024",
    "convllava-7b-1536": "ConvLLaVA/ConvLLaVA-sft-1536",
    "moe-llava-stablelm-1.6b": "LanguageBind/MoE-LLaVA-StableLM-1.6B-4e",
    "moe-llava-qwen-1.8b": "LanguageBind/MoE-LLaVA-Qwen-1.8B-4e",
    "moe-llava-phi2-2.7b": "LanguageBind/MoE-LLaVA-Phi2-2.7B-4e",
    "moe-llava-stablelm-1.6b-384": "LanguageBind/MoE-LLaVA-StableLM-1.6B-4e-384",
    "moe-llava-phi2-2.7b-384": "LanguageBind/MoE-LLaVA-Phi2-2.7B-4e-384",
    "cambrian-8b": "nyu-visionx/cambrian-8b",
    "cambrian-13b": "nyu-visionx/cambrian-13b",
    "cambrian-34b": "nyu-visionx/cambrian-34b",
    "llava-onevision-0.5b": "lmms-lab/llava-onevision-qwen2-0.5b-ov",
}
# Published in PyTorch's files alone, 16 bits a weight.
PYTORCH = frozenset((
    "convllava-7b-768", "convllava-7b-1024", "convllava-7b-1536",
    "mobilevlm-3b", "mobilevlm-v2-1.7b", "mobilevlm-v2-7b",
))  # fmt: skip
DEMO = "demo"
NAME_SHOWN = 80  # characters of a name that is not known
_DEMO_FOLDER = Path(__file__).parents[1] / "demo"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def obtain(name: str, *, revision: str | None = None, offline: bool = False) -> Path:
    """The folder of a model, downloaded first when it is not on the machine.

    Where `offline` or HF_HUB_OFFLINE forbids that or the Hub cannot be reached, an older revision
    that is here is used, if none was named, and a line says so. Raises UsageError where none is,
    for an unknown name, and for a folder without a model.
    """
    path = expanded(name)
    if revision is not None and (name == DEMO or path.is_dir()):
        raise UsageError(f"--revision is for models of the Hub, not for {name}")
    if name == DEMO:
        return _DEMO_FOLDER
    if name and path.is_dir():
        if not (path / CONFIG).is_file():
            raise UsageError(f"{name}: no {CONFIG} in it; name a folder with a model")
        return path
    if path.is_file():
        raise UsageError(f"{name} is a file; name the folder it is in")
    repo = repo_id(name)
    if found := local_snapshot(repo, revision):
        return found
    try:
        return _fetched(name, repo, revision, offline)
    except UnreachableError:
        older = usable_snapshot(repo, revision)
        if older is None:
            raise
        line = f"{repo}: its newest revision is not all here; {older.name[:12]} is used"
        print(line, file=sys.stderr)
        return older


def _fetched(name: str, repo: str, revision: str | None, offline: bool) -> Path:
    if offline or _forbidden():
        state = "not all" if snapshot_folder(repo, revision).is_dir() else "not"
        raise UnreachableError(
            f"{repo} is {state} on this machine and downloads are off; without --offline "
            f"(and HF_HUB_OFFLINE), `mlx-vlm-edge models pull {name}` gets it"
        )
    from .download import download

    return download(repo, revision)


def expanded(name: str) -> Path:
    """A path with its ~ expanded. Raises UsageError for a name that cannot be a path."""
    try:
        path = expand(name)
        path.is_dir()
    except (OSError, ValueError) as error:
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
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(
        f"no model is called {name[:NAME_SHOWN]!r}; {meant}`mlx-vlm-edge models list --available` "
        "has the short names; a Hub id (owner/name) will do, to run one a folder"
    )


def _forbidden() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


locate = obtain  # its old name
