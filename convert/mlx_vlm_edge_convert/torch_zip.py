"""PyTorch's zip checkpoints (.bin, .pth, .pt) -> named arrays, without torch, running no code.

A checkpoint is a pickle of tensor descriptions beside raw storages, all stored uncompressed in a
zip. The unpickler here knows the few names a state dict needs and refuses every other one, so a
hostile file can build descriptions and nothing else. Storages are memory-mapped; each tensor is
copied once, into MLX.
"""

import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_vlm_edge.errors import UsageError

_MAX_PICKLE = 64 << 20  # the pickle has names and shapes only: some kilobytes per hundred tensors
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_DAMAGED = (
    pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError, KeyError,
    OverflowError, MemoryError,
)  # fmt: skip


class _Dtype(NamedTuple):
    """How a storage class is read (NumPy) and, where the two differ, what it is (MLX)."""

    stored: str
    kind: str | None = None


_STORAGES = {
    "FloatStorage": _Dtype("<f4"),
    "DoubleStorage": _Dtype("<f8"),
    "HalfStorage": _Dtype("<f2"),
    "BFloat16Storage": _Dtype("<u2", "bfloat16"),
    "BoolStorage": _Dtype("?"),
    "ByteStorage": _Dtype("u1"),
    "CharStorage": _Dtype("i1"),
    "ShortStorage": _Dtype("<i2"),
    "IntStorage": _Dtype("<i4"),
    "LongStorage": _Dtype("<i8"),
}


class _Storage(NamedTuple):
    """One raw storage of the zip, as the pickle describes it."""

    dtype: _Dtype
    key: str


