"""Sound bytes and JSON in, spoiled ones out; the same for the same random generator."""

import copy
import json
import math
import random
import struct
from typing import Any

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62)
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 1 << 31, 1 << 63, 10**30, 0.5, -0.0, 1e308, math.nan, math.inf,
    -math.inf, "", "x", "7", "a" * 3000, "\x1b[31m\n", "\ud800", "../../x", "/etc/passwd", [], {},
    [[]], [1, 2], [None], ["x"], {"a": {}}, {"": 1}, {"type": "x"}, [0.5, math.nan, 1],
)  # fmt: skip


def spoiled(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, doubled, added or cut off."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        if rng.random() < 0.5:
            at = min(at, rng.randrange(400))  # headers are at the front
        way = rng.randrange(7)
        if way == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            number = rng.choice(NUMBERS)
            form = rng.choice("<>") + rng.choice("HIQ")
            width = struct.calcsize(form)
            content[at : at + width] = struct.pack(form, number & ((1 << 8 * width) - 1))
        elif way == 2:
            del content[at : at + rng.randint(1, 40)]
        elif way == 3:
            content[at:at] = content[at : at + rng.randint(1, 200)]
        elif way == 4:
            content[at:at] = rng.randbytes(rng.randint(1, 9))
        elif way == 5 and rng.random() < 0.3:
            del content[at:]
        elif way == 6:
            content[at : at + rng.randint(1, 8)] = rng.randbytes(rng.randint(1, 8))
    return bytes(content)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every entry in a JSON value, but for those of long lists."""
    found = [path] if path else []
    if len(path) > 12:
        return found
    entries = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        entries = list(enumerate(value))[:6]
    for key, item in entries:
        found += places(item, (*path, key))
    return found


def odd(value: Any, rng: random.Random) -> Any:
    """A JSON object with one to three of its entries replaced, left out, doubled or moved."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        paths = places(value)
        if not paths:
            return value
        *path, last = rng.choice(paths)
        holder = value
        for key in path:
            holder = holder[key]
        way = rng.randrange(8)
        if way == 0:
            del holder[last]
        elif way == 1:
            holder[last] = [holder[last]]
        elif way == 2 and isinstance(holder[last], int | float):
            holder[last] = rng.choice((holder[last] * 1000, -holder[last], holder[last] + 1))
        elif way == 3 and isinstance(holder, dict):
            holder[rng.choice(("mode", "type", "model_type", "x"))] = holder[last]
        elif way == 4:
            holder[last] = _nested(rng.choice((5, 5, 5, 3000)))
        else:
            holder[last] = copy.deepcopy(rng.choice(ODD))
    return value


def _nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def written(value: Any) -> str:
    """JSON text of a value that may be too deep for json itself."""
    try:
        return json.dumps(value)
    except RecursionError:
        return '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
