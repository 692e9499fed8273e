"""What is printed in the pictures: words, names, codes and figures of 1 to 12 characters."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random
from zlib import crc32

CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SMALL = CAPITALS.lower()
DIGITS = "0123456789"
ALPHABET = CAPITALS + SMALL + DIGITS
CLEAR = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"  # of a code: not I and 1, not O and 0
MAX_TEXT = 12  # characters, without spaces
MAX_SLOTS = 14  # with them
DICTIONARY = Path("/usr/share/dict/american-english")  # Debian's wamerican
OFTEN = """
hello world open closed stop go yes no exit enter push pull sale new hot cold red green blue cat
dog tree house water coffee tea bread milk sun moon star home work play game good bad day night
left right up down on off start end help info name price total love happy birthday welcome thank
you please wait menu food bus taxi train hotel free wifi test demo text image picture python apple
"""


@cache
def words(held_out: bool = False) -> tuple[str, ...]:
    """Words of the dictionary, 2 to 12 plain letters; every tenth is held out from training."""
    if not DICTIONARY.exists():
        raise SystemExit("the words come from a dictionary: apt-get install wamerican")
    plain = [
        word for word in DICTIONARY.read_text().split()
        if word.isascii() and word.isalpha() and 2 <= len(word) <= MAX_TEXT
    ]  # fmt: skip
    return tuple(w for w in plain if (crc32(w.lower().encode()) % 10 == 0) == held_out)


@cache
def of_length(length: int, held_out: bool = False) -> tuple[str, ...]:
    return tuple(word for word in words(held_out) if len(word) == length)


def cased(word: str, rng: Random) -> str:
    """The word in capitals, small letters, or with a capital first."""
    return rng.choice((word.upper(), word.lower(), word.capitalize(), word.capitalize()))


def piece(rng: Random, length: int, held_out: bool = False) -> str:
    """One word, code or number without a space."""
    draw = rng.random()
    if draw < 0.42 and length > 1:
        near = [w for w in OFTEN.split() if len(w) == length] if not held_out else []
        pool = near if near and rng.random() < 0.12 else of_length(length, held_out)
        if pool:
            return cased(rng.choice(pool), rng)
    if draw < 0.5 or (length == 1 and draw < 0.75):
        return "".join(rng.choices(CAPITALS, k=length))
    if draw < 0.62:
        return "".join(rng.choices(DIGITS, k=length))
    if draw < 0.72:
        letters = "".join(rng.choices(SMALL, k=length))
        return letters if rng.random() < 0.6 else letters.capitalize()
    if draw < 0.94:
        return "".join(rng.choices(CLEAR, k=length))
    return "".join(rng.choices(ALPHABET, k=length))


def string(rng: Random, length: int, held_out: bool = False) -> str:
    """`length` characters in one to three words, spaces not counted."""
    number = 1 if length < 4 else rng.choices((1, 2, 3), (7, 2.5, 0.7 if length > 5 else 0))[0]
    if number == 1:
        return piece(rng, length, held_out)
    cuts = sorted(rng.sample(range(1, length), number - 1))
    lengths = [b - a for a, b in zip((0, *cuts), (*cuts, length), strict=True)]
    style = rng.random()
    pieces = [piece(rng, n, held_out) for n in lengths]
    if style < 0.35:
        return " ".join(pieces).upper()
    return " ".join(pieces)
