"""mlx-vlm-edge: vision-language models on Apple silicon.

from mlx_vlm_edge import load, generate
model, processor = load("fastvlm-0.5b")
print(generate(model, processor, "What is this?", images=["x.jpg"]))
"""

import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import blas

# What the interpreter had worked until now, and when now is, in seconds: see cli/cold.py.
STARTED = time.process_time(), time.perf_counter()
__version__ = "0.1.0"
__all__ = [
    "Conversation",
    "GenerationResult",
    "Options",
    "PrefixCache",
    "UsageError",
    "__version__",
    "generate",
    "load",
    "stream_generate",
]

if TYPE_CHECKING:
    from .errors import UsageError
    from .generation.answer import GenerationResult
    from .generation.conversation import Conversation
    from .generation.loop import Options, generate, stream_generate
    from .generation.prefix import PrefixCache
    from .loading.load import load

if sys.orig_argv[1:3] == ["-m", __name__] or "".join(sys.argv[:1]).endswith("mlx-vlm-edge"):
    # Ctrl-C while the program's modules are imported ends it; `cli.main` takes it from there.
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)
blas.prepare()  # before anything imports mlx

_HOME = {
    "Conversation": "generation.conversation",
    "GenerationResult": "generation.answer",
    "Options": "generation.loop",
    "PrefixCache": "generation.prefix",
    "UsageError": "errors",
    "generate": "generation.loop",
    "load": "loading.load",
    "stream_generate": "generation.loop",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first asked for, so that `import mlx_vlm_edge` is free."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
