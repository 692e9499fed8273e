"""The net under what reads packages and bundles: a malformed file is a line, no traceback."""

from mlx_vlm_edge.errors import Refusing


def reading(source: object, fault: str = "it is damaged") -> Refusing:
    """Raises UsageError, source and fault, for whatever its content does to the block."""
    return Refusing(source, fault, "export it again")
