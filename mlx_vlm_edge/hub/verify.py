"""A model on this machine -> what is wrong with its files: missing, changed, damaged, infinite."""

from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.files import SAFETENSORS, lacking, weight_files
from ..errors import UsageError
from . import published
from .published import Files


def known_files(snapshot: Path) -> Files:
    """The hashes that a snapshot is held to: of the Hub's own record, else of the cache's names."""
    in_cache = snapshot.parent.name == "snapshots"
    return published.read(snapshot) or published.hashes_of(snapshot) if in_cache else {}


def changed(folder: Path, files: Files) -> list[str]:
    """A line for each file that is not as the Hub has it; reads all of their bytes."""
    missing = published.absent(folder, files)
    return [
        f"{name}: {'missing or cut off' if name in missing else 'not the bytes of the Hub'}"
        for name in published.differing(folder, files)
    ]


def damages(folder: Path, *, as_published: bool = False) -> Iterator[str]:
    """A line for each thing that is wrong with a folder itself; reads all of its safetensors.

    Weights in PyTorch's format are not read. as_published: see `lacking`.
    """
    if reason := lacking(folder, as_published=as_published):
        yield f"not a whole model: {reason}"
    else:
        yield from _weights(folder)


def _weights(folder: Path) -> Iterator[str]:
    from ..checkpoint.weights import not_finite, read_safetensors

    for path in weight_files(folder):
        if not path.name.endswith(SAFETENSORS.endings):
            continue
        try:
            yield from (
                f"{path.name}: {name} has values that are not finite"
                for name in not_finite(read_safetensors([path]))
            )
        except UsageError as error:
            yield str(error)
