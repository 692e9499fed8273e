"""Anthropic's Messages API: POST /v1/messages, whole or as server-sent events."""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import BeforeValidator, Field

from ..generation.answer import GenerationResult
from .answering import Answers, Asked, Choice
from .errors import ApiError
from .limits import Limits
from .openai import make_options, named_event, timings
from .requests import Number, Pictured, StopTexts, Strict, TextPart, Texts, Whole, texts_of

Role = Literal["user", "assistant"]
# Parts of `usage` that Anthropic's schema requires and that nothing here uses.
NOT_USED = dict.fromkeys(
    ("cache_creation", "inference_geo", "output_tokens_details", "server_tool_use", "service_tier")
)
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


class Base64Source(Strict):
    type: Literal["base64"]
    media_type: str
    data: str


class UrlSource(Strict):
    type: Literal["url"]
    url: str


class Image(Strict):
    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]

    @property
    def address(self) -> str:
        source = self.source
        return (
            source.url if source.type == "url" else f"data:{source.media_type};base64,{source.data}"
        )


Block = Annotated[TextPart | Image, Field(discriminator="type")]
Blocks = Annotated[list[Block], BeforeValidator(texts_of, json_schema_input_type=str | list[Block])]


class Turn(Strict):
    role: Role
    content: Blocks


class Metadata(Strict):
    user_id: str | None = None


class CountRequest(Pictured):
    """POST /v1/messages/count_tokens: how long a prompt is."""

    model: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1)]
    system: Texts | None = None


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[Whole, Field(ge=1)]
    stop_sequences: StopTexts = Field(default_factory=list)
    stream: bool = False
    temperature: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=0)] | None = None
    metadata: Metadata | None = None


def asked(request: CountRequest, limits: Limits) -> Asked:
    """The request in our own terms, without options where only tokens are counted."""
    addresses: list[tuple[str, str]] = []
    messages: list[dict[str, Any]] = []
    if request.system:
        messages.append(
            {"role": "system", "content": [part.model_dump() for part in request.system]}
        )
    for index, turn in enumerate(request.messages):
        parts: list[dict[str, str]] = []
        for place, block in enumerate(turn.content):
            if block.type == "text":
                parts.append({"type": "text", "text": block.text})
            else:
                addresses.append((f"messages.{index}.content.{place}.source", block.address))
                parts.append({"type": "image"})
        messages.append({"role": turn.role, "content": parts})
    if not isinstance(request, MessagesRequest):
        return Asked(messages, addresses, (), budget=request.budget)
    options = make_options(
        limits, request.max_tokens, stop=tuple(request.stop_sequences),
        temperature=request.temperature, top_p=request.top_p, top_k=request.top_k,
    )  # fmt: skip
    client = (request.metadata.user_id if request.metadata else None) or ""
    return Asked(messages, addresses, [options], client, budget=request.budget)


class Reply:
    """How the answer is written."""

    def __init__(self, model: str) -> None:
        self.id, self.model, self.choices = f"msg_{uuid4().hex}", model, [Choice()]

    async def whole(self, answers: Answers) -> dict[str, Any]:
        (choice,) = self.choices
        async for _, piece in answers:
            choice.add(piece)
        return self._message([{"type": "text", "text": choice.text, "citations": None}]) | {
            **_stop(choice.last),
            "usage": _usage(choice.last),
            "timings": timings(choice.last),
        }

    async def events(self, answers: Answers) -> AsyncIterator[bytes]:
        (choice,) = self.choices
        try:
            async for _, piece in answers:
                if not choice.pieces:
                    yield self._start(piece)
                    block = {"type": "text", "text": "", "citations": None}
                    yield named_event(
                        {"type": "content_block_start", "index": 0, "content_block": block}
                    )
                choice.add(piece)
                if piece.text:
                    delta = {"type": "text_delta", "text": piece.text}
                    yield named_event({"type": "content_block_delta", "index": 0, "delta": delta})
        except ApiError as error:
            yield named_event(error.anthropic())
            return
        yield named_event({"type": "content_block_stop", "index": 0})
        yield named_event(
            {"type": "message_delta", "delta": _stop(choice.last), "usage": _usage(choice.last),
             "timings": timings(choice.last)}
        )  # fmt: skip
        yield named_event({"type": "message_stop"})

    def _start(self, first: GenerationResult) -> bytes:
        message = self._message([]) | {
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(first) | {"output_tokens": 0},
        }
        return named_event({"type": "message_start", "message": message})

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id, "type": "message", "role": "assistant", "model": self.model,
            "content": content, "stop_details": None, "container": None,
        }  # fmt: skip


def _stop(last: GenerationResult) -> dict[str, Any]:
    if last.stop_text is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": last.stop_text}
    return {"stop_reason": STOP_REASONS[last.finish_reason or "stop"], "stop_sequence": None}


def _usage(last: GenerationResult) -> dict[str, Any]:
    return {
        "input_tokens": last.prompt_tokens - last.reused_tokens,
        "cache_read_input_tokens": last.reused_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": last.generation_tokens,
        **NOT_USED,
    }
