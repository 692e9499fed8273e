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


def problems(folder: Path, files: Files) -> Iterator[str]:
    """A line for each thing that is wrong with a model folder; reads all of its bytes.

    Weights in PyTorch's format are held to their hashes alone.
    """
    missing = published.absent(folder, files)
    for name in published.differing(folder, files):
        yield f"{name}: {'missing or cut off' if name in missing else 'not the bytes of the Hub'}"
    if reason := lacking(folder, as_published=bool(files)):
        yield f"not a whole model: {reason}"
        return
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
