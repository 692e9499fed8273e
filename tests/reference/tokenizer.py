"""A byte-level tokenizer of 320 entries with FastVLM's special tokens, made at test time.

Ids: 0..255 bytes, 256..296 merges, 297 <|endoftext|>, 298 <|im_start|>, 299 <|im_end|>,
300 <image>. The rest of the 320 embedding rows stay unused, as in the real checkpoints.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VOCAB = 320
END, TURN, STOP, IMAGE = 297, 298, 299, 300
PAIRS = ["th", "he", "in", "er", "an", "re", "on", "at", "en", "is", "ar", "or", "it", "al"]
WORDS = ["Ġ" + letter for letter in "tasiowcbpfmhrdlneguyv"] + ["ou", "st", "nd", "sy", "us", "as"]


def build() -> Tokenizer:
    """The tokenizer, in memory."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = [*PAIRS, *WORDS]
    assert len(alphabet) + len(merged) == END, len(alphabet) + len(merged)
    vocab = {text: index for index, text in enumerate([*alphabet, *merged])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[(text[0], text[1:]) for text in merged]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    return tokenizer


def save(folder: Path) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json into `folder`."""
    tokenizer = build()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return tokenizer
