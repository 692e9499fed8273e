"""Make `import torchvision` (which timm needs) work beside a CPU build of torch.

torchvision's wheel for Linux is built for CUDA; beside a CPU torch its library does not load, and
its Python part then fails on operators that were never declared. Nothing here calls them, so it is
enough to declare their names. Where torchvision imports as it is, nothing is declared.
"""

import importlib.util
import re
import sys
from pathlib import Path

import torch

NAMED = re.compile(r'(?:register_meta\(|torchvision::)"?(\w+)"')
_library: torch.library.Library | None = None  # operators live as long as this object


def operator_names(package: Path) -> set[str]:
    """Every operator torchvision's Python part registers something for.

    @register_meta("roi_align"), register_fake("torchvision::nms") -> {"roi_align", "nms"}
    """
    files = ("_meta_registrations.py", "_autograd_registrations.py")
    texts = [(package / name).read_text() for name in files if (package / name).is_file()]
    return {name for text in texts for name in NAMED.findall(text)}


def install() -> None:
    """Import torchvision, its operators declared first if they have to be."""
    global _library
    if "torchvision" in sys.modules:
        return
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        spec = importlib.util.find_spec("torchvision")
        assert spec is not None
        assert spec.origin is not None
        _library = torch.library.Library("torchvision", "DEF")
        for name in operator_names(Path(spec.origin).parent):
            _library.define(f"{name}(Tensor x) -> Tensor")
        import torchvision  # noqa: F401
