"""A JSON schema or a list of choices -> which tokens may come next, on the host.

An answer's first token has a space in front where words go on (SentencePiece's word mark, the "Ġ"
after "Assistant:"): that space is let through there, and no part of the answer's text.

The grammar engine is llguidance (an extra); it is imported when a grammar is asked for.
"""

import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UsageError
from ..text.prompt import Inputs
from ..text.tokenizer import Tokenizer

# One way to space JSON: a small model would put in blanks without end.
SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
EXTRA = "schemas and choices need llguidance: pip install llguidance"
_tokenizers: "weakref.WeakKeyDictionary[Tokenizer, dict[Any, Any]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like, checked, in llguidance's forms. spaced: the same, where a
    space that is no part of the answer may come first. own_space: whether one may be part of it."""

    source: str
    spaced: str
    own_space: bool = False

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> "Grammar":
        """Answers are JSON of a schema, given as an object or as JSON text; {} is any JSON.

        Raises UsageError for a schema that is none or has parts that cannot be enforced.
        """
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"the schema is not valid JSON ({error})") from None
        if not isinstance(schema, Mapping):
            raise UsageError("a JSON schema must be an object")
        source = _checked("grammar_from_json_schema", dict(schema), overrides=SPACES)
        return cls(source, _spaced(source))

    @classmethod
    def json_object(cls) -> "Grammar":
        """Answers are any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def choices(cls, choices: Sequence[str]) -> "Grammar":
        """Answers are one of several texts. Raises UsageError for none or an empty one."""
        if (
            isinstance(choices, str)
            or not choices
            or not all(isinstance(choice, str) and choice for choice in choices)
        ):
            raise UsageError("choices must be a list of texts, none of them empty")
        plain = [choice for choice in choices if choice[0] != " "]
        spaced = [*plain, *(f" {choice}" for choice in choices)]
        return cls(_one_of(choices), _one_of(spaced), len(plain) < len(choices))


def _spaced(source: str) -> str:
    """The grammar of a schema with a space in front that may be left out."""
    try:
        answer, *more = json.loads(source)["grammars"]
        begin = {"lark_grammar": 'start: " "? @answer'}
        return json.dumps({"grammars": [begin, {**answer, "name": "answer"}, *more]})
    except RecursionError:
        raise UsageError("the schema cannot be enforced: it is nested too deeply") from None


def _one_of(texts: Sequence[str]) -> str:
    lines = " | ".join(json.dumps(text) for text in texts)
    return _checked("grammar_from_lark", f"start: {lines}")


def _checked(kind: str, content: Any, **more: Any) -> str:
    matcher = _llguidance().LLMatcher
    try:
        source: str = getattr(matcher, kind)(content, **more)
        error = matcher.validate_grammar(source)
    except (ValueError, TypeError, RecursionError) as failure:
        error = str(failure)
    if error:
        raise UsageError(f"the schema cannot be enforced: {error.splitlines()[0][:200]}")
    return source


def begins_spaced(grammar: Grammar, tokenizer: Tokenizer, inputs: Inputs) -> bool:
    """Whether a space that is no part of it may come before an answer to this prompt.

    After "Assistant:" it may, after "assistant\\n" or a special token not; where decoding drops
    the mark of a text's first word, always.
    """
    if tokenizer.drops_first_space:
        return True
    if grammar.own_space:  # whoever named it knows how the model begins
        return False
    last = inputs.input_ids.shape[1] - 1
    before = "" if last in inputs.visual else tokenizer.decode([int(inputs.input_ids[0, last])])
    return bool(before) and not before[-1].isspace()


def _llguidance() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError:
        raise UsageError(EXTRA) from None
    return llguidance


class Matcher:
    """One answer's way through a grammar.

    vocabulary: how many logits the model has. spaced: whether a space may come first. `allow` masks
    the logits of the next token; `take` goes on with the token that was chosen.
    """

    def __init__(
        self,
        grammar: Grammar,
        tokenizer: Tokenizer,
        eos_ids: Sequence[int],
        vocabulary: int,
        spaced: bool = False,
    ) -> None:
        package = _llguidance()
        known = _tokenizers.setdefault(tokenizer, {})
        # A config may name ends that are no tokens, which the engine refuses.
        ends = [id for id in sorted(eos_ids) if tokenizer.backend.id_to_token(id) is not None]
        key = tuple(ends), vocabulary
        if key not in known:
            known[key] = package.LLTokenizer(
                tokenizer.backend.to_str(), n_vocab=max(vocabulary, tokenizer.vocab_size),
                eos_token=list(key[0]),
            )  # fmt: skip
        source = grammar.spaced if spaced else grammar.source
        self._matcher = package.LLMatcher(known[key], source, log_level=0)
        self._check()
        self._vocabulary = vocabulary

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = str(self._matcher.get_error()).splitlines()[0][:200]
            raise UsageError(f"the schema cannot be enforced: {reason}")

    def allow(self, logits: mx.array) -> mx.array:
        """Logits [1, V] with -inf for all that the grammar does not let come next."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(packed, count=self._vocabulary, bitorder="little").astype(bool)
        return mx.where(mx.array(allowed), logits, -mx.inf)

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()
