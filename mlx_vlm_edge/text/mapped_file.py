"""A byte-level BPE tokenizer.json -> sorted arrays in one file of the user's cache, which is mapped
and not parsed: 11 MB of JSON take half a second, which nothing else of Python runs beside.

Named by the JSON's hash, so that a file that changes is another one. What is damaged, of another
version or not there is made again; what the arrays cannot say exactly is left to the library.
"""

import json
import os
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import whole_file
from ..paths import user_cache
from .detokenizer import byte_of

MAGIC, VERSION = b"mlxvebpe", 1
LEAST, MOST = 2 << 20, 64 << 20  # bytes of a tokenizer.json: less is parsed as fast
CACHE_BYTES = 256 << 20  # of all files together; the oldest leave
DIGEST = 32
START = len(MAGIC) + DIGEST
KINDS = "QIIIBQII"  # of the arrays, in their order in `Arrays`
SPECIAL = 256  # the spelling tokenizer's ids: bytes, then added tokens


class UnfitError(Exception):
    """A tokenizer that arrays cannot stand for."""


class Arrays:
    """What a file holds, as views of its bytes. Raises ValueError for bytes that are no such file.

    pairs: left id << 32 | right id of every merge, ascending; ranks and merged: which merge that
    is, and the id that comes of it. texts of ids lie in `text` between `offsets`. hashes: of the
    texts, ascending, and the ids they belong to. letters: ids of the 256 bytes. head: the rest.
    """

    def __init__(self, content: memoryview) -> None:
        if content[: len(MAGIC)] != MAGIC:
            raise ValueError("not a mapped tokenizer")
        if _digest(content[START:]) != content[len(MAGIC) : START]:
            raise ValueError("damaged")
        (length,) = struct.unpack_from("<Q", content, START)
        at = START + 8
        self.head: dict[str, Any] = json.loads(bytes(content[at : at + length]))
        if self.head["version"] != VERSION:
            raise ValueError("of another version")
        at += length
        views = []
        for size, kind in zip(self.head["sizes"], KINDS, strict=True):
            views.append(content[at : at + size].cast(kind))  # type: ignore[call-overload]
            at += size + -size % 8
        self.pairs, self.ranks, self.merged, self.offsets, self.text = views[:5]
        self.hashes, self.owners, self.letters = views[5:]

    def pair(self, left: int, right: int) -> tuple[int, int] | None:
        """Rank and result of the merge of two tokens, where there is one."""
        wanted = left << 32 | right
        at = bisect_left(self.pairs, wanted)
        if at == len(self.pairs) or self.pairs[at] != wanted:
            return None
        return self.ranks[at], self.merged[at]

    def text_of(self, id: int) -> str | None:
        """The text of an id, None where the vocabulary has a hole."""
        if not 0 <= id < len(self.offsets) - 1:
            return None
        text = bytes(self.text[self.offsets[id] : self.offsets[id + 1]])
        return text.decode() or None

    def id_of(self, text: str) -> int | None:
        wanted = _hash(text.encode())
        at = bisect_left(self.hashes, wanted)
        while at < len(self.hashes) and self.hashes[at] == wanted:
            if self.text_of(self.owners[at]) == text:
                return self.owners[at]
            at += 1
        return None


def content_key(content: bytes) -> str:
    """What stands for a tokenizer.json in the cache."""
    return _digest(content).hex()


def path_of(key: str) -> Path:
    """Where the cache has, or would have, the file of a tokenizer.json."""
    return user_cache() / "mlx-vlm-edge" / "tokenizers" / f"{key}.{VERSION}"


def read(key: str) -> Arrays | None:
    """The arrays of a tokenizer.json, None where the cache has none or a damaged file."""
    import mmap

    try:
        with path_of(key).open("rb") as file:
            if os.fstat(file.fileno()).st_size > MOST:
                return None
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return Arrays(memoryview(mapped))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error):
        return None


def write(key: str, content: bytes) -> None:
    """Put a file into the cache, and the oldest out where that gets too large. Raises OSError."""
    with writing(key) as put:
        put(content)


