"""What a folder's generation_config.json asks of greedy answers and they do not get: told once.

Defaults are the same for every model. What acts only when sampling is not told, nor the tokens an
answer ends with, which are honoured.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.files import GENERATION_CONFIG, read_json
from ..wording import printable, quoted, say_once

# Settings that change a greedy answer, and what they are where they don't; None never does.
NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "bad_words_ids": [],
    "sequence_bias": [],
    "forced_bos_token_id": None,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
}


def tell_unapplied(folder: Path, special: Collection[int]) -> None:
    """A note on stderr where a folder asks for other than plain greedy answers.

    special: ids of special tokens.
    """
    asked = list(_asked(read_json(folder / GENERATION_CONFIG), special))
    if asked:
        note = f"{folder}: generation_config.json is not followed by itself: {'; '.join(asked)}"
        say_once(printable(note, lines=False))


def _asked(settings: Mapping[str, Any], special: Collection[int]) -> Iterator[str]:
    """Each setting that is not neutral, with what there is in its place."""
    for key, neutral in NEUTRAL.items():
        value = settings.get(key)
        if value in (None, neutral) or (isinstance(value, list) and _all_of(value, special)):
            continue  # as Idefics2's bad words
        if key == "repetition_penalty":
            told = quoted(value)
            yield (
                f"a {key} of {told} ({key}={told}, or --repetition-penalty {told} with a long "
                "--repetition-context-size, comes nearest)"
            )
        else:
            yield f"{key} (not supported)"


def _all_of(words: Any, special: Collection[int]) -> bool:
    """Whether words are special tokens alone, which answers are shown without."""
    lists = [word if isinstance(word, list) else [word] for word in words]
    return all(isinstance(id, int) and id in special for word in lists for id in word)
