"""A user's words among a chat's control tokens: marked, joined with them, and told apart again."""

import re
from collections.abc import Iterable, Iterator

# Stands before a character that is no part of a control token. A Unicode noncharacter: no text
# should have it, and one that does gets a mark before it like any other.
GUARD = "\ufdd0"
LONGEST = 1024  # characters of a word that may be typed in pieces


class Guard:
    """Marks words as plain text, whole ones and the beginning of one at the end of a text.

    So none comes about where texts are joined: "a<|im_" and "end|>" have no <|im_end|> together.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._words = tuple(word for word in words if word)
        self._first = {word[0] for word in self._words}
        self._alone = {word for word in self._words if len(word) == 1}
        self._longest = min(max(map(len, self._words), default=0), LONGEST)
        self._start = re.compile(f"(?={alternatives(self._words)})")

    def __call__(self, text: str) -> str:
        """The text with its marks, which `unguard` takes out."""
        text = text.replace(GUARD, GUARD * 2)
        starts = {match.start() for match in self._start.finditer(text)}
        places = {self._place(text, start) for start in starts.union(self._unfinished(text))}
        pieces, end = [], 0
        for place in sorted(places):
            pieces += [text[end:place], GUARD]
            end = place
        return "".join([*pieces, text[end:]])

    def _place(self, text: str, start: int) -> int:
        """Inside the word where it can be, so that a template that looks for it doesn't see it."""
        return start + (start + 1 < len(text) and text[start] not in self._alone)

    def _unfinished(self, text: str) -> Iterator[int]:
        """Where the end of `text` may be the beginning of a word."""
        for start in range(max(0, len(text) - self._longest), len(text)):
            end = text[start:] if text[start] in self._first else ""
            if end and any(word.startswith(end) for word in self._words):
                yield start


def alternatives(words: Iterable[str]) -> str:
    """A pattern for one of the words, the longest that fits; for none when there are none."""
    longest_first = sorted(words, key=len, reverse=True)
    return f"(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})"


def unguard(text: str) -> str:
    """Take out what `Guard` put in."""
    return re.sub(f"{GUARD}(.?)", r"\1", text, flags=re.DOTALL)


def unmarked(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern whose group 1 is one of the words where it isn't marked; it matches marks too."""
    return re.compile(f"{GUARD}.?|({alternatives(words)})", re.DOTALL)


def split_unmarked(text: str, pattern: re.Pattern[str]) -> list[str]:
    """Texts and, at odd places, the words between them, by a pattern of `unmarked`.

    With that for "<b>": "a<b>c" -> ["a", "<b>", "c"], but not where the "<" is marked.
    """
    parts, end = [], 0
    for match in pattern.finditer(text):
        if match[1] is not None:
            parts += [text[end : match.start()], match[1]]
            end = match.end()
    return [*parts, text[end:]]
