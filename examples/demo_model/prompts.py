"""The demo model's tokenizer, and prompts as token ids.

A byte-level BPE like Qwen2's, trained on the questions and answers; capitals and digits are
isolated before the merges, so that a printed text is always one token per character.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

from changes import ASKED, pair
from draw import KINDS, scene
from questions import answers, phrase
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPLIT = r"[A-Z0-9]| ?[^\sA-Z0-9\p{P}\p{S}]+| ?[\p{P}\p{S}]+|\s+"
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
AFTER = "\n{question}<|im_end|>\n<|im_start|>assistant\n"
AGAIN = "\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"  # after an answer
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def corpus(scenes: int) -> list[str]:
    """Questions and answers about `scenes` drawn scenes, and the words of the prompt."""
    rng, lines = Random("tokenizer"), []
    for index in range(scenes):
        one = scene(f"tokenizer-{index}", KINDS[index % len(KINDS)])
        for category in answers(one):
            lines += [*phrase(category, one, rng)]
        lines += ["system\n", "You are a helpful assistant.", "user\n", "assistant\n"]
        if index % 4 == 0:
            lines += [rng.choice(ASKED), pair(f"tokenizer-{index}")[2].said]
    return lines


def train_tokenizer(vocab: int) -> Tokenizer:
    """A tokenizer of at most `vocab` entries: 256 bytes, the merges, three special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIAL), show_progress=False, min_frequency=3,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus(1500), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer


@dataclass(frozen=True)
class Prompter:
    """Token ids of prompts; the text before and after the image is tokenised separately."""

    tokenizer: Tokenizer

    @property
    def before(self) -> list[int]:
        return self.ids(BEFORE)

    @property
    def end(self) -> int:
        return self.ids("<|im_end|>")[0]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def after(self, question: str) -> list[int]:
        return self.ids(AFTER.format(question=question))

    def again(self, question: str) -> list[int]:
        return self.ids(AGAIN.format(question=question))

    def spelled(self, answer: str, text: str) -> list[int]:
        """An answer's ids and the end's; the printed text in it is a token for each character."""
        before, printed, rest = answer.partition(text) if text else (answer, "", "")
        characters = [i for char in printed for i in self.ids(char)]
        return [*self.ids(before), *characters, *self.ids(rest), self.end]


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(tokenizer.token_to_id(t)): {
            "content": t, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": True,
        }
        for t in SPECIAL
    }  # fmt: skip
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
