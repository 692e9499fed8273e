"""What a part of a bundle is: one package with one or more functions, and how it is checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from mlx_vlm_edge.errors import UsageError

from .parity import Check

Precision = Literal["fp16", "fp32", "mixed"]
Compute = Literal["cpu-gpu", "cpu-ne"]
Bits = Literal[4, 8, "palette4", "palette6"]
Say = Callable[[str], None]
Size = tuple[int, int]  # height and width of a picture

MINIMUM = {  # deployment target -> what the manifest says of it
    "iOS16": {"ios": "16.0", "macos": "13.0"},
    "iOS18": {"ios": "18.0", "macos": "15.0"},
}


class UnexportableError(UsageError):
    """What cannot be exported as it was asked for: cause, and the remedy that `export` has. Who
    exports for another verb words another one. wider: whether float32 is a remedy."""

    def __init__(self, cause: str, remedy: str, *, wider: bool = False) -> None:
        super().__init__(f"{cause}: {remedy}")
        self.cause, self.wider = cause, wider


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    size of the picture, and strategy, how one becomes that: None for the model's own. more_sizes:
    that the same packages take, each by a function of its own. bits and context are the decoder's,
    more_contexts: for which it has functions too; head_bits: of its output head, where it has
    another palette than the rest; embedding_bits: of the table beside it, None for a dense one.
    fused: the connector is in the vision package. image_input: the package takes a picture, not a
    tensor [1, 3, H, W] of the same values, 0..255. coreai: the vision part as a Core AI asset as
    well.
    """

    precision: Precision = "fp16"
    compute: Compute = "cpu-gpu"
    size: Size | None = None
    more_sizes: tuple[Size, ...] = ()
    strategy: str | None = None
    bits: Bits | None = None
    embedding_bits: Literal[4, 8] | None = None
    head_bits: Literal[6] | None = None
    context: int = 2048
    more_contexts: tuple[int, ...] = ()
    fused: bool = True
    image_input: bool = True
    coreai: bool = False


@dataclass(frozen=True)
class Function:
    """program builds the MIL program, anew at each call, since converting uses it up.

    images: shapes [1, 3, H, W] of the inputs that are pictures. islands: operations that stay in
    float32 when a program of float32 is rounded to float16; None when nothing is to be rounded.
    """

    name: str
    program: Callable[[], Any]
    images: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    islands: frozenset[str] | None = None


class Part(Protocol):
    """A package of the bundle, `<name>.mlpackage`."""

    @property
    def name(self) -> str:
        """Of the part and its package."""
        ...

    @property
    def minimum(self) -> str:
        """The deployment target, a key of MINIMUM."""
        ...

    def functions(self) -> Sequence[Function]:
        """What the package computes; several functions share their weights."""
        ...

    def write_files(self, folder: Path) -> None:
        """Files that the part needs beside its package."""
        ...

    def memory(self) -> dict[str, int]:
        """Bytes that it takes beside its package's weights, by what they are for."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the part beyond its inputs and outputs."""
        ...

    def warnings(self) -> list[str]:
        """What the user should know of the package as it was saved."""
        ...

    def verified(self, path: Path) -> "tuple[Part, Check]":
        """Save the package and compare it with MLX: the part as it was saved, repaired maybe."""
        ...
