"""The API as an OpenAPI document, made from what requests are checked against."""

from typing import Any

from pydantic.json_schema import models_json_schema

from .. import __version__
from .messages_api import MessagesRequest
from .requests import ChatRequest, CompletionRequest
from .responses_api import ResponsesRequest

REQUESTS = {
    "/v1/chat/completions": (ChatRequest, "Answer a chat with pictures"),
    "/v1/completions": (CompletionRequest, "Go on with a text as it stands"),
    "/v1/responses": (ResponsesRequest, "OpenAI's Responses API"),
    "/v1/messages": (MessagesRequest, "Anthropic's Messages API"),
}
REFUSALS = {
    "400": "a field is wrong, missing or not supported", "401": "the key is missing or wrong",
    "403": "another origin", "404": "another model", "408": "the request came too slowly",
    "413": "too large", "415": "not application/json", "421": "another host name",
    "429": "too many requests wait", "500": "the answer failed", "503": "the model is not ready",
}  # fmt: skip
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        },
    },
}


def document() -> dict[str, Any]:
    """The whole document, OpenAPI 3.1."""
    models = [(request, "validation") for request, _ in REQUESTS.values()]
    _, schemas = models_json_schema(
        models,  # type: ignore[arg-type]
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, Any] = {
        path: {"post": _post(request.__name__, summary)}
        for path, (request, summary) in REQUESTS.items()
    }
    paths |= {
        "/v1/models": {"get": _get("The model that is served")},
        "/v1/models/{id}": {"get": _get("One model") | {"parameters": [_ID]}},
        "/health": {"get": _get("Whether the model is there")},
        "/metrics": {"get": _get("Prometheus figures", "text/plain")},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlx-vlm-edge", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"] | {"Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


_ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}


def _refusals() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": text, "content": content} for status, text in REFUSALS.items()}


def _post(schema: str, summary: str) -> dict[str, Any]:
    body = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
    answer = {
        "application/json": {"schema": {"type": "object"}},
        "text/event-stream": {"schema": {"type": "string"}},
    }
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {"200": {"description": "the answer", "content": answer}} | _refusals(),
    }


def _get(summary: str, kind: str = "application/json") -> dict[str, Any]:
    schema = {"type": "object"} if kind == "application/json" else {"type": "string"}
    return {
        "summary": summary,
        "responses": {"200": {"description": summary, "content": {kind: {"schema": schema}}}}
        | _refusals(),
    }
