"""OpenAI's Responses API: POST /v1/responses, whole or as server-sent events; nothing is stored."""

import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import BeforeValidator, Field

from .answering import Answers, Asked, Choice
from .errors import ApiError
from .limits import Limits
from .openai import make_options, named_event, timings
from .requests import JsonObjectFormat, Number, Pictured, Strict, TextFormat, Whole


class InputText(Strict):
    type: Literal["input_text"]
    text: str


class OutputText(Strict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputImage(Strict):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high"] = "auto"


def _input_texts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


def _output_texts(content: Any) -> Any:
    return [{"type": "output_text", "text": content}] if isinstance(content, str) else content


def _items(given: Any) -> Any:
    """A bare text as the user's message; a message may leave its type out."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    return given


UserPart = Annotated[InputText | InputImage, Field(discriminator="type")]


class UserItem(Strict):
    type: Literal["message"] = "message"
    role: Literal["user"]
    content: Annotated[
        list[UserPart],
        BeforeValidator(_input_texts, json_schema_input_type=str | list[UserPart]),
    ]


class SystemItem(Strict):
    type: Literal["message"] = "message"
    role: Literal["system", "developer"]
    content: Annotated[
        list[InputText],
        BeforeValidator(_input_texts, json_schema_input_type=str | list[InputText]),
    ]


class AssistantItem(Strict):
    type: Literal["message"] = "message"
    role: Literal["assistant"]
    content: Annotated[
        list[OutputText],
        BeforeValidator(_output_texts, json_schema_input_type=str | list[OutputText]),
    ]
    id: str | None = None
    status: str | None = None
    phase: Literal["commentary", "final_answer"] | None = None


Item = Annotated[UserItem | SystemItem | AssistantItem, Field(discriminator="role")]


Items = Annotated[list[Item], Field(min_length=1)]


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class TextSettings(Strict):
    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] = (
        TextFormat(type="text")
    )


class ResponsesRequest(Pictured):
    """POST /v1/responses."""

    model: str | None = None
    input: Annotated[Items, BeforeValidator(_items, json_schema_input_type=str | Items)]
    instructions: str | None = None
    max_output_tokens: Annotated[Whole, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    stream: bool = False
    text: TextSettings = TextSettings()
    user: str | None = None

    @property
    def schema_of_answer(self) -> Mapping[str, Any] | None:
        wanted = self.text.format
        if wanted.type == "json_schema":
            return wanted.schema_
        return {"type": "object"} if wanted.type == "json_object" else None


def asked(request: ResponsesRequest, limits: Limits) -> Asked:
    """The request in our own terms. Raises ApiError for a schema that cannot be enforced."""
    messages: list[dict[str, Any]] = []
    addresses: list[tuple[str, str]] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    for index, item in enumerate(request.input):
        parts: list[dict[str, str]] = []
        for place, part in enumerate(item.content):
            if part.type == "input_image":
                addresses.append((f"input.{index}.content.{place}.image_url", part.image_url))
                parts.append({"type": "image"})
            else:
                parts.append({"type": "text", "text": part.text})
        role = "system" if item.role == "developer" else item.role
        messages.append({"role": role, "content": parts})
    options = make_options(
        limits, request.max_output_tokens, temperature=request.temperature, top_p=request.top_p,
        schema=request.schema_of_answer, field="text.format",
    )  # fmt: skip
    return Asked(
        messages, addresses, [options], request.user or "", field="input", budget=request.budget
    )


class Reply:
    """How the answer is written."""

    def __init__(self, request: ResponsesRequest, model: str) -> None:
        self.request, self.model, self.choices = request, model, [Choice()]
        self.id, self.item = f"resp_{uuid4().hex}", f"msg_{uuid4().hex}"
        self.created = int(time.time())

    async def whole(self, answers: Answers) -> dict[str, Any]:
        async for _, piece in answers:
            self.choices[0].add(piece)
        return self._finished()

    async def events(self, answers: Answers) -> AsyncIterator[bytes]:
        number = -1

        def told(kind: str, **content: Any) -> bytes:
            nonlocal number
            number += 1
            return named_event({"type": f"response.{kind}", "sequence_number": number, **content})

        (choice,) = self.choices
        started = self._response("in_progress", [])
        yield told("created", response=started)
        yield told("in_progress", response=started)
        place = {"item_id": self.item, "output_index": 0, "content_index": 0}
        yield told("output_item.added", output_index=0, item=self._item("in_progress", []))
        yield told("content_part.added", **place, part=_text(""))
        try:
            async for _, piece in answers:
                choice.add(piece)
                if piece.text:
                    yield told("output_text.delta", **place, delta=piece.text, logprobs=[])
        except ApiError as error:
            failed = self._response("failed", []) | {
                "error": {"code": "server_error", "message": error.message}
            }
            yield told("failed", response=failed)
            return
        yield told("output_text.done", **place, text=choice.text, logprobs=[])
        yield told("content_part.done", **place, part=_text(choice.text))
        finished = self._finished()
        yield told("output_item.done", output_index=0, item=finished["output"][0])
        yield told(finished["status"], response=finished)

    def _finished(self) -> dict[str, Any]:
        (choice,) = self.choices
        last = choice.last
        cut = last.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        response = self._response(status, [self._item(status, [_text(choice.text)])])
        total = last.prompt_tokens + last.generation_tokens
        return response | {
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": last.prompt_tokens,
                "input_tokens_details": {"cached_tokens": last.reused_tokens},
                "output_tokens": last.generation_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": total,
            },
            "timings": timings(last),
        }

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.item, "type": "message", "status": status, "role": "assistant",
            "content": content,
        }  # fmt: skip

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        request = self.request
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status,
            "completed_at": None, "error": None, "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens, "model": self.model, "output": output,
            "parallel_tool_calls": False, "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None}, "store": False,
            "temperature": request.temperature or 0.0,
            "text": request.text.model_dump(by_alias=True), "tool_choice": "none", "tools": [],
            "top_p": request.top_p or 1.0, "truncation": "disabled", "usage": None,
            "user": request.user, "metadata": {}, "background": False, "frequency_penalty": 0.0,
            "presence_penalty": 0.0, "top_logprobs": 0, "max_tool_calls": None,
            "prompt_cache_key": None, "safety_identifier": None, "service_tier": "default",
        }  # fmt: skip


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
