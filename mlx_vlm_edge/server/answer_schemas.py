"""What the server's answers and refusals look like, as JSON schemas for the OpenAPI document."""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
MILLISECONDS: Schema = {"type": "number", "minimum": 0}
ANY: Schema = {}


def _const(value: str) -> Schema:
    return {"const": value}


def _one_of(*values: str | None) -> Schema:
    return {"enum": list(values)}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _or_null(of: Schema) -> Schema:
    return {"anyOf": [of, {"type": "null"}]}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(**properties: Schema) -> Schema:
    """An object that has all of these fields, and may have more."""
    return {"type": "object", "required": list(properties), "properties": properties}


TIMINGS = _object(
    ttft_ms=MILLISECONDS, decode_ms=MILLISECONDS, decode_tokens_per_second=MILLISECONDS
) | {"additionalProperties": MILLISECONDS}
USAGE = _object(
    prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT,
    prompt_tokens_details=_object(cached_tokens=COUNT, visual_tokens=COUNT),
    completion_tokens_details=_object(
        accepted_prediction_tokens=COUNT, rejected_prediction_tokens=COUNT
    ),
)  # fmt: skip
FINISH = _one_of("stop", "length")
OUTPUT_TEXT = _object(type=_const("output_text"), text=TEXT, annotations=_list(ANY))
MODEL = _object(
    id=TEXT, object=_const("model"), created=COUNT, owned_by=TEXT, loaded={"type": "boolean"}
)
ANSWERS: Schema = {
    "ChatCompletion": _object(
        id=TEXT, object=_const("chat.completion"), created=COUNT, model=TEXT,
        choices=_list(_object(
            index=COUNT, finish_reason=FINISH, logprobs=_or_null({"type": "object"}),
            message=_object(role=_const("assistant"), content=TEXT),
        )),
        usage=USAGE, timings=TIMINGS,
    ),
    "Completion": _object(
        id=TEXT, object=_const("text_completion"), created=COUNT, model=TEXT,
        choices=_list(_object(
            index=COUNT, finish_reason=FINISH, logprobs=_or_null({"type": "object"}), text=TEXT,
        )),
        usage=USAGE, timings=TIMINGS,
    ),
    "Response": _object(
        id=TEXT, object=_const("response"), created_at=COUNT, model=TEXT,
        status=_one_of("completed", "incomplete"),
        output=_list(_object(
            id=TEXT, type=_const("message"), status=_one_of("completed", "incomplete"),
            role=_const("assistant"), content=_list(OUTPUT_TEXT),
        )),
        usage=_object(input_tokens=COUNT, output_tokens=COUNT, total_tokens=COUNT),
        timings=TIMINGS,
    ),
    "Message": _object(
        id=TEXT, type=_const("message"), role=_const("assistant"), model=TEXT,
        content=_list(_object(type=_const("text"), text=TEXT)),
        stop_reason=_one_of("end_turn", "max_tokens", "stop_sequence"),
        stop_sequence=_or_null(TEXT),
        usage=_object(
            input_tokens=COUNT, output_tokens=COUNT, cache_read_input_tokens=COUNT,
            cache_creation_input_tokens=COUNT,
        ),
        timings=TIMINGS,
    ),
    "TokenCount": _object(input_tokens=COUNT),
    "Model": MODEL,
    "ModelList": _object(object=_const("list"), data=_list(MODEL)),
    "Health": _object(status=_one_of("ok", "loading", "failed")),
}  # fmt: skip
ERRORS: Schema = {
    "Error": _object(
        error=_object(message=TEXT, type=TEXT, param=_or_null(TEXT), code=_or_null(TEXT))
    ),
    "NotReady": {"anyOf": [_reference("Health"), _reference("Error")]},
    "AnthropicError": _object(type=_const("error"), error=_object(type=TEXT, message=TEXT)),
}
