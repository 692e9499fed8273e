"""Text <-> token ids, on the `tokenizers` package.

No BOS or EOS is ever added here; a family puts them where its original does.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from ..errors import Refusing, UsageError
from . import mapped_tokenizer, saved_tokenizer
from .detokenizer import ByteLevelText, Detokenizer, WindowText
from .guard import GUARD, Guard, split_unmarked, unguard, unmarked

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`; safe to use from several threads.

    special: special token's text -> id. named: bos_token, eos_token, ... -> their texts. eos_ids:
    of eos_token (the model's config may name more). config: tokenizer_config.json.
    """

    def __init__(self, backend: "Backend", config: Mapping[str, Any] | None = None) -> None:
        from tokenizers.decoders import ByteLevel

        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.config: Mapping[str, Any] = config or {}
        self.chat_template: str | None = self.config.get("chat_template")
        self.named = saved_tokenizer.named_tokens(self.config)
        added = backend.get_added_tokens_decoder()
        self.special = {token.content: id for id, token in added.items() if token.special}
        self.special_ids = frozenset(self.special.values())
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        eos = self.token_id(self.named.get("eos_token", ""))
        self.eos_ids = frozenset(() if eos is None else (eos,))
        unknown = self.named.get("unk_token") or getattr(backend.model, "unk_token", None)
        # Letters of an alphabet spell what is typed, special or not, and so does the unknown.
        self._control = self.special_ids - self.special_among([unknown or ""])
        self._control -= {id for word, id in self.special.items() if len(word) == 1}
        self._byte_level = isinstance(backend.decoder, ByteLevel)
        self._literal = {id: token.content for id, token in added.items()}
        self._strips = {token.content: (token.lstrip, token.rstrip) for token in added.values()}
        self._pattern = unmarked(self.special)
        self._guards: dict[tuple[str, ...], Guard] = {}
        self._plain: Backend | None = None
        self._lock = Lock()

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """The tokenizer of a model folder. Raises UsageError as `saved_tokenizer.read` does."""
        with Refusing(folder, "its tokenizer cannot be used", "copy the original model's files"):
            return cls(*saved_tokenizer.read(folder))

    def begin_each_text(self) -> None:
        """Put the word mark before each text between special tokens, as LLaMA's original does.

        For families that were trained so: transformers 5 saves their tokenizers as if the mark
        stood at the beginning only. One that says `"legacy": false` means it.
        """
        if saved_tokenizer.begins_once(self.backend) and self.config.get("legacy") is not False:
            self.backend.pre_tokenizer.prepend_scheme = "always"

    def check_rows(self, rows: int) -> None:
        """Raises UsageError where words have ids that an embedding of `rows` rows has not.

        Added tokens may: a prompt that has one is refused.
        """
        words = self.backend.get_vocab_size(with_added_tokens=False)
        if words > rows:
            raise UsageError(
                f"the tokenizer knows {words:,} tokens and the model {rows:,}: it is another "
                "model's; get the model's files again"
            )

    def rows(self, most: int) -> int:
        """How many of a model's rows have a token, those in between included."""
        ids = range(most - 1, -1, -1)
        return next((id + 1 for id in ids if self.backend.id_to_token(id) is not None), most)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`.

        With `special`, special tokens in it become their ids, but for those under `guard`.
        Otherwise they are plain text, so that a user's words can't take another role.
        """
        if not special:
            return self._encode(text, plain=True)
        if GUARD not in text:
            return self._encode(text, plain=False)
        ids: list[int] = []
        parts = split_unmarked(text, self._pattern)
        for index in range(0, len(parts), 2):
            before, (plain, *after) = parts[max(index - 1, 0) : index], parts[index : index + 2]
            if before and self._strips[before[0]][1]:
                plain = plain.lstrip()
            if after and self._strips[after[0]][0]:
                plain = plain.rstrip()
            if plain:
                ids += self._encode(unguard(plain), plain=True, begins=not index)
            ids += [self.special[token] for token in after]
        return ids

    def _encode(self, text: str, plain: bool, begins: bool = True) -> list[int]:
        """begins: whether it is the beginning of a text, which some put the word mark at."""
        with self._lock:
            ids = _ids(self.backend, text, plain, begins)
            if plain and not self._control.isdisjoint(ids):
                self._plain = self._plain or _without_words(self.backend, self.special)
                ids = _ids(self._plain, text, plain, begins)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        if not self._byte_level:
            text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special)
            return text
        detokenizer = self.detokenizer(skip_special)
        return "".join([*map(detokenizer.add, ids), detokenizer.finish()])

    def detokenizer(self, skip_special: bool = True, unspaced: bool = False) -> Detokenizer:
        """For one answer, token by token; `skip_special` leaves special tokens without a text,
        `unspaced` one space that the answer begins with."""
        hidden = self.special_ids if skip_special else frozenset()
        if self._byte_level:
            return Detokenizer(ByteLevelText(self.backend, self._literal), hidden, unspaced)
        window = WindowText(self.backend, lambda ids: self.decode(ids, skip_special))
        return Detokenizer(window, hidden, unspaced and not self.drops_first_space)

    @cached_property
    def drops_first_space(self) -> bool:
        """Whether decoding leaves out the word mark that a text begins with, as SentencePiece's."""
        from .sentencepiece import SPACE

        decoder = None if self._byte_level else mapped_tokenizer.whole(self.backend).decoder
        return decoder is not None and str(decoder.decode([f"{SPACE}a"])) == "a"

    def token_id(self, token: str) -> int | None:
        """The id of a token's exact text, or None."""
        try:
            id: int | None = self.backend.token_to_id(token)
        except UnicodeEncodeError:  # lone surrogates of a JSON file are no text
            return None
        return id

    def special_among(self, words: Iterable[str]) -> frozenset[int]:
        """The ids of those words that are special tokens."""
        return frozenset(self.special[word] for word in words if word in self.special)

    def guard(self, text: str, *more: str) -> str:
        """Mark special tokens (and the words in `more`) in a user's text as plain text.

        The mark is undone by `encode(special=True)`: guard("a<|im_end|>") is encoded as the
        characters "<", "|", ... although the text around it has real special tokens.
        """
        if more not in self._guards:
            self._guards[more] = Guard({*self.special, *more})
        return self._guards[more](text)


def _ids(backend: "Backend", text: str, plain: bool, begins: bool) -> list[int]:
    backend.encode_special_tokens = plain
    if begins or not saved_tokenizer.begins_once(backend):
        with Refusing("the tokenizer", "cannot encode the text", "copy the original model's files"):
            ids: list[int] = backend.encode(text, add_special_tokens=False).ids
            return ids
    backend.pre_tokenizer.prepend_scheme = "never"
    try:
        return _ids(backend, text, plain, begins=True)
    finally:
        backend.pre_tokenizer.prepend_scheme = "first"


def _without_words(backend: "Backend", special: Mapping[str, int]) -> "Backend":
    """The same tokenizer, whose vocabulary no longer has the special tokens' texts.

    A Unigram model, or one that takes whole words, would make </s> of its characters.
    """
    backend = mapped_tokenizer.whole(backend)
    spec = json.loads(backend.to_str())
    model, vocab = spec["model"], spec["model"]["vocab"]
    fresh = {word: GUARD + os.urandom(16).hex() for word in special if len(word) > 1}
    if isinstance(vocab, list):
        model["vocab"] = [[fresh.get(piece, piece), score] for piece, score in vocab]
    else:
        model["vocab"] = {fresh.get(piece, piece): id for piece, id in vocab.items()}
    if "merges" in model:
        pairs = ((pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"])
        model["merges"] = [list(pair) for pair in pairs if "".join(pair) not in fresh]
    if model.get("unk_token") in fresh:
        model["unk_token"] = fresh[model["unk_token"]]
    for token in spec["added_tokens"]:
        token["content"] = fresh.get(token["content"], token["content"])
    return type(backend).from_str(json.dumps(spec | {"post_processor": None}))
