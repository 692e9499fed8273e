"""Downloads from the Hugging Face Hub: sizes first, then only the files a model needs.

The one module that imports huggingface_hub; progress goes to stderr.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .cache import cache_folder, is_complete

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_WANTED = (".json", ".jinja", ".txt", ".model")
_NAMED = ("LICENSE", "NOTICE", "README")
_SPARE_BYTES = 256 << 20


@dataclass(frozen=True)
class Remote:
    """A model on the Hub: the files that would be downloaded, with their sizes, and its licence."""

    repo: str
    files: dict[str, int]
    licence: str

    @property
    def nbytes(self) -> int:
        """What a download takes."""
        return sum(self.files.values())


def describe(repo: str, revision: str | None = None) -> Remote:
    """Look a model up on the Hub. Raises UsageError when it is not there or out of reach."""
    with _explained(repo, revision):
        from huggingface_hub import HfApi

        found = HfApi().model_info(repo, revision=revision, files_metadata=True)
    sizes = {item.rfilename: item.size or 0 for item in found.siblings or []}
    return Remote(repo, needed(sizes), _licence(found))


def download(repo: str, revision: str | None = None) -> Path:
    """Download what is missing of a model, with progress; the snapshot's folder.

    Says name and size first. Raises UsageError when the model is not there or out of reach, when
    the disk is too small, and when what came is not a model.
    """
    remote = describe(repo, revision)
    target = cache_folder()
    free = shutil.disk_usage(_existing(target)).free
    if remote.nbytes + _SPARE_BYTES > free:
        raise UsageError(
            f"{repo} takes {gigabytes(remote.nbytes)}, {target} has {gigabytes(free)} free"
        )
    size = gigabytes(remote.nbytes)
    print(f"downloading {repo}: {size}, licence {remote.licence}", file=sys.stderr)
    with _explained(repo, revision):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            repo, revision=revision, allow_patterns=list(remote.files), cache_dir=target
        )
    if not is_complete(Path(folder)):
        raise UsageError(f"{repo} has no config.json with weights beside it")
    return Path(folder)


def needed(sizes: dict[str, int]) -> dict[str, int]:
    """Of a repository's files, those a model needs: no other framework's weights, no subfolders.

    PyTorch's own weights count only where there are no safetensors.
    """
    top = {name: size for name, size in sizes.items() if "/" not in name}
    weights = [name for name in top if name.endswith(".safetensors")]
    if not weights:
        weights = [name for name in top if name.endswith((".bin", ".pth"))]
    kept = [name for name in top if name.startswith(_NAMED) or name.endswith(_WANTED)]
    return {name: top[name] for name in sorted({*weights, *kept})}


def gigabytes(nbytes: int) -> str:
    """A size for people: 1.52 GB, 12 MB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def _licence(found: "ModelInfo") -> str:
    card = found.card_data
    named = [tag.removeprefix("license:") for tag in found.tags or [] if tag.startswith("license:")]
    own = card.get("license_name") if card else None
    return str(own or (named[0] if named else "not stated"))


def _existing(folder: Path) -> Path:
    """The folder, or the nearest parent that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """huggingface_hub's errors, each as one line with a remedy."""
    from huggingface_hub import errors

    # HfHubHTTPError's bases: the HTTP library's own root error, under whichever library it uses.
    unreachable: Any = (*errors.HfHubHTTPError.__bases__, OSError)
    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise UsageError(
            f"{repo} asks for its licence to be accepted: do so at https://huggingface.co/{repo}, "
            "then `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"{repo} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"{repo} is not on the Hugging Face Hub, or private (`hf auth login`)"
        ) from error
    except unreachable as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UsageError(
            f"{repo}{at} is not on this machine and the Hub cannot be reached ({reason}); "
            "connect to the network, or name a folder that has the model"
        ) from error
