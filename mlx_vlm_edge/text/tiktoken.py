"""A tiktoken file (Qwen 1's or StableLM 2's) -> a `tokenizers` backend with the same ids.

A line is a token in base64 and its rank, which is its id too. Of neighbours that make a token those
whose token has the lowest are merged first. Special tokens stand in the originals' code alone.
Sources: Qwen/Qwen-1_8B, tokenization_qwen.py; stabilityai/stablelm-2-1_6b,
tokenization_arcade100k.py.
"""

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint import files
from ..errors import Refusing
from .detokenizer import byte_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# Pre-tokenizer of both, and of Qwen2.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LONGEST = 1024  # bytes of a token; real vocabularies stay below 200
# The first special token's id, and what they are, in order.
SPECIAL: dict[str, tuple[int, tuple[str, ...]]] = {
    files.QWEN: (
        151643,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))),
    ),
    files.ARCADE: (
        100257,
        (
            "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
            "<gh_stars>", "<filename>", "<issue_start>", "<issue_comment>", "<issue_closed>",
            "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>",
            "<empty_output>", "<commit_before>", "<commit_msg>", "<commit_after>", "<reponame>",
            "<|endofprompt|>", "<|im_start|>", "<|im_end|>", "<|pause|>",
            *(f"<|reg{i}|>" for i in range(8)), "<|extra0|>",
        ),
    ),
}  # fmt: skip


def backend(path: Path) -> "Backend":
    """The tokenizer of a tiktoken file by its name. Raises UsageError for a damaged file."""
    with Refusing(path, "is damaged", "fetch it again"):
        return _built(ranks(path.read_bytes()), *SPECIAL[path.name])


def ranks(data: bytes) -> dict[bytes, int]:
    """Every token's bytes -> its rank. Raises ValueError for what is no such file."""
    pairs = (line.split() for line in data.splitlines() if line)
    read = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if len(set(read.values())) != len(read) or not all(0 < len(token) <= LONGEST for token in read):
        raise ValueError("a rank that is there twice, or a token that is none")
    if missing := [byte for byte in range(256) if bytes([byte]) not in read]:
        raise ValueError(f"no token for byte {missing[0]}")
    return read


def merges(ranked: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a third, by the rank of that; the longer left part first."""
    for token in sorted(ranked, key=ranked.__getitem__):
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in ranked and right in ranked:
                yield left, right


def _built(ranked: Mapping[bytes, int], first: int, special: tuple[str, ...]) -> "Backend":
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    letters = {byte: letter for letter, byte in byte_of().items()}
    words = {token: "".join(map(letters.__getitem__, token)) for token in ranked}
    vocab = {words[token]: rank for token, rank in ranked.items()}
    vocab |= {token: first + place for place, token in enumerate(special)}
    if len(set(vocab.values())) != len(ranked) + len(special):
        raise ValueError("ranks that are special tokens'")
    pairs = [(words[left], words[right]) for left, right in merges(ranked)]
    built = Backend(models.BPE(vocab, pairs, ignore_merges=True))
    built.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return built
