"""What the operations of MIL do: one numpy function each, float32 in and out, by name.

A function takes the operation's inputs under MIL's names. Floats of either declared dtype come and
go as float32; the interpreter rounds. Source: coremltools, converters/mil/mil/ops/defs.
"""

from collections.abc import Callable, Mapping
from typing import Any

from . import convolution, elementwise, layout, reduction

Operation = Callable[..., Any]

OPERATIONS: Mapping[str, Operation] = {
    **elementwise.OPERATIONS,
    **reduction.OPERATIONS,
    **layout.OPERATIONS,
    **convolution.OPERATIONS,
}
MOVES = layout.MOVES  # operations whose results are values of their inputs: nothing to round
