"""The API as an OpenAPI document, made from what requests are checked against.

A field that is null counts as left out, and the model is one that is served; the document says
so in every schema of a request.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from .. import __version__
from .answer_schemas import ANSWERS, ERRORS
from .messages_api import CountRequest, MessagesRequest
from .requests import NEUTRAL, ChatRequest, CompletionRequest
from .responses_api import ResponsesRequest

# path -> what is sent, what comes back (its stream is events where there is one), what it does
POSTS = {
    "/v1/chat/completions": (ChatRequest, "ChatCompletion", "Answer a chat with pictures"),
    "/v1/completions": (CompletionRequest, "Completion", "Go on with a text as it stands"),
    "/v1/responses": (ResponsesRequest, "Response", "OpenAI's Responses API"),
    "/v1/messages": (MessagesRequest, "Message", "Anthropic's Messages API"),
    "/v1/messages/count_tokens": (CountRequest, "TokenCount", "How long a prompt is, in tokens"),
}
REFUSED = {
    "403": "another origin", "408": "the request came too slowly", "413": "too large",
    "421": "another host name", "500": "the answer failed",
    "503": "too many connections are open",
}  # fmt: skip
NO_KEY = {"401": "the key is missing or wrong"}
NO_MODEL = {"404": "another model"}
NO_ADAPTER = {"400": "another adapter"}
NOT_ANSWERED = {
    "400": "a field is wrong, missing or not supported", "415": "not application/json",
    "429": "too many requests wait",
    "503": "the model is not ready, or too many connections are open",
}  # fmt: skip
JSON = "application/json"
NULL = {"type": "null"}


def document(models: Sequence[str]) -> dict[str, Any]:
    """The whole document, OpenAPI 3.1. models: the names of those that are served."""
    requests = [(request, "validation") for request, _, _ in POSTS.values()]
    _, schemas = models_json_schema(
        requests,  # type: ignore[arg-type]
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, Any] = {
        path: {"post": _post(path, request.__name__, answer, summary)}
        for path, (request, answer, summary) in POSTS.items()
    }
    paths |= {
        "/v1/models": {"get": _get("The model, alone and with each adapter", "ModelList")},
        "/v1/models/{id}": {
            "get": _get("One model", "Model", NO_MODEL | NO_ADAPTER)
            | {"parameters": [_identifier(models)]}
        },
        "/health": {"get": _health()},
        "/metrics": {"get": _get("Prometheus figures", "", kind="text/plain")},
    }
    requested = {name: _as_taken(schema, models) for name, schema in schemas["$defs"].items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlx-vlm-edge", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": requested | ANSWERS | ERRORS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _as_taken(schema: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    """A request's schema with what is done before it is checked: nulls are dropped, whatever their
    name, and so are values of unsupported fields that ask for nothing."""
    properties = dict(schema["properties"])
    if "model" in properties:
        properties["model"] = {"enum": list(models)}
        neutral = {name: {"const": value} for name, value in NEUTRAL.items()}
        properties = neutral | properties
    required = schema.get("required", ())
    for name, of in properties.items():
        takes_null = "default" in of and of["default"] is None
        if name not in required and not takes_null:
            properties[name] = {"anyOf": [of, NULL]}
    return {**schema, "properties": properties, "additionalProperties": NULL}


def _identifier(models: Sequence[str]) -> dict[str, Any]:
    of = {"type": "string", "examples": list(models)}
    return {"name": "id", "in": "path", "required": True, "schema": of}


def _refusals(path: str, told: Mapping[str, str]) -> dict[str, Any]:
    error = "AnthropicError" if path.startswith("/v1/messages") else "Error"
    return {status: _content(text, error) for status, text in sorted(told.items())}


def _content(description: str, schema: str, kind: str = JSON) -> dict[str, Any]:
    of = {"$ref": f"#/components/schemas/{schema}"} if schema else {"type": "string"}
    return {"description": description, "content": {kind: {"schema": of}}}


def _post(path: str, schema: str, answer: str, summary: str) -> dict[str, Any]:
    answered = _content("the answer", answer)
    if answer != "TokenCount":
        answered["content"]["text/event-stream"] = {}  # each event's data is JSON
    body = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
    refusals = _refusals(path, REFUSED | NO_KEY | NO_MODEL | NOT_ANSWERED)
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {JSON: body}},
        "responses": {"200": answered} | refusals,
    }


def _get(
    summary: str, answer: str, more: Mapping[str, str] | None = None, kind: str = JSON
) -> dict[str, Any]:
    refusals = _refusals("", {**REFUSED, **NO_KEY, **(more or {})})
    return {
        "summary": summary,
        "responses": {"200": _content(summary, answer, kind)} | refusals,
    }


def _health() -> dict[str, Any]:
    answered = {
        "200": _content("the model is there", "Health"),
        "503": _content("the model is still being loaded", "NotReady"),
    }
    return {
        "summary": "Whether the model is there",
        "responses": _refusals("", REFUSED) | answered,
        "security": [],
    }