class _Tensor(NamedTuple):
    """A view of a storage. Hashable, so that a view named twice is read once."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Rebuild:
    """Stands in for torch._utils._rebuild_tensor_v2: describes the tensor, reads nothing.

    No attributes can be set on it, so that a pickle cannot change it either.
    """

    __slots__ = ()

    def __call__(
        self, storage: _Storage, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any
    ) -> _Tensor:
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _Parameter:
    """Stands in for torch._utils._rebuild_parameter: the tensor itself."""

    __slots__ = ()

    def __call__(self, tensor: _Tensor, *_: Any) -> _Tensor:
        return tensor


_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(),
    ("torch._utils", "_rebuild_parameter"): _Parameter(),
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Refuses every global but those of a state dict; every import of a pickle passes here."""

    def __init__(self, data: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UsageError(
                f"{self._path}: its pickle asks for {module}.{name}, which no weights need; "
                "it was not run. Get the weights as safetensors, or from a source you trust"
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, _Dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("not the description of a storage")
        return _Storage(dtype, key)


def read_torch(path: Path) -> dict[str, mx.array]:
    """Every tensor of a PyTorch zip checkpoint by name. Nothing in the file is executed.

    float64 becomes float32, which MLX computes in. Raises UsageError for a truncated or damaged
    file, the old format, TorchScript, a big-endian one, unknown types, and a pickle that asks for
    anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {item.filename: item for item in archive.infolist()}
            root = _root(path, members)
            _check_byte_order(path, archive, f"{root}byteorder")
            description = members[f"{root}data.pkl"]
            if description.file_size > _MAX_PICKLE:
                raise UsageError(
                    f"{path}: a pickle of {description.file_size:,} bytes, not weights"
                )
            data = archive.read(description)
    except zipfile.BadZipFile as error:
        raise UsageError(_not_a_zip(path)) from error
    tensors = _describe(path, data)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = _Reader(path, mapped, members, f"{root}data/")
    return {name: reader.array(name, tensor) for name, tensor in tensors.items()}


def _root(path: Path, members: Mapping[str, zipfile.ZipInfo]) -> str:
    """The folder inside the zip ("pytorch_model/") that has data.pkl."""
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("data.pkl")]
    if len(roots) != 1:
        raise UsageError(f"{path}: a zip, but not a PyTorch checkpoint")
    if f"{roots[0]}constants.pkl" in members:
        raise UsageError(f"{path}: a TorchScript program; save its state_dict() and convert that")
    return roots[0]


def _check_byte_order(path: Path, archive: zipfile.ZipFile, member: str) -> None:
    if member in archive.namelist() and archive.read(member).strip() != b"little":
        raise UsageError(f"{path}: written on a big-endian machine; save it as safetensors there")


def _not_a_zip(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK":
        return f"{path}: truncated; download it again"
    if start[:1] == b"\x80":
        return (
            f"{path}: the old PyTorch format (before 1.6); with torch, "
            "torch.save(torch.load(file, weights_only=True), file) writes the one read here"
        )
    return f"{path}: neither a PyTorch checkpoint nor safetensors"


def _describe(path: Path, data: bytes) -> dict[str, _Tensor]:
    """The tensors that a pickle describes."""
    try:
        _check_memo(data)
        found = _Unpickler(data, path).load()
    except _DAMAGED as error:
        raise UsageError(f"{path}: a damaged pickle ({error}); download it again") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise UsageError(f"{path}: not a state dict; save model.state_dict()")
    for name, tensor in found.items():
        if not isinstance(name, str) or not _is_tensor(tensor):
            raise UsageError(f"{path}: {name!r} is not a tensor; save model.state_dict() alone")
    return found


def _is_tensor(found: Any) -> bool:
    """Whether an entry of the pickle is a well-formed description of a tensor."""
    if not isinstance(found, _Tensor) or not isinstance(found.storage, _Storage):
        return False
    numbers = (found.offset, *found.shape, *found.strides)
    whole = all(type(number) is int and number >= 0 for number in numbers)
    return whole and len(found.shape) == len(found.strides)


def _check_memo(data: bytes) -> None:
    """Refuse memo numbers far beyond the pickle's length: they make the unpickler allocate."""
    for _, argument, _ in (op for op in pickletools.genops(data) if "PUT" in op[0].name):
        if isinstance(argument, int) and argument > len(data):
            raise pickle.UnpicklingError("a memo number out of range")


class _Reader:
    """Storages of a mapped zip -> arrays."""

    def __init__(
        self, path: Path, mapped: mmap.mmap, members: Mapping[str, zipfile.ZipInfo], folder: str
    ) -> None:
        self._path, self._mapped, self._members, self._folder = path, mapped, members, folder
        self._read: dict[_Tensor, mx.array] = {}

    def array(self, name: str, tensor: _Tensor) -> mx.array:
        """The array of one description. Raises UsageError when it reaches outside its storage."""
        if tensor not in self._read:
            self._read[tensor] = self._copy(name, tensor)
        return self._read[tensor]

    def _copy(self, name: str, tensor: _Tensor) -> mx.array:
        storage, offset, shape, strides = tensor
        flat = self._storage(name, storage)
        reach = sum((dim - 1) * stride for dim, stride in zip(shape, strides, strict=True))
        size = math.prod(shape)
        if size and (offset + reach >= flat.size or size > flat.size):
            raise self._damaged(name)
        bytes_each = flat.itemsize
        view = np.lib.stride_tricks.as_strided(
            flat[offset:], shape, [stride * bytes_each for stride in strides], writeable=False
        )
        if storage.dtype.stored == "<f8":
            return mx.array(view.astype(np.float32))
        array = mx.array(np.ascontiguousarray(view).reshape(shape))
        kind = storage.dtype.kind
        return array if kind is None else array.view(getattr(mx, kind))

    def _storage(self, name: str, storage: _Storage) -> np.ndarray:
        """A whole storage as a flat array on the mapped file."""
        member = self._members.get(f"{self._folder}{storage.key}")
        if member is None or member.compress_type != zipfile.ZIP_STORED:
            raise self._damaged(name)
        header = self._mapped[member.header_offset : member.header_offset + _LOCAL_HEADER.size]
        if len(header) < _LOCAL_HEADER.size:
            raise self._damaged(name)
        mark, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if mark != b"PK\x03\x04" or start + member.file_size > len(self._mapped):
            raise self._damaged(name)
        dtype = np.dtype(storage.dtype.stored)
        count = member.file_size // dtype.itemsize
        return np.frombuffer(self._mapped, dtype, count, start)

    def _damaged(self, name: str) -> UsageError:
        return UsageError(f"{self._path}: the data of {name} is damaged; download it again")
