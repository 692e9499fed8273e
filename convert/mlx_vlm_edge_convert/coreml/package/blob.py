"""weight.bin of a Core ML package (blob storage, version 2) -> numpy arrays.

A header of 64 bytes (count, version), then records: a header of 64 bytes whose first fields are a
sentinel, the type, the size in bytes and the offset of the data, which starts at a multiple of 64.
Source: coremltools, mlmodel/src/MILBlob/Blob/StorageFormat.hpp.
"""

import mmap
import struct
from pathlib import Path

import numpy as np

from mlx_vlm_edge.errors import UsageError

from ..packing import nibbles, sixes

VERSION, SENTINEL, ALIGNMENT = 2, 0xDEADBEEF, 64
WIDTHS = {"int4": 4, "uint4": 4, "uint2": 2, "uint1": 1, "uint6": 6, "uint3": 3}  # below a byte
NUMPY: dict[str, type[np.generic]] = {
    "bool": np.bool_,
    "fp16": np.float16,
    "fp32": np.float32,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
}
_STORED = {
    1: "fp16", 2: "fp32", 3: "uint8", 4: "int8", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1",
    10: "uint2", 11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32",
}  # fmt: skip


def unpack(raw: bytes, count: int, dtype: str) -> np.ndarray:
    """`count` values of a type below a byte, packed from the lowest bit on -> (u)int8[count].

    unpack(b"\\x21\\x43", 3, "uint4") -> [1, 2, 3]
    """
    width = WIDTHS[dtype]
    packed = np.frombuffer(raw, np.uint8)
    if len(packed) * 8 < count * width:
        raise ValueError(f"{len(packed)} bytes are too few for {count} values of {dtype}")
    if width == 4:
        values = nibbles(packed)[:count]
    elif width == 6 and len(packed) % 3 == 0:
        values = sixes(packed)[:count]
    else:
        bits = np.unpackbits(packed, bitorder="little")[: count * width].reshape(count, width)
        weights = (1 << np.arange(width)).astype(np.uint8)
        values = (bits * weights).sum(1, dtype=np.uint8)
    if dtype == "int4":
        return ((values ^ 8).astype(np.int8)) - np.int8(8)
    return values


class Blob:
    """One weight file, mapped into memory. Raises UsageError when it is damaged."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise self._damaged(f"cannot be read ({error})") from error
        if len(self._bytes) < ALIGNMENT:
            raise self._damaged("is cut off in its header")
        version = struct.unpack_from("<I", self._bytes, 4)[0]
        if version != VERSION:
            raise self._damaged(f"has version {version}, not {VERSION}")

    def _damaged(self, what: str) -> UsageError:
        return UsageError(f"{self.name} {what}: export the model again")

    def read(self, offset: int, dtype: str, count: int) -> np.ndarray:
        """`count` values of the record whose header is at `offset`."""
        if offset + ALIGNMENT > len(self._bytes):
            raise self._damaged(f"ends before its record at {offset}")
        sentinel, stored, size, start = struct.unpack_from("<IIQQ", self._bytes, offset)
        if sentinel != SENTINEL:
            raise self._damaged(f"has no record at {offset}")
        if _STORED.get(stored) != dtype:
            raise self._damaged(f"holds {_STORED.get(stored)} at {offset} where {dtype} is due")
        if start % ALIGNMENT:
            raise self._damaged(f"has data at {start}, which is no multiple of {ALIGNMENT}")
        if start + size > len(self._bytes):
            raise self._damaged(f"is cut off: {start + size - len(self._bytes)} bytes are missing")
        width = WIDTHS.get(dtype)
        due = -(-count * width // 8) if width else count * np.dtype(NUMPY[dtype]).itemsize
        if size != due:
            raise self._damaged(f"has {size} bytes at {offset} where {due} are due")
        raw = self._bytes[start : start + size]
        return unpack(raw, count, dtype) if width else np.frombuffer(raw, NUMPY[dtype])
