"""A tokenizer without files, for models with random weights: byte-level, of the model's vocabulary.

It has the special tokens that the families' processors ask for and, as tokens of their own, the
words of their prompts, so that a prompt is about as long as with the real one. Everything else is
spelled in bytes; what is left of the vocabulary is named by its number.
"""

from collections.abc import Sequence
from typing import Any

from mlx_vlm_edge.models.contract import Family
from mlx_vlm_edge.text.tokenizer import Tokenizer

WORDS = (
    "You are a helpful assistant . system user assistant A chat between curious and an artificial "
    "intelligence . The gives detailed polite answers to the user 's questions USER ASSISTANT User "
    "Assistant What is in this picture ? the x Cambrian highly multimodal AI trained by NYU Vision "
    "X As have ability process analyze images Whenever image present conversation very carefully "
    "examine it consider its content when formulating your response should concise responses "
    "simple but provide thorough more complex open"
)
SPECIAL = (
    "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<0x04>", "<image>",
    "<fake_token_around_image>", "<end_of_utterance>",
)  # fmt: skip
MARKERS = (
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
# Idefics3's tokenizer, Llama 3's, has none of these: it spells a tile's marker, in 7 pieces.
SPELLED = ("<row", "_col", "<global", "-img")
LLAMA_3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
LLAMA_3_VOCABULARY = 128_000  # tokens and more
SPACE = "Ġ"  # a space in byte-level BPE's alphabet
BYTES = 256


def random_tokenizer(vocab_size: int, family: Family[Any], config: Any) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens for a family's `config`.

    A prompt has as many tokens with any size that has room for the words.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    fixed, spells = family.own_tokens(config), config.text.vocab_size > LLAMA_3_VOCABULARY
    special = SPECIAL if spells else SPECIAL + MARKERS
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, merges = _merges(SPELLED if spells else ())
    taken = set(fixed.values())
    free = iter([id for id in range(vocab_size) if id not in taken])
    small = vocab_size < BYTES + len(tokens) + len(special) + len(fixed)
    if small:  # a test's model: bytes and special tokens are what it needs
        tokens, merges = [], []
    vocab = fixed | {token: next(free) for token in (*special, *alphabet, *tokens)}
    vocab |= {f"<{id}>": id for id in free}
    backend = Backend(models.BPE(vocab, merges))
    pieces = [pre_tokenizers.Split(Regex(LLAMA_3), "isolated")] if spells else []
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not spells)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*pieces, in_bytes])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*fixed, *special)]
    )
    return Tokenizer(backend)


def _merges(more: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The pieces of WORDS and more, longer and longer, and the merges that make them.

    "is" -> "is", "Ġi", "Ġis" from ("i", "s"), ("Ġ", "i"), ("Ġi", "s").
    """
    merges: dict[tuple[str, str], str] = {}
    for word in (*more, *WORDS.split()):  # the first keep their merges
        for spelled in (word, SPACE + word):
            for end in range(1, len(spelled)):
                merges[spelled[:end], spelled[end]] = spelled[: end + 1]
    return list(dict.fromkeys(merges.values())), list(merges)
