"""Requests of the OpenAI API, checked field by field: what is not understood is refused by name.

A field that is null counts as left out, as clients send it.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from ..generation.loop import MAX_LOGPROBS
from ..picture.token_budget import TokenBudget, token_budget
from .errors import ApiError, bad_request

# Fields of the published APIs that this server cannot obey; a client that sends one is told so.
UNSUPPORTED = (
    "audio", "best_of", "echo", "function_call", "functions", "logit_bias", "metadata",
    "modalities", "parallel_tool_calls", "prediction", "prompt_cache_key", "reasoning_effort",
    "safety_identifier", "service_tier", "store", "suffix", "tool_choice", "tools", "verbosity",
    "web_search_options",
)  # fmt: skip
# Values of those that ask for nothing.
NEUTRAL: Mapping[str, Any] = {
    "best_of": 1, "echo": False, "logit_bias": {}, "metadata": {}, "modalities": ["text"],
    "parallel_tool_calls": False, "service_tier": "auto", "store": False, "tool_choice": "none",
    "tools": [], "functions": [],
}  # fmt: skip
MAX_STOPS = 16
MAX_VALUES = 200_000  # more than any context has tokens; each takes about a microsecond
MAX_NESTING = 200  # levels of objects and lists; schemas are compiled up to about 120
WITH_TEXTS = (str, dict, list)  # what JSON has texts in
SHOWN = 80  # characters of a field's path
Request = TypeVar("Request", bound=BaseModel)


class Strict(BaseModel):
    """Unknown fields are errors, and no text is taken for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: item for key, item in value.items() if item is not None}


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageAddress(Strict):
    """url: a data: URL, or https where the server allows it. detail: taken, and of no effect."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageAddress


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def texts_of(content: Any) -> Any:
    """A message's text as its only part."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _stops(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


Texts = Annotated[
    list[TextPart], BeforeValidator(texts_of, json_schema_input_type=str | list[TextPart])
]
Parts = Annotated[list[Part], BeforeValidator(texts_of, json_schema_input_type=str | list[Part])]
NonEmpty = Annotated[str, Field(min_length=1)]
StopTexts = Annotated[list[NonEmpty], Field(max_length=MAX_STOPS)]
Stops = Annotated[StopTexts, BeforeValidator(_stops, json_schema_input_type=NonEmpty | StopTexts)]


class UserMessage(Strict):
    role: Literal["user"]
    content: Parts
    name: str | None = None


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Texts
    name: str | None = None


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Texts
    name: str | None = None
    annotations: list[Any] | None = None  # of an answer that comes back as it was; no effect


Message = Annotated[
    UserMessage | SystemMessage | AssistantMessage, Field(discriminator="role")
]  # fmt: skip


class JsonSchema(Strict):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, populate_by_name=True, serialize_by_alias=True
    )

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StreamOptions(Strict):
    include_usage: bool = False


def _whole(number: Any) -> Any:
    """2.0 as 2: JSON has one kind of number."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


Number = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_whole)]


def _visual_tokens(number: Any) -> int | float:
    """Whole numbers count tokens, those up to 1.0 are a share of them: 1 is one, 1.0 all."""
    number = number if number == 1 else _whole(number)
    whole = type(number) is int and number >= 1
    if not whole and not (type(number) is float and 0 < number <= 1):
        raise ValueError("give a whole number of at least 1, or a share up to 1.0")
    share: int | float = number
    return share


VisualTokens = Annotated[
    int | float,
    PlainValidator(_visual_tokens),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            ],
            "description": "How many, or a share as 0.25: 1 is one token, 1.0 is all of them.",
        }
    ),
]
Method = Literal["divprune", "dpp", "pool", "random", "hiprune", "visionzip"]


class Pictured(Strict):
    """What is asked of a prompt's pictures, a field of this server's own: see --visual-tokens."""

    visual_tokens: VisualTokens | None = None
    token_method: Method | None = None

    @model_validator(mode="after")
    def _method_of_something(self) -> "Pictured":
        if self.token_method is not None and self.visual_tokens is None:
            raise ValueError("token_method needs visual_tokens")
        return self

    @property
    def budget(self) -> TokenBudget | None:
        return token_budget(self.visual_tokens, self.token_method)


class Sampling(Strict):
    """What all of the endpoints have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=0)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stops = Field(default_factory=list)
    n: Annotated[Whole, Field(ge=1, le=8)] = 1
    user: str | None = None


