"""PyTorch's zip checkpoints (.bin, .pth, .pt) -> named arrays, without torch, running no code.

A checkpoint is a pickle of tensor descriptions beside raw storages in a zip, mostly uncompressed.
What is described is held against the file's size before any of it is read. Storages are
memory-mapped; each tensor is copied once, into MLX.
"""

import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_vlm_edge.errors import UsageError

from .torch_pickle import Storage, Tensor, UnknownNameError, describe

_MAX_PICKLE = 64 << 20  # the pickle has names and shapes only: some kilobytes per hundred tensors
_MAX_WORD = 64  # bytes of the byteorder member
# What the tensors of a file may take: some times its size, for views that overlap or repeat and for
# storages that were compressed, and this much in any case.
_TIMES, _ALWAYS = 4, 64 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_BAD_ZIP = (
    zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, NotImplementedError,
    RuntimeError, ValueError, OverflowError,
)  # fmt: skip


def read_torch(path: Path) -> dict[str, mx.array]:
    """Every tensor of a PyTorch zip checkpoint by name. Nothing in the file is executed.

    float64 becomes float32, which MLX computes in. Raises UsageError for a truncated or damaged
    file, the old format, TorchScript, a big-endian one, unknown types, a pickle that asks for
    anything but tensors, and tensors that take far more memory than the file.
    """
    with _reading(path), zipfile.ZipFile(path) as archive:
        members = {item.filename: item for item in archive.infolist()}
        root = _root(path, members)
        _check_byte_order(path, archive, members.get(f"{root}byteorder"))
        description = members[f"{root}data.pkl"]
        if description.file_size > _MAX_PICKLE:
            raise UsageError(f"{path}: a pickle of {description.file_size:,} bytes, not weights")
        tensors = _tensors(path, archive.read(description))
        _check_size(path, tensors)
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = _Reader(path, mapped, archive, members, f"{root}data/")
        return {name: reader.array(name, tensor) for name, tensor in tensors.items()}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """The one net for what a damaged zip makes zipfile raise."""
    try:
        yield
    except _BAD_ZIP as error:
        raise UsageError(_not_a_zip(path)) from error


def _root(path: Path, members: Mapping[str, zipfile.ZipInfo]) -> str:
    """The folder inside the zip ("pytorch_model/") that has data.pkl."""
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("data.pkl")]
    if len(roots) != 1:
        raise UsageError(f"{path}: a zip, but not a PyTorch checkpoint")
    if f"{roots[0]}constants.pkl" in members:
        raise UsageError(f"{path}: a TorchScript program; save its state_dict() and convert that")
    return roots[0]


def _check_byte_order(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo | None) -> None:
    if member is None:
        return
    if member.file_size > _MAX_WORD or archive.read(member).strip() != b"little":
        raise UsageError(f"{path}: written on a big-endian machine; save it as safetensors there")


def _not_a_zip(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK":
        return f"{path}: truncated or damaged; download it again"
    if start[:1] == b"\x80":
        return (
            f"{path}: the old PyTorch format (before 1.6); with torch, "
            "torch.save(torch.load(file, weights_only=True), file) writes the one read here"
        )
    return f"{path}: neither a PyTorch checkpoint nor safetensors"


def _tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors that a pickle describes."""
    try:
        state = describe(data)
    except UnknownNameError as error:
        raise UsageError(
            f"{path}: its pickle asks for {str(error)[:80]!a}, which no weights need; "
            "it was not run. Get the weights as safetensors, or from a source you trust"
        ) from None
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        reason = str(error)[:80]
        raise UsageError(f"{path}: a damaged pickle ({reason!a}); download it again") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise UsageError(f"{path}: not a state dict; save model.state_dict()")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            shown = ascii(name)[:80]
            raise UsageError(f"{path}: {shown} is not a tensor; save model.state_dict() alone")
    return state


def _check_size(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises UsageError when the distinct tensors together are far larger than the file."""
    total = sum(
        math.prod(tensor.shape) * np.dtype(tensor.storage.dtype.stored).itemsize
        for tensor in set(tensors.values())
    )
    size = path.stat().st_size
    if total > _TIMES * size + _ALWAYS:
        raise UsageError(
            f"{path}: {size:,} bytes that describe {total:,} bytes of weights; this is no "
            "checkpoint: get the weights as safetensors"
        )


class _Reader:
    """Storages of a mapped zip -> arrays."""

    def __init__(
        self, path: Path, mapped: mmap.mmap, archive: zipfile.ZipFile,
        members: Mapping[str, zipfile.ZipInfo], folder: str,
    ) -> None:  # fmt: skip
        self._path, self._mapped, self._archive = path, mapped, archive
        self._members, self._folder = members, folder
        self._read: dict[Tensor, mx.array] = {}
        self._unpacked: dict[str, bytes] = {}

    def array(self, name: str, tensor: Tensor) -> mx.array:
        """The array of one description. Raises UsageError when it reaches outside its storage."""
        if tensor not in self._read:
            self._read[tensor] = self._copy(name, tensor)
        return self._read[tensor]

    def _copy(self, name: str, tensor: Tensor) -> mx.array:
        storage, offset, shape, strides, negated = tensor
        flat = self._storage(name, storage)
        reach = sum((dim - 1) * stride for dim, stride in zip(shape, strides, strict=True))
        if math.prod(shape) and offset + reach >= flat.size:
            raise self._damaged(name)
        bytes_each = flat.itemsize
        view = np.lib.stride_tricks.as_strided(
            flat[offset:], shape, [stride * bytes_each for stride in strides], writeable=False
        )
        if storage.dtype.stored == "<f8":
            view = view.astype(np.float32)
        array = mx.array(np.ascontiguousarray(view).reshape(shape))
        if storage.dtype.kind is not None:
            array = array.view(getattr(mx, storage.dtype.kind))
        return -array if negated else array

    def _storage(self, name: str, storage: Storage) -> np.ndarray:
        """A whole storage as a flat array: on the mapped file, or unpacked where it is deflated."""
        member = self._members.get(f"{self._folder}{storage.key}")
        if member is None:
            raise self._damaged(name)
        dtype = np.dtype(storage.dtype.stored)
        count = member.file_size // dtype.itemsize
        if not count:
            return np.empty(0, dtype)
        if member.compress_type != zipfile.ZIP_STORED:
            return np.frombuffer(self._inflated(name, member), dtype, count)
        header = self._mapped[member.header_offset : member.header_offset + _LOCAL_HEADER.size]
        if len(header) < _LOCAL_HEADER.size:
            raise self._damaged(name)
        mark, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if mark != b"PK\x03\x04" or start + member.file_size > len(self._mapped):
            raise self._damaged(name)
        return np.frombuffer(self._mapped, dtype, count, start)

    def _inflated(self, name: str, member: zipfile.ZipInfo) -> bytes:
        """A compressed storage, unpacked once; all of them have one limit."""
        key = member.filename
        if key not in self._unpacked:
            size = sum(map(len, self._unpacked.values())) + member.file_size
            if size > _TIMES * len(self._mapped) + _ALWAYS:
                raise UsageError(f"{self._path}: unpacks to more than {size:,} bytes: not weights")
            try:
                self._unpacked[key] = self._archive.read(member)
            except _BAD_ZIP:
                raise self._damaged(name) from None
        return self._unpacked[key]

    def _damaged(self, name: str) -> UsageError:
        shown = name if name.isprintable() else ascii(name)
        return UsageError(f"{self._path}: the data of {shown[:200]} is damaged; download it again")
