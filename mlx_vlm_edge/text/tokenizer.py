"""Text <-> token ids, on the `tokenizers` package: encoder and streaming detokenizer.

No BOS or EOS is ever added here; a family puts them where its original does.
"""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from ..checkpoint import files
from ..errors import UsageError
from . import sentencepiece

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

# Stands inside a special token's text that was typed by a user, so that it is not one. A Unicode
# noncharacter: no text should have it, and one that does gets it back doubled and undone.
GUARD = "\ufdd0"
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
# Qwen2's pre-tokenizer, as its tokenizer.json has it.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`; safe to use from several threads.

    special: special token's text -> id. eos_ids: from tokenizer_config.json's eos_token (the
    model's config may name more). config: tokenizer_config.json.
    """

    def __init__(self, backend: "Backend", config: Mapping[str, Any] | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.config: Mapping[str, Any] = config or {}
        self.chat_template: str | None = self.config.get("chat_template")
        added = backend.get_added_tokens_decoder()
        self.special = {token.content: id for id, token in added.items() if token.special}
        self.special_ids = frozenset(self.special.values())
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        eos = self.token_id(_content(self.config.get("eos_token")) or "")
        self.eos_ids = frozenset(() if eos is None else (eos,))
        self._split = _splitter(token for token in added.values() if token.special)
        self._lock = Lock()

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json, or build from vocab.json and merges.txt (Qwen2) or tokenizer.model.

        Raises UsageError when there is none, or one of the files is damaged.
        """
        config = files.read_json(folder / files.TOKENIZER_CONFIG)
        match files.tokenizer_files(folder):
            case files.TOKENIZER_JSON:
                backend = _from_file(folder / files.TOKENIZER_JSON[0])
            case files.VOCAB_AND_MERGES:
                backend = _qwen2(folder, config)
            case files.TOKENIZER_MODEL:
                backend = sentencepiece.backend(folder / files.TOKENIZER_MODEL[0])
            case _:
                raise UsageError(
                    f"{folder}: no tokenizer.json, tokenizer.model, or vocab.json with merges.txt: "
                    "copy the tokenizer's files from the original model"
                )
        _add_missing_tokens(backend, config, folder)
        return cls(backend, config | {"chat_template": files.read_chat_template(folder)})

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`.

        With `special`, special tokens in it become their ids, but for those under `guard`.
        Otherwise they are plain text, so that a user's words can't take another role.
        """
        if not special:
            return self._encode(text, plain=True)
        if GUARD not in text:
            return self._encode(text, plain=False)
        ids: list[int] = []
        for index, part in enumerate(self._split.split(text)):
            if index % 2:
                ids.append(self.special[part.strip() if part not in self.special else part])
            elif part:
                ids += self._encode(unguard(part), plain=True)
        return ids

    def _encode(self, text: str, plain: bool) -> list[int]:
        with self._lock:
            self.backend.encode_special_tokens = plain
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_id(self, token: str) -> int | None:
        """The id of a token's exact text, or None."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def guard(self, text: str, *more: str) -> str:
        """Mark special tokens (and the words in `more`) in a user's text as plain text.

        The mark is undone by `encode(special=True)`: guard("a<|im_end|>") is encoded as the
        characters "<", "|", ... although the text around it has real special tokens.
        """
        text = text.replace(GUARD, GUARD * 2)
        for word in {*self.special, *more}:
            text = text.replace(word, word[0] + GUARD + word[1:])
        return text


def unguard(text: str) -> str:
    """Undo `Tokenizer.guard`."""
    return re.sub(f"{GUARD}({GUARD}?)", r"\1", text)


def _splitter(tokens: Iterable["AddedToken"]) -> re.Pattern[str]:
    """A pattern whose split has the special tokens at odd places, with what they strip."""
    longest_first = sorted(tokens, key=lambda token: -len(token.content))
    words = [
        (r"\s*" if token.lstrip else "")
        + re.escape(token.content)
        + (r"\s*" if token.rstrip else "")
        for token in longest_first
    ]
    return re.compile(f"({'|'.join(words) or '(?!)'})")


def _content(token: Any) -> str | None:
    """A token of tokenizer_config.json: a string, or an object with "content"."""
    return token.get("content") if isinstance(token, Mapping) else token


def _from_file(path: Path) -> "Backend":
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(path))
    except Exception as error:  # noqa: BLE001  (the package raises the plain class)
        raise UsageError(f"{path}: is damaged ({str(error)[:80]}): fetch it again") from None


def _qwen2(folder: Path, config: Mapping[str, Any]) -> "Backend":
    """The tokenizer that transformers' Qwen2Tokenizer builds from the same two files."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    kind = config.get("tokenizer_class")
    if kind not in QWEN2_CLASSES:
        raise UsageError(
            f"{folder}: vocab.json and merges.txt of a {kind or 'nameless tokenizer'} without a "
            "tokenizer.json: save it once with transformers' save_pretrained"
        )
    try:
        model = models.BPE.from_file(*(str(folder / name) for name in files.VOCAB_AND_MERGES))
    except Exception as error:  # noqa: BLE001  (the package raises the plain class)
        raise UsageError(
            f"{folder}: vocab.json or merges.txt is damaged ({str(error)[:80]}): fetch them again"
        ) from None
    backend = Backend(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_missing_tokens(backend: "Backend", config: Mapping[str, Any], folder: Path) -> None:
    """Add the tokens of tokenizer_config.json's added_tokens_decoder, each at its own id."""
    from tokenizers import AddedToken

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    listed = config.get("added_tokens_decoder") or {}
    for wanted in sorted(map(int, listed)):
        entry = listed[str(wanted)]
        known = backend.get_added_tokens_decoder().get(wanted)
        if known is not None and known.content == entry["content"]:
            continue
        chosen = {flag: bool(entry[flag]) for flag in flags if flag in entry}
        backend.add_tokens([AddedToken(entry["content"], **chosen)])
        if backend.token_to_id(entry["content"]) != wanted:
            raise UsageError(
                f"{folder}: token {entry['content']!r} should have id {wanted} by "
                f"tokenizer_config.json, but has {backend.token_to_id(entry['content'])}"
            )


class Detokenizer:
    """Tokens one at a time -> text, whole characters only; special tokens have no text.

    All pieces and `finish()` together are exactly `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers.decoders import ByteLevel

        byte_level = isinstance(tokenizer.backend.decoder, ByteLevel)
        self._special = tokenizer.special_ids
        self._text = _ByteLevelText(tokenizer) if byte_level else _WindowText(tokenizer)

    def add(self, token: int) -> str:
        """The characters that `token` completes, maybe none."""
        return "" if token in self._special else self._text.add(token)

    def finish(self) -> str:
        """What is left at the end; half a character becomes U+FFFD."""
        return self._text.finish()


@cache
def _byte_of() -> dict[str, int]:
    """Byte-level BPE's alphabet -> the bytes: printable Latin-1 stands for itself, the rest
    for 256 onwards in order (Ġ, U+0120, is the space)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(rest)
    }


class _ByteLevelText:
    """Byte-level BPE: tokens are bytes, put through an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token = tokenizer.backend.id_to_token
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        text, table = self._token(token) or "", _byte_of()
        if all(character in table for character in text):
            return self._decoder.decode(bytes(table[character] for character in text))
        return self._decoder.decode(text.encode())

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowText:
    """Any other tokenizer: what decoding with the new tokens adds to decoding without them.

    A run of byte tokens (<0xE2>) waits for its end, since its decoding depends on all of it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        self._waiting.append(token)
        name = self._tokenizer.backend.id_to_token(token)
        return "" if name is None or BYTE_TOKEN.fullmatch(name) else self.finish()

    def finish(self) -> str:
        before = self._tokenizer.decode(self._shown)
        text = self._tokenizer.decode(self._shown + self._waiting)[len(before) :]
        if text or not before:
            self._shown = self._waiting if text and before else self._shown + self._waiting
        self._waiting = []
        return text
