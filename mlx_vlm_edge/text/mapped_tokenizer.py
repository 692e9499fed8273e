"""Text -> token ids by arrays that are mapped, in the place of the library's tokenizer.

The library itself normalises, splits into words and takes out added tokens, with a vocabulary of
256 bytes that is there at once; the merges of a word are looked up here. Long texts, and all else
that is asked of a tokenizer, wait for the whole one, which is read when that happens.
"""

import heapq
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from . import mapped_file
from .detokenizer import byte_of
from .mapped_file import SPECIAL, Arrays

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

LONG = 20_000  # characters from which on reading the whole tokenizer takes less time
REMEMBERED = 50_000  # words whose ids are kept


class Encoded(NamedTuple):
    ids: list[int]


class MappedTokenizer:
    """Stands for a `tokenizers.Tokenizer` whose file is known. parse: reads the whole one."""

    def __init__(self, arrays: Arrays, parse: "Callable[[], Backend]") -> None:
        from tokenizers import Tokenizer as Backend

        self._arrays, self._parse, self._lock = arrays, parse, Lock()
        head = arrays.head
        self._spell = Backend.from_str(json.dumps(head["spelling"]))
        self._added: list[int] = head["added"]
        contents = [entry["content"] for entry in head["spelling"]["added_tokens"]]
        self._ids = dict(zip(contents, self._added, strict=True))
        self._contents = dict(zip(self._added, contents, strict=True))
        self._words: dict[bytes, list[int]] = {}
        self.encode_special_tokens = False
        self.model = SimpleNamespace(unk_token=head["unknown"])
        self.pre_tokenizer, self.decoder = self._spell.pre_tokenizer, _decoder(head["decoder"])

    @cached_property
    def whole(self) -> "Backend":
        """The library's own."""
        with self._lock:
            backend = self.__dict__.get("whole") or self._parse()
            backend.no_truncation()
            backend.no_padding()
            self.__dict__["whole"] = backend
            return backend

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.whole, name)

    def no_truncation(self) -> None:
        """Nothing is cut off here anyway."""

    no_padding = no_truncation

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        return int(self._arrays.head["sizes_of_vocabulary"][with_added_tokens])

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        spelled = self._spell.get_added_tokens_decoder()
        return {self._added[id - SPECIAL]: token for id, token in spelled.items()}

    def token_to_id(self, token: str) -> int | None:
        id = self._ids.get(token)
        return self._arrays.id_of(token) if id is None else id

    def id_to_token(self, id: int) -> str | None:
        return self._contents.get(id) or self._arrays.text_of(id)

    def encode(self, text: str, add_special_tokens: bool = True) -> Any:
        """What the library's `encode` gives, of which `ids` alone are there."""
        if not text:
            return Encoded(list(self._arrays.head["empty"]) if add_special_tokens else [])
        if add_special_tokens or len(text) > LONG or "whole" in self.__dict__:
            self.whole.encode_special_tokens = self.encode_special_tokens
            return self.whole.encode(text, add_special_tokens=add_special_tokens)
        self._spell.encode_special_tokens = self.encode_special_tokens
        spelled = self._spell.encode(text, add_special_tokens=False)
        ids: list[int] = []
        for _, run in groupby(zip(spelled.word_ids, spelled.ids, strict=True), itemgetter(0)):
            letters = [id for _, id in run]
            if letters[0] >= SPECIAL:
                ids += [self._added[id - SPECIAL] for id in letters]
            else:
                ids += self._of_word(bytes(letters))
        return Encoded(ids)

    def _of_word(self, word: bytes) -> list[int]:
        if (ids := self._words.get(word)) is None:
            if len(self._words) >= REMEMBERED:
                self._words.clear()
            whole = self._whole(word)
            ids = self._words[word] = self._merged(word) if whole is None else [whole]
        return ids

    def _whole(self, word: bytes) -> int | None:
        """The id of a word that is a token, where the library looks for that before it merges."""
        if not self._arrays.head["whole_words"]:
            return None
        return self._arrays.id_of("".join(_letters()[byte] for byte in word))

    def _merged(self, word: bytes) -> list[int]:
        """The ids of a word, as the library's BPE has them: of all pairs that may be merged the one
        of lowest rank first, of equals the first. An entry of the queue counts while the pair at
        its place still comes to the same token.
        """
        arrays = self._arrays
        ids = [arrays.letters[byte] for byte in word]
        end = len(ids)
        after, before = list(range(1, end + 1)), list(range(-1, end - 1))
        queue: list[tuple[int, int, int]] = []

        def ask(left: int, right: int) -> None:
            if left >= 0 and right < end and (merge := arrays.pair(ids[left], ids[right])):
                heapq.heappush(queue, (merge[0], left, merge[1]))

        for place in range(end - 1):
            ask(place, place + 1)
        while queue:
            _, place, merged = heapq.heappop(queue)
            right = after[place]
            if ids[place] < 0 or right >= end:
                continue
            pair = arrays.pair(ids[place], ids[right])
            if pair is None or pair[1] != merged:
                continue
            ids[place], ids[right], after[place] = merged, -1, after[right]
            if after[place] < end:
                before[after[place]] = place
            ask(before[place], place)
            ask(place, after[place])
        return [id for id in ids if id >= 0]


