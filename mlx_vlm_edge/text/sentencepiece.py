"""A SentencePiece file (tokenizer.model) -> a `tokenizers` backend with the same ids.

The file is a protocol buffer, read here by its wire format. As LLaMA's original tokenizer does,
every piece of text between special tokens begins with a word mark ("▁"), and characters outside
the vocabulary become bytes. Source: google/sentencepiece, src/sentencepiece_model.proto.
"""

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Refusing, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

SPACE = "\u2581"  # how SentencePiece writes a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_REMEDY = "save the tokenizer once with transformers' save_pretrained (tokenizer.json)"
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # the first line: a token in base64, its rank
LONGEST_PIECE = 1024  # characters; real vocabularies stay below 100
_LONGEST_VARINT = 10  # bytes of a 64-bit number


@dataclass(frozen=True)
class Vocabulary:
    """The pieces of a model by id, each with its score and type."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    byte_fallback: bool
    dummy_prefix: bool

    def check(self) -> None:
        """Raises ValueError for what no model has."""
        pieces = self.pieces
        if len(set(pieces)) != len(pieces) or max(map(len, pieces)) > LONGEST_PIECE:
            raise ValueError("a piece that is there twice or is no word")
        if UNKNOWN not in self.types or not all(map(math.isfinite, self.scores)):
            raise ValueError("no token for the unknown, or a score that is no number")


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a BPE model that does not normalise text.

    Raises UsageError for other kinds of models, and anything at all for a damaged file.
    """
    data = path.read_bytes()
    if _TIKTOKEN.match(data):
        raise UsageError(
            f"{path}: a tiktoken file, as Llama 3's original folder has, and no SentencePiece "
            "model: take the folder for transformers, which has a tokenizer.json"
        )
    model = _Model(data)
    if reason := model.other_kind():
        raise UsageError(f"{path}: {reason}; {_REMEDY}")
    vocabulary = Vocabulary(
        pieces=tuple(piece[1].decode() for piece in model.pieces),
        scores=tuple(struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in model.pieces),
        types=tuple(piece.get(3, NORMAL) for piece in model.pieces),
        byte_fallback=bool(model.trainer.get(35, 0)),
        dummy_prefix=bool(model.normalizer.get(3, 1)),
    )
    vocabulary.check()
    return vocabulary


class _Model:
    """The parts of a ModelProto, each a message by its field numbers. Raises for a damaged one."""

    def __init__(self, data: bytes) -> None:
        self.trainer: dict[int, Any] = {}
        self.normalizer: dict[int, Any] = {}
        self.pieces: list[dict[int, Any]] = []
        for field, value in _fields(data):
            if field == 1:
                self.pieces.append(dict(_fields(value)))
            elif field == 2:
                self.trainer = dict(_fields(value))
            elif field == 3:
                self.normalizer = dict(_fields(value))
        if not self.pieces:
            raise ValueError("no pieces in it")

    def other_kind(self) -> str | None:
        """What it is where it is not a BPE model that takes its text as it stands."""
        if self.trainer.get(3, 1) != BPE:
            return "not a BPE model"
        if self.normalizer.get(2) or self.normalizer.get(4, 1) or self.trainer.get(24, 0):
            return "a model that changes its text first"
        if any(piece.get(3, NORMAL) == USER_DEFINED for piece in self.pieces):
            return "a model with symbols of its users"
        return None


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of one message: ints for varints, bytes for everything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(kind)
        if kind == _BYTES:
            size, at = _varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError(f"truncated at byte {at:,}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that starts at a place, and the place after it; seven bits to a byte.

    _varint(b"\\xac\\x02", 0) -> (300, 2)
    """
    number = 0
    for place, byte in enumerate(data[at : at + _LONGEST_VARINT]):
        number |= (byte & 127) << 7 * place
        if byte < 128:
            return number, at + place + 1
    raise ValueError(f"no number at byte {at:,}")


def merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a third, the best score first.

    Of pairs that are as good as each other, those that make the same piece, SentencePiece takes the
    leftmost: the longer left part goes first, as in transformers' conversion.
    """
    own = (NORMAL, UNUSED)
    listed = zip(vocabulary.pieces, vocabulary.scores, vocabulary.types, strict=True)
    scored = {piece: score for piece, score, kind in listed if kind in own}
    pairs = [
        (-score, -cut, cut - len(piece), piece)
        for piece, score in scored.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scored and piece[cut:] in scored
    ]
    pairs.sort(key=lambda pair: pair[:3])
    return [(piece[:-minus_left], piece[-minus_left:]) for _, minus_left, _, piece in pairs]


def backend(path: Path) -> "Backend":
    """The tokenizer of a tokenizer.model. Special tokens in a text are split off first.

    Raises UsageError for other kinds of models, and for a damaged file.
    """
    with Refusing(path, "is damaged", "fetch it again"):
        return _built(read_vocabulary(path))


def _built(vocabulary: Vocabulary) -> "Backend":
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend

    special = [
        piece
        for piece, kind in zip(vocabulary.pieces, vocabulary.types, strict=True)
        if kind in (UNKNOWN, CONTROL)
    ]
    unknown = vocabulary.pieces[vocabulary.types.index(UNKNOWN)]
    built = Backend(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(vocabulary.pieces)},
            merges=merges(vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=vocabulary.byte_fallback,
        )
    )
    prefix = [normalizers.Prepend(SPACE)] if vocabulary.dummy_prefix else []
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.dummy_prefix else []
    built.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    built.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    built.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return built
