"""mlx-vlm-edge: vision-language models on Apple silicon.

from mlx_vlm_edge import load, generate
model, processor = load("fastvlm-0.5b")
print(generate(model, processor, "What is this?", images=["x.jpg"]))
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["UsageError", "__version__", "generate", "load", "stream_generate"]

if TYPE_CHECKING:
    from .errors import UsageError
    from .generate import generate, stream_generate
    from .load import load

_HOME = {
    "load": "load",
    "generate": "generate",
    "stream_generate": "generate",
    "UsageError": "errors",
}


class _Package(ModuleType):
    """Public names are imported when first asked for, so that `import mlx_vlm_edge` is free.

    `load` and `generate` are also the names of submodules, which the import system would put in
    the functions' place; they are properties for that reason, and its assignment is ignored.
    """


def _public(name: str, home: str) -> property:
    def get(_: ModuleType) -> Any:
        return getattr(import_module(f".{home}", __name__), name)

    return property(get, lambda _package, _module: None)


for _name, _module in _HOME.items():
    setattr(_Package, _name, _public(_name, _module))
sys.modules[__name__].__class__ = _Package
