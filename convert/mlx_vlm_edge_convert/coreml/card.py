"""A bundle's manifest, before it is written -> its model card, README.md.

The model's own README goes on beside it, as MODEL_README.md.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_vlm_edge.wording import gigabytes

NAME, OWN = "README.md", "MODEL_README.md"


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the card of what is in the folder."""
    own = folder / NAME
    if own.exists():
        own.rename(folder / OWN)
    own.write_text("\n".join(_lines(folder, content)) + "\n", encoding="utf-8")


def _lines(folder: Path, content: Mapping[str, Any]) -> Iterator[str]:
    model, needs = content["model"], content["minimum_os"]
    stated = content["licence"]
    if _is_name(stated):
        yield from ("---", f"license: {stated}", "library_name: coreml", "---")
    yield f"# {model['name']} for Core ML"
    yield ""
    yield f"Exported by {model['exporter']} with coremltools {model['coremltools']}. Licence of the"
    yield f"model: {stated}. Needs iOS {needs['ios']} or macOS {needs['macos']}."
    if (folder / OWN).exists():
        yield f"What its publisher says of it is in {OWN}."
    yield ""
    yield "| part | package | computes in | units | memory | furthest from MLX |"
    yield "|---|---|---|---|---|---|"
    for name, part in content["parts"].items():
        yield f"| {name} | {' | '.join(_cells(part))} |"
    yield ""
    yield "manifest.json says how to use it."
    if any(part["parity"] is None for part in content["parts"].values()):
        yield "Packages were neither run nor compared with the MLX model (--no-verify)."
    else:
        yield "Packages were run by an interpreter and compared with the MLX model; no Mac has seen"
        yield "them."


def _cells(part: Mapping[str, Any]) -> Iterator[str]:
    yield part["package"]
    yield ", ".join([part["precision"], *part.get("weights", ())])
    yield part["compute_units"]
    yield ", ".join(f"{kind} {gigabytes(size)}" for kind, size in part["memory"].items())
    errors = [each["error"] for each in part["parity"] or ()]
    yield f"{max(errors):.0e} (relative)" if errors else "not verified"


def _is_name(stated: str) -> bool:
    """Whether it is an identifier, as front matter takes it."""
    return " " not in stated and ":" not in stated
