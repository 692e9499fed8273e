"""A SentencePiece file (tokenizer.model) -> a `tokenizers` backend with the same ids.

The file is a protocol buffer, read here by its wire format. As LLaMA's original tokenizer does,
every piece of text between special tokens begins with a word mark ("▁"), and characters outside
the vocabulary become bytes. Source: google/sentencepiece, src/sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

SPACE = "\u2581"  # how SentencePiece writes a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_REMEDY = "save the tokenizer once with transformers' save_pretrained (tokenizer.json)"


@dataclass(frozen=True)
class Vocabulary:
    """The pieces of a model by id, each with its score and type."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    byte_fallback: bool
    dummy_prefix: bool


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a BPE model that does not normalise text.

    Raises UsageError for a damaged file and for other kinds of models.
    """
    try:
        return _vocabulary(path, path.read_bytes())
    except (ValueError, IndexError, struct.error, TypeError) as error:
        raise UsageError(f"{path}: is damaged ({error}): fetch it again") from None


def _vocabulary(path: Path, data: bytes) -> Vocabulary:
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    pieces: list[dict[int, Any]] = []
    for field, value in _fields(data):
        if field == 1:
            pieces.append(dict(_fields(value)))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("no pieces in it")
    if trainer.get(3, 1) != BPE:
        raise UsageError(f"{path}: not a BPE model; {_REMEDY}")
    if normalizer.get(2) or normalizer.get(4, 1) or trainer.get(24, 0):
        raise UsageError(f"{path}: a model that changes its text first; {_REMEDY}")
    types = tuple(piece.get(3, NORMAL) for piece in pieces)
    if USER_DEFINED in types:
        raise UsageError(f"{path}: a model with symbols of its users; {_REMEDY}")
    return Vocabulary(
        pieces=tuple(piece[1].decode() for piece in pieces),
        scores=tuple(struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces),
        types=types,
        byte_fallback=bool(trainer.get(35, 0)),
        dummy_prefix=bool(normalizer.get(3, 1)),
    )


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
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at


def merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a third, the best score first.

    Pairs that make the same piece are as good as each other to SentencePiece, which then takes the
    leftmost; here the shorter left part goes first.
    """
    own = (NORMAL, UNUSED)
    listed = zip(vocabulary.pieces, vocabulary.scores, vocabulary.types, strict=True)
    scored = {piece: score for piece, score, kind in listed if kind in own}
    found = [
        (-score, cut, piece)
        for piece, score in scored.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scored and piece[cut:] in scored
    ]
    return [(piece[:cut], piece[cut:]) for _, cut, piece in sorted(found)]


def backend(path: Path) -> "Backend":
    """The tokenizer of a tokenizer.model. Special tokens in a text are split off first.

    Raises UsageError as `read_vocabulary` does.
    """
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend

    vocabulary = read_vocabulary(path)
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
