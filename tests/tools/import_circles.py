"""A circle of imports among the files of some packages, if there is one.

    python tests/tools/import_circles.py mlx_vlm_edge convert/mlx_vlm_edge_convert

Prints the circle and exits with 1. Imports inside functions and under TYPE_CHECKING count: a circle
that is only sometimes walked is one all the same.
"""

import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

Imports = Mapping[str, set[str]]


def imports_of(*folders: Path) -> Imports:
    """Module -> the modules of these packages that it imports, read from the sources alone."""
    places = [str(folder.resolve().parent) for folder in folders]
    sys.path[:0] = places
    try:
        graph = grimp.build_graph(*(folder.name for folder in folders), cache_dir=None)
    finally:
        del sys.path[: len(places)]
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def circle(imports: Imports) -> list[str]:
    """One circle, its first module again at its end; empty when there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def main(*folders: str) -> int:
    around = circle(imports_of(*map(Path, folders)))
    if around:
        print(" imports ".join(reversed(around)))
    return 1 if around else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