class ChatRequest(Sampling, Pictured):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens contradict each other")
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's: there is nothing to answer")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Sampling):
    """POST /v1/completions: a text as it stands, without pictures."""

    prompt: NonEmpty
    logprobs: Annotated[Whole, Field(ge=0, le=5)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens


def check_count(body: bytes) -> None:
    """Raises ApiError 400 for a body of more values than any prompt needs, before they are made.

    Each value but the first follows a comma, or what opens its list or object. Those inside texts
    count as well: so bytes are counted, and nothing is parsed.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        told = f"at most {MAX_VALUES:,} commas and opening brackets are taken in one request"
        raise bad_request(told, code="too_many_values")


def parse(kind: type[Request], body: Any) -> Request:
    """A request's JSON -> its checked form. Raises ApiError 400 that names the first bad field."""
    if not isinstance(body, Mapping):
        raise bad_request("the body must be a JSON object")
    _check_echoed(body)
    body = {key: value for key, value in body.items() if value is not None}
    for field in UNSUPPORTED:
        if field in body and field not in kind.model_fields:
            if field in NEUTRAL and _same(body[field], NEUTRAL[field]):
                del body[field]
                continue
            raise bad_request(
                f"{field} is not supported by this server: leave it out", field, "unsupported"
            )
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _told(error.errors(include_input=False, include_url=False)) from None


def _check_echoed(value: Any, path: tuple[str, ...] = ()) -> None:
    """Raises ApiError 400 for half of a surrogate pair in a text or a key, which JSON can spell and
    UTF-8 cannot, so that no answer could echo it; and for nesting deeper than this can go."""
    if len(path) > MAX_NESTING:
        raise _wrong_value(_named(path), f"at most {MAX_NESTING} levels are taken")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            told = "a text has half of a surrogate pair, which is no character"
            raise _wrong_value(_named(path), told) from None
        return
    if isinstance(value, Mapping):
        _check_echoed("".join(value), path)
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        if type(item) in WITH_TEXTS:
            _check_echoed(item, (*path, str(key)))


def _same(sent: Any, neutral: Any) -> bool:
    """Equal in JSON, where 0 is not false."""
    return bool(sent == neutral) and isinstance(sent, bool) == isinstance(neutral, bool)


def _told(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors as one line that echoes nothing of the input."""
    first = errors[0]
    field = _named(_path(first["loc"]))
    if first["type"] == "extra_forbidden":
        return bad_request("a field is not known: leave it out", field, "unknown_field")
    if first["type"] == "missing":
        return bad_request(f"{field} is missing", field, "missing")
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "union_tag_invalid":
        message = f"{first['ctx']['discriminator']} must be one of {first['ctx']['expected_tags']}"
    return _wrong_value(field, message)


def _wrong_value(field: str | None, message: str) -> ApiError:
    return bad_request(f"{field}: {message}" if field else message, field, "invalid_value")


def _named(path: Sequence[str]) -> str | None:
    """A path as the `param` of an error, None for the whole body."""
    return ".".join(path)[:SHOWN] or None


def _path(steps: Sequence[str | int]) -> list[str]:
    """The fields of a path, without the names of union members, which follow an index or a
    response_format: messages, 0, user, content -> messages, 0, content."""
    fields, before = [], None
    for step in steps:
        if isinstance(step, int) or not (isinstance(before, int) or before == "response_format"):
            fields.append(str(step))
        before = step
    return fields
