"""The pickle inside a PyTorch checkpoint -> descriptions of its tensors. Nothing in it is run.

A machine of its own, with those of pickle's operations that a state dict needs. Every other one
and every name beyond ALLOWED is refused, keys are texts or numbers, and nothing that the pickle
builds is hashed, compared or shown, so that neither depth nor sharing costs anything. Operations
are counted.
"""

import operator
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_OPERATIONS = 1_000_000  # a tensor takes about 40
MAX_NUMBER = 1 << 53  # of an offset, a dimension or a stride
MAX_DIMS = 16


class UnknownNameError(Exception):
    """The pickle asks for something that no weights need: "os.system"."""


class Dtype(NamedTuple):
    """How a storage class is read (NumPy) and, where the two differ, what it is (MLX)."""

    stored: str
    kind: str | None = None


_STORAGES = {
    "FloatStorage": Dtype("<f4"),
    "DoubleStorage": Dtype("<f8"),
    "HalfStorage": Dtype("<f2"),
    "BFloat16Storage": Dtype("<u2", "bfloat16"),
    "BoolStorage": Dtype("?"),
    "ByteStorage": Dtype("u1"),
    "CharStorage": Dtype("i1"),
    "ShortStorage": Dtype("<i2"),
    "IntStorage": Dtype("<i4"),
    "LongStorage": Dtype("<i8"),
}


class Storage(NamedTuple):
    """One raw storage of the zip."""

    dtype: Dtype
    key: str


class Tensor(NamedTuple):
    """A view of a storage, negated where torch left that for later. Hashable, so that a view named
    twice is read once."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    negated: bool = False


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> Tensor:
    """torch._utils._rebuild_tensor_v2; `more`: requires_grad, hooks, metadata."""
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    where, sizes, steps = _numbers([offset])[0], _numbers(shape), _numbers(strides)
    if len(sizes) != len(steps):
        raise ValueError("a tensor of as many strides as dimensions is wanted")
    metadata = more[2] if len(more) > 2 else {}
    if not isinstance(metadata, dict) or not metadata.keys() <= {"neg", "conj"}:
        raise ValueError("a tensor with metadata that are not known")
    return Tensor(storage, where, sizes, steps, bool(metadata.get("neg")))  # conj: of real numbers


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or len(values) > MAX_DIMS:
        raise ValueError("the geometry of a tensor is no short tuple")
    if not all(type(value) is int and 0 <= value <= MAX_NUMBER for value in values):
        raise ValueError("the geometry of a tensor is out of range")
    return tuple(values)


def _parameter(tensor: Any, *_: Any) -> Any:
    """torch._utils._rebuild_parameter: the tensor itself."""
    return tensor


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    """collections.OrderedDict."""
    entries: dict[Any, Any] = {}
    _put(entries, [item for key, value in pairs for item in (key, value)])
    return entries


ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
}


def _put(entries: Any, items: list[Any]) -> None:
    """Keys and values in turn into a dict."""
    if type(entries) is not dict or len(items) % 2:
        raise ValueError("entries without a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):
            raise ValueError("a key that is no text")
        entries[key] = value


def _persistent(pid: Any) -> Storage:
    """("storage", dtype, key, device, length) -> the storage."""
    kind, dtype, key, *_ = pid
    if type(kind) is not str or kind != "storage" or type(key) is not str:
        raise ValueError("not the description of a storage")
    if not isinstance(dtype, Dtype):
        raise ValueError("a storage of no type")
    return Storage(dtype, key)


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8",
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}


class _Machine:
    """A stack, the marks in it, and the memo; one method for each operation that takes values."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.named: dict[str, Callable[[Any], Any]] = {
            "MARK": lambda _: self.marks.append(len(self.stack)),
            "POP": lambda _: self.stack.pop(),
            "POP_MARK": lambda _: self._since_mark(),
            "MEMOIZE": lambda _: operator.setitem(self.memo, len(self.memo), self.stack[-1]),
            "TUPLE": lambda _: self.stack.append(tuple(self._since_mark())),
            "LIST": lambda _: self.stack.append(self._since_mark()),
            "DICT": lambda _: self._dict(),
            "APPEND": lambda _: self._append(self._last(1)),
            "APPENDS": lambda _: self._append(self._since_mark()),
            "SETITEM": lambda _: self._set(self._last(2)),
            "SETITEMS": lambda _: self._set(self._since_mark()),
            "GLOBAL": self._global,
            "STACK_GLOBAL": lambda _: self._global(" ".join(self._last(2))),
            "REDUCE": lambda _: self._reduce(),
            "BUILD": lambda _: self._build(),
            "BINPERSID": lambda _: self.stack.append(_persistent(self.stack.pop())),
        }

    def step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _TUPLES:
            self.stack.append(tuple(self._last(_TUPLES[name])))
        elif name in _GETS:
            self.stack.append(self.memo[argument])
        elif name in _PUTS:
            if argument > MAX_OPERATIONS:
                raise ValueError("a memo number out of range")
            self.memo[argument] = self.stack[-1]
        elif name in self.named:
            self.named[name](argument)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"an operation {name}, which no weights need")

    def _last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("the stack is empty")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _dict(self) -> None:
        items, entries = self._since_mark(), dict[Any, Any]()
        _put(entries, items)
        self.stack.append(entries)

    def _append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("items without a list")
        self.stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        _put(self.stack[-1], items)

    def _global(self, argument: str) -> None:
        name = ".".join(argument.split(" ", 1))
        if name not in ALLOWED:
            raise UnknownNameError(name)
        self.stack.append(ALLOWED[name])

    def _reduce(self) -> None:
        function, arguments = self._last(2)
        if function not in (_ordered, _tensor, _parameter) or type(arguments) is not tuple:
            raise ValueError("a call that no weights need")
        self.stack.append(function(*arguments))

    def _build(self) -> None:
        """What a state dict carries as attributes (`_metadata`) is left out."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise ValueError("attributes of what has none")


def describe(data: bytes) -> Any:
    """What the pickle builds, of dicts, lists, tuples, texts, numbers and Tensors.

    Raises UnknownNameError, or ValueError, LookupError or TypeError for what is damaged.
    """
    machine = _Machine()
    for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if count >= MAX_OPERATIONS:
            raise ValueError(f"more than {MAX_OPERATIONS:,} operations")
        if operation.name == "STOP":
            break
        machine.step(operation.name, argument)
    return machine.stack.pop()
