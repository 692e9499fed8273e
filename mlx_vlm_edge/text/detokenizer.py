"""Token ids, one at a time -> text, in whole characters only."""

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Detokenizer:
    """Text of an answer as it comes; tokens that are `hidden` have none.

    All pieces and `finish()` together are exactly the `decode` of all ids; `unspaced`, without the
    space that it may begin with.
    """

    def __init__(
        self, text: "ByteLevelText | WindowText", hidden: frozenset[int], unspaced: bool = False
    ) -> None:
        self._text = text
        self._hidden = hidden
        self._unspaced = unspaced

    def add(self, token: int) -> str:
        """The characters that `token` completes, maybe none."""
        return "" if token in self._hidden else self._without_space(self._text.add(token))

    def finish(self) -> str:
        """What is left at the end; half a character becomes U+FFFD."""
        return self._without_space(self._text.finish())

    def _without_space(self, text: str) -> str:
        if self._unspaced and text:
            self._unspaced = False
            return text.removeprefix(" ")
        return text


@cache
def byte_of() -> dict[str, int]:
    """Byte-level BPE's alphabet -> the bytes: printable Latin-1 stands for itself, the rest
    for 256 onwards in order (Ġ, U+0120, is the space)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(rest)
    }


class ByteLevelText:
    """Byte-level BPE: tokens are bytes, put through an incremental UTF-8 decoder.

    literal: the added tokens, whose text is no byte alphabet: "đem" is three letters.
    """

    def __init__(self, backend: "Backend", literal: Mapping[int, str]) -> None:
        self._token = backend.id_to_token
        self._literal = literal
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        if (literal := self._literal.get(token)) is not None:
            return self._decoder.decode(literal.encode())
        text, table = self._token(token) or "", byte_of()
        if all(character in table for character in text):
            return self._decoder.decode(bytes(table[character] for character in text))
        return self._decoder.decode(text.encode())

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowText:
    """Any other tokenizer: what decoding with the new tokens adds to decoding without them.

    A run of byte tokens (<0xE2>) waits for its end, since its decoding depends on all of it.
    """

    def __init__(self, backend: "Backend", decode: Callable[[Sequence[int]], str]) -> None:
        self._token = backend.id_to_token
        self._decode = decode
        self._shown: list[int] = []
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        self._waiting.append(token)
        name = self._token(token)
        return "" if name is None or BYTE_TOKEN.fullmatch(name) else self.finish()

    def finish(self) -> str:
        before = self._decode(self._shown)
        text = self._decode(self._shown + self._waiting)[len(before) :]
        if text or not before:
            self._shown = self._waiting if text and before else self._shown + self._waiting
        self._waiting = []
        return text
