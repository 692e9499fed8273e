"""A JSON schema, a list of choices or a pattern -> which tokens may come next, on the host.

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
from ..text.tokenizer import Tokenizer

# One way to space JSON: a small model would put in blanks without end.
SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
EXTRA = "schemas and choices need llguidance: pip install llguidance"
_tokenizers: "weakref.WeakKeyDictionary[Tokenizer, dict[Any, Any]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like, checked. source: llguidance's form of it, as JSON text."""

    source: str

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
        return cls._checked("grammar_from_json_schema", dict(schema), overrides=SPACES)

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
        lines = " | ".join(json.dumps(choice) for choice in choices)
        return cls._checked("grammar_from_lark", f"start: {lines}")

    @classmethod
    def _checked(cls, kind: str, content: Any, **more: Any) -> "Grammar":
        matcher = _llguidance().LLMatcher
        try:
            source: str = getattr(matcher, kind)(content, **more)
            error = matcher.validate_grammar(source)
        except (ValueError, TypeError, RecursionError) as failure:
            error = str(failure)
        if error:
            raise UsageError(f"the schema cannot be enforced: {error.splitlines()[0][:200]}")
        return cls(source)


def _llguidance() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError:
        raise UsageError(EXTRA) from None
    return llguidance


class Matcher:
    """One answer's way through a grammar.

    vocabulary: how many logits the model has. `allow` masks the logits of the next token; `take`
    goes on with the token that was chosen.
    """

    def __init__(
        self, grammar: Grammar, tokenizer: Tokenizer, eos_ids: Sequence[int], vocabulary: int
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
        self._matcher = package.LLMatcher(known[key], grammar.source, log_level=0)
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