@contextmanager
def writing(key: str) -> Iterator[Callable[[bytes], None]]:
    """`write` with a function for the content; a cache that cannot be written raises OSError before
    anybody makes any."""
    path = path_of(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file.replacing(path, 0o600) as put:
        yield put
    others = [other for other in path.parent.iterdir() if other.is_file()]
    others.sort(key=lambda other: other.stat().st_mtime, reverse=True)
    total = 0
    for other in others:
        total += other.stat().st_size
        if total > CACHE_BYTES and other != path:
            other.unlink(missing_ok=True)


def unfit_path(key: str) -> Path:
    """An empty file, where arrays are known not to stand for a tokenizer.json."""
    return path_of(key).with_suffix(f".{VERSION}-unfit")


def spelling(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json with the same normaliser, words and added tokens, that spells words in
    bytes: ids 0 to 255, added tokens in their order from SPECIAL on."""
    added = [entry | {"id": SPECIAL + index} for index, entry in enumerate(spec["added_tokens"])]
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "vocab": byte_of(), "merges": [],
    }  # fmt: skip
    nothing = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    same = {name: spec.get(name) for name in ("version", "normalizer", "pre_tokenizer")}
    return {**same, **nothing, "added_tokens": added, "model": model}


def pack(spec: Mapping[str, Any], more: Mapping[str, Any]) -> bytes:
    """The file of a tokenizer.json that `check` lets through. more: what else is in its head."""
    import numpy as np

    model = spec["model"]
    vocab: dict[str, int] = model["vocab"]
    size = max(vocab.values()) + 1
    texts = [b""] * size
    for text, id in vocab.items():
        texts[id] = text.encode()
    ranks = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks[vocab[left] << 32 | vocab[right]] = rank, vocab[left + right]  # of two the last
    pairs = np.array(sorted(ranks), np.uint64)
    orders = np.array([ranks[pair] for pair in pairs.tolist()], np.uint32).reshape(-1, 2)
    hashes = np.array([_hash(texts[id]) for id in vocab.values()], np.uint64)
    owners = np.array(list(vocab.values()), np.uint32)
    order = np.argsort(hashes, kind="stable")
    offsets = np.zeros(size + 1, np.uint32)
    offsets[1:] = np.cumsum([len(text) for text in texts])
    letters = {byte: vocab[letter] for letter, byte in byte_of().items()}
    arrays: list[Any] = [
        pairs, np.ascontiguousarray(orders[:, 0]), np.ascontiguousarray(orders[:, 1]), offsets,
        np.frombuffer(b"".join(texts), np.uint8), hashes[order], owners[order],
        np.array([letters[byte] for byte in range(256)], np.uint32),
    ]  # fmt: skip
    head = {"version": VERSION, "sizes": [array.nbytes for array in arrays],
            "whole_words": bool(model.get("ignore_merges")), **more}  # fmt: skip
    return _framed(head, [array.tobytes() for array in arrays])


def _framed(head: Mapping[str, Any], parts: Sequence[bytes]) -> bytes:
    written = json.dumps(head).encode()
    written += b" " * (-len(written) % 8)
    padded = b"".join(part + bytes(-len(part) % 8) for part in parts)
    rest = struct.pack("<Q", len(written)) + written + padded
    return MAGIC + _digest(rest) + rest


def check(spec: Mapping[str, Any]) -> None:
    """Raises UnfitError for a tokenizer.json that arrays cannot stand for."""
    model, letters = spec["model"], byte_of()
    vocab: Mapping[str, int] = model["vocab"]
    added = {entry["content"] for entry in spec["added_tokens"]}
    unfit = (
        model.get("type") != "BPE"
        or any(model.get(name) for name in ("dropout", "byte_fallback"))
        or any(model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix"))
        or "ByteLevel" not in _kinds(spec.get("pre_tokenizer"))
        or not letters.keys() <= vocab.keys()
        or "" in vocab
        or not added.isdisjoint(letters)
        or len(added) != len(spec["added_tokens"])
        or len(set(vocab.values())) != len(vocab)
    )
    if unfit:
        raise UnfitError


def _kinds(step: Any) -> Iterator[str]:
    """The types of a pre-tokenizer and of the parts it is made of."""
    if step:
        yield step["type"]
        for part in step.get("pretokenizers", ()):
            yield from _kinds(part)


def _digest(content: bytes | memoryview) -> bytes:
    from hashlib import blake2b

    return blake2b(content, digest_size=DIGEST).digest()


def _hash(text: bytes) -> int:
    from hashlib import blake2b

    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")
