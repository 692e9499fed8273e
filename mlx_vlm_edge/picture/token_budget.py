"""How many of a picture's visual tokens the language model is to see, and where they lie.

A user asks for a number or a share (`TokenBudget`); a family says in which rows its tokens lie
(`Block`); together they give a `Reduction`, which travels with the pixels. Its counts depend on
nothing that the device computes, so a prompt is tokenised with them.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError

METHODS = ("divprune", "dpp", "pool", "random", "hiprune", "visionzip")
ATTENDED = frozenset({"hiprune", "visionzip"})  # those that ask the vision tower's attention
OF_TOKENS = frozenset(METHODS) - ATTENDED  # those that look at nothing but the tokens
TOGETHER = 2600  # tokens of a block; all pairs of one are compared, 27 MB in float32


@dataclass(frozen=True)
class TokenBudget:
    """Visual tokens of each picture: a whole number, or a share of them above 0 and up to 1."""

    tokens: int | float
    method: str = METHODS[0]

    def __post_init__(self) -> None:
        whole = type(self.tokens) is int and self.tokens >= 1
        if not whole and not (type(self.tokens) is float and 0 < self.tokens <= 1):
            raise UsageError(
                f"visual tokens {self.tokens!r}: give a whole number of at least 1, or a share "
                "above 0 and up to 1, as 0.25"
            )
        if self.method not in METHODS:
            raise UsageError(f"token method {self.method!r} is not one of {', '.join(METHODS)}")

    def of(self, total: int) -> int:
        """How many of `total` tokens. Raises UsageError for more than there are."""
        if isinstance(self.tokens, float):
            return max(1, round(self.tokens * total))
        if self.tokens > total:
            raise UsageError(
                f"visual tokens {self.tokens:,}: the picture has {total:,} and no more, and takes "
                "them all when nothing is said"
            )
        return self.tokens


def token_budget(tokens: int | float | None, method: str | None) -> TokenBudget | None:
    """What two settings ask for. Raises UsageError for a method of nothing."""
    if tokens is None:
        if method is not None:
            raise UsageError(f"token method {method!r}: say how many visual tokens, as 64 or 0.25")
        return None
    return TokenBudget(tokens, METHODS[0] if method is None else method)


def parse_tokens(text: str) -> int | float:
    """A number of tokens or a share of them as it was written: "64" -> 64, "0.25" or "25%" -> 0.25.

    Raises UsageError for anything else.
    """
    if re.fullmatch(r"\d{1,9}", text):
        return int(text)
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = math.nan
    if math.isnan(share):
        raise UsageError(f"visual tokens {text!r}: give a number, as 64, or a share, as 0.25")
    return share


@dataclass(frozen=True)
class Block:
    """Tokens in rows that are reduced together.

    ended: whether a separator of the model's own ends each row. before, after: tokens ahead of the
    rows and behind them that always stay, such as a class token.
    """

    rows: int
    columns: int
    ended: bool = False
    before: int = 0
    after: int = 0

    @property
    def total(self) -> int:
        return self.before + self.rows * (self.columns + self.ended) + self.after

    @property
    def fewest(self) -> int:
        """What cannot be left out, a token of the picture and a row's separator included."""
        return self.before + 1 + self.ended + self.after

    def bands(self) -> "tuple[Block, ...]":
        """Rows of it, so many blocks of about one height that none has over TOGETHER tokens."""
        count = min(-(-self.total // TOGETHER), self.rows)
        heights = [(i + 1) * self.rows // count - i * self.rows // count for i in range(count)]
        last = count - 1
        return tuple(
            Block(height, self.columns, self.ended,
                  self.before if i == 0 else 0, self.after if i == last else 0)
            for i, height in enumerate(heights)
        )  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """A block and what is left of it: `tokens` of its rows, in `lines` that a separator ends where
    one ended the rows."""

    block: Block
    lines: int
    tokens: int

    @property
    def total(self) -> int:
        block = self.block
        return block.before + self.tokens + self.lines * block.ended + block.after


def cut(block: Block, total: int) -> Cut:
    """A block cut down to `total` tokens, between its fewest and all.

    Lines are to rows as the square root of what is left, so that they keep the picture's shape:
    24 rows of 24 cut to 144 tokens are 12 lines. Block(4, 3, ended=True) cut to 8: 3 lines of 5
    tokens together.
    """
    rows, columns = block.rows, block.columns
    inner = total - block.before - block.after
    width = columns + block.ended
    lines = round(rows * math.sqrt(inner / (rows * width)))
    least, most = -(-inner // width), min(rows, inner - block.ended)
    lines = max(min(lines, most), least, 1)
    return Cut(block, lines, inner - lines * block.ended)


def bounds(length: int, parts: int) -> list[int]:
    """Where `parts` parts of about one length begin, and where the last ends.

    bounds(7, 3) -> [0, 2, 4, 7]
    """
    return [index * length // parts for index in range(parts + 1)]


@dataclass(frozen=True)
class Reduction:
    """Which blocks a picture's tokens are, in order, what is left of each, and who chooses."""

    method: str
    cuts: tuple[Cut, ...]

    @property
    def total(self) -> int:
        """Visual tokens that are left."""
        return sum(part.total for part in self.cuts)


def planned(budget: TokenBudget, blocks: Sequence[Block]) -> Reduction | None:
    """What a budget makes of a picture's blocks, each its proper share; None where all tokens stay.

    Raises UsageError for more tokens than there are, and for fewer than its parts need.
    """
    whole, fewest = sum(b.total for b in blocks), sum(b.fewest for b in blocks)
    wanted = budget.of(whole)
    if wanted == whole:
        return None
    if wanted < fewest:
        raise UsageError(
            f"visual tokens {budget.tokens}: {wanted:,} of {whole:,} are too few for this picture, "
            f"whose parts and separators need {fewest:,}"
        )
    parts, handed, room = [], 0, 0
    for block in blocks:
        room += block.total - block.fewest
        until = (wanted - fewest) * room // (whole - fewest)
        parts.append(cut(block, block.fewest + until - handed))
        handed = until
    return Reduction(budget.method, tuple(parts))


def check_method(method: str, known: frozenset[str]) -> None:
    """Raises UsageError for a method that is not defined for a model."""
    if method not in known:
        able = ", ".join(name for name in METHODS if name in known)
        raise UsageError(
            f"token method {method!r} is not defined for this model: "
            + (f"it has {able}" if known else "its visual tokens cannot be reduced")
        )