@cache
def _letters() -> list[str]:
    """The character that stands for each byte."""
    return sorted(byte_of(), key=byte_of().__getitem__)


def _decoder(byte_level: bool) -> Any:
    from tokenizers.decoders import ByteLevel

    return ByteLevel() if byte_level else None


def whole(backend: Any) -> "Backend":
    """The library's tokenizer, which a mapped one stands for."""
    return backend.whole if isinstance(backend, MappedTokenizer) else backend


def known(path: Path, parse: "Callable[[], Backend]") -> MappedTokenizer | None:
    """The tokenizer of a tokenizer.json that the cache knows; None where it does not."""
    content = _content(path)
    arrays = None if content is None else mapped_file.read(mapped_file.content_key(content))
    try:
        return None if arrays is None else MappedTokenizer(arrays, parse)
    except Exception:  # noqa: BLE001  (the library raises nothing narrower)
        return None


def remember(path: Path) -> bool:
    """Put a tokenizer.json into the cache where it is worth it; whether it is there now.

    A tokenizer is left out, and not tried again, whose ids the arrays cannot give exactly, or did
    not for some texts.
    """
    content = _content(path)
    if content is None:
        return False
    key = mapped_file.content_key(content)
    if mapped_file.read(key) is not None:
        return True
    unfit = mapped_file.unfit_path(key)
    try:
        if unfit.exists():
            return False
        with mapped_file.writing(key) as put:
            packed = _packed(content)
            if packed is None or len(packed) > mapped_file.MOST:
                unfit.touch(0o600)
                return False
            put(packed)
    except (OSError, MemoryError):  # a cache that cannot be written, or no room just now
        return False
    return True


def _content(path: Path) -> bytes | None:
    """A tokenizer.json whose size makes it worth the trouble."""
    try:
        size = path.stat().st_size
        return path.read_bytes() if mapped_file.LEAST <= size <= mapped_file.MOST else None
    except OSError:
        return None


def _packed(content: bytes) -> bytes | None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.decoders import ByteLevel

    try:
        text = content.decode()
        spec = json.loads(text)
        mapped_file.check(spec)
        backend = Backend.from_str(text)
        backend.no_truncation()
        backend.no_padding()
        added = [backend.token_to_id(entry["content"]) for entry in spec["added_tokens"]]
        sizes = [backend.get_vocab_size(with_added_tokens=more) for more in (False, True)]
        packed = mapped_file.pack(spec, {
            "spelling": mapped_file.spelling(spec), "added": added, "sizes_of_vocabulary": sizes,
            "unknown": spec["model"].get("unk_token"),
            "decoder": isinstance(backend.decoder, ByteLevel), "empty": backend.encode("").ids,
        })  # fmt: skip
        mapped = MappedTokenizer(Arrays(memoryview(packed)), lambda: backend)
        return packed if _agree(mapped, backend) else None
    except MemoryError:  # which says nothing of the tokenizer
        raise
    except Exception:  # noqa: BLE001  (the library raises nothing narrower; it has the last word)
        return None


def _agree(mapped: MappedTokenizer, backend: "Backend") -> bool:
    """Whether both know the same added tokens and give the same ids for some texts."""
    theirs = backend.get_added_tokens_decoder()
    ours = mapped.get_added_tokens_decoder()
    if {id: str(token) for id, token in ours.items()} != {i: str(t) for i, t in theirs.items()}:
        return False
    for special in (False, True):
        mapped.encode_special_tokens = backend.encode_special_tokens = special
        for text in _samples([token.content for token in theirs.values()]):
            if mapped.encode(text, False).ids != backend.encode(text, add_special_tokens=False).ids:
                return False
    return True


PARTS = (
    "the", " The", "ing", "  ", "\n", "\n\n    ", "\t", "1234", "3.14", "é", "e\u0301", "日本語",
    "한국", "🙂", "def f(x):", "<", "|>", "'s", "don't", "_", "\u200b", "\ufdd0", "\0", "aaaaaaaa",
    "ſ", "Ǆ", "ﬁ", "١",
)  # fmt: skip


def _samples(added: Sequence[str], count: int = 300) -> Iterator[str]:
    import random

    chosen = random.Random(0)
    for _ in range(count):
        yield "".join(chosen.choices([*PARTS, *added], k=chosen.randint(1, 12)))
