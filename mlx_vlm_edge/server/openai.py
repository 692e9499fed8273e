"""The OpenAI API: chat completions and completions, whole or as server-sent events."""

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast
from uuid import uuid4

from ..errors import UsageError
from ..generation.answer import GenerationResult
from ..generation.choosing import TokenLogprobs
from ..generation.loop import Options
from ..text.tokenizer import Tokenizer
from .answering import Answers, Asked, Choice
from .errors import ApiError, bad_request
from .limits import Limits
from .requests import ChatRequest, CompletionRequest, Sampling

SETTINGS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip
DONE = b"data: [DONE]\n\n"
# Our stages -> keys of `timings`, in milliseconds.
STAGES = {
    "image decode": "image_decode_ms",
    "preprocess": "preprocess_ms",
    "tokenise": "tokenise_ms",
    "queue": "queue_ms",
    "vision": "vision_ms",
    "connector": "connector_ms",
    "reduce": "reduce_ms",
    "prefill": "prefill_ms",
    "first sample": "first_sample_ms",
}


def make_options(
    limits: Limits, tokens: int | None, field: str = "response_format", **settings: Any
) -> Options:
    """Options from what a request asks for, None being left out; greedy unless told otherwise.

    tokens: the request's own limit. field: what has the schema. Raises ApiError for a schema that
    cannot be enforced.
    """
    chosen = {name: value for name, value in settings.items() if value is not None}
    try:
        return Options(
            **{"temperature": 0.0, **chosen, **limits.cache},
            max_tokens=min(tokens or limits.tokens, limits.tokens),
        )
    except UsageError as error:  # all else is checked
        raise bad_request(str(error), field, "invalid_schema") from None


def sampling_options(
    request: Sampling, limit: int | None, limits: Limits, **more: Any
) -> list[Options]:
    """The options of each of the n answers; a seed is counted up from one answer to the next."""
    settings = {name: getattr(request, name) for name in SETTINGS} | more
    first = make_options(limits, limit, stop=tuple(request.stop), **settings)
    if request.seed is None:
        return [first] * request.n
    return [replace(first, seed=(request.seed + index) % 2**64) for index in range(request.n)]


def response_schema(request: ChatRequest) -> Mapping[str, Any] | None:
    """The JSON schema that answers must follow, None for any text."""
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    return {"type": "object"} if wanted.type == "json_object" else wanted.json_schema.schema_


def chat_asked(request: ChatRequest, limits: Limits) -> Asked:
    """A chat in our own terms."""
    messages: list[dict[str, Any]] = []
    addresses: list[tuple[str, str]] = []
    for index, message in enumerate(request.messages):
        role = "system" if message.role == "developer" else message.role
        parts: list[dict[str, str]] = []
        for place, part in enumerate(message.content):
            if part.type == "text":
                parts.append({"type": "text", "text": part.text})
            else:
                field = f"messages.{index}.content.{place}.image_url"
                addresses.append((field, part.image_url.url))
                parts.append({"type": "image"})
        messages.append({"role": role, "content": parts})
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    options = sampling_options(
        request, request.limit, limits, schema=response_schema(request), logprobs=logprobs
    )
    return Asked(messages, addresses, options, client=request.user or "", budget=request.budget)


def completion_asked(request: CompletionRequest, limits: Limits) -> Asked:
    options = sampling_options(request, request.limit, limits, logprobs=request.logprobs)
    return Asked(request.prompt, (), options, client=request.user or "", field="prompt", raw=True)


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens of a prompt, which counts once, and of all its answers."""
    lasts = [choice.last for choice in choices]
    first, answered = lasts[0], sum(last.generation_tokens for last in lasts)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": answered,
        "total_tokens": first.prompt_tokens + answered,
        "prompt_tokens_details": {
            "cached_tokens": first.reused_tokens,
            "visual_tokens": first.visual_tokens,
        },
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(last.accepted_tokens for last in lasts),
            "rejected_prediction_tokens": sum(
                last.drafted_tokens - last.accepted_tokens for last in lasts
            ),
        },
    }


def timings(piece: GenerationResult) -> dict[str, float]:
    """Milliseconds of every stage, the first token's and the rest's, and tokens per second."""
    stages = piece.stages or {}
    took = {key: round(stages[name] * 1000, 3) for name, key in STAGES.items() if name in stages}
    decoding = (piece.generation_tokens - 1) / piece.generation_tps if piece.generation_tps else 0.0
    return took | {
        "ttft_ms": round(piece.ttft_e2e * 1000, 3),
        "decode_ms": round(decoding * 1000, 3),
        "decode_tokens_per_second": round(piece.generation_tps, 3),
    }


class Reply:
    """How the answers to one request are written: as an object, or as events."""

    def __init__(
        self, request: ChatRequest | CompletionRequest, model: str, tokenizer: Tokenizer
    ) -> None:
        self.chat, self.tokenizer = isinstance(request, ChatRequest), tokenizer
        wanted = request.stream_options
        self.include_usage = wanted is not None and wanted.include_usage
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid4().hex}"
        self.created, self.model = int(time.time()), model
        self.choices = [Choice() for _ in range(request.n)]

    async def whole(self, answers: Answers) -> dict[str, Any]:
        async for index, piece in answers:
            self.choices[index].add(piece)
        return self._head(stream=False) | {
            "choices": [self._choice(index, choice) for index, choice in enumerate(self.choices)],
            "usage": usage(self.choices),
            "timings": timings(self.choices[0].last),
        }

    async def events(self, answers: Answers) -> AsyncIterator[bytes]:
        head = self._head(stream=True)
        if self.chat:
            for index in range(len(self.choices)):
                delta = {"role": "assistant", "content": ""}
                yield event(head | {"choices": [self._delta(index, delta, None)]})
        try:
            async for index, piece in answers:
                self.choices[index].add(piece)
                if piece.text or piece.finish_reason or piece.logprobs:
                    yield event(head | self._piece(index, piece))
        except ApiError as error:  # the status is on its way already
            yield event(error.openai())
            return
        if self.include_usage:
            yield event(head | {"choices": [], "usage": usage(self.choices)})
        yield DONE

    def _head(self, stream: bool) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        if stream and self.chat:
            kind += ".chunk"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _piece(self, index: int, piece: GenerationResult) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        more = {"timings": timings(piece)} if piece.finish_reason else {}
        logprobs = self._logprobs([piece])
        return {"choices": [self._delta(index, delta, piece.finish_reason, logprobs)], **more}

    def _delta(
        self, index: int, delta: Mapping[str, str], reason: str | None, logprobs: Any = None
    ) -> dict[str, Any]:
        content: dict[str, Any] = (
            {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        )
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, pieces: Sequence[GenerationResult]) -> dict[str, Any] | None:
        """What was told of the pieces' tokens, None where nothing was."""
        told = [
            (piece.token, piece.logprobs)
            for piece in pieces
            if isinstance(piece.logprobs, TokenLogprobs)
        ]
        if not told:
            return None
        entries = [
            {
                **self._token(cast(int, token), of.logprob),
                "top_logprobs": [self._token(id, logprob) for id, logprob in of.top],
            }
            for token, of in told
        ]
        if self.chat:
            return {"content": entries, "refusal": None}
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [
                {top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries
            ],
        }

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        """A token's text, bytes and log-probability, which JSON cannot have infinite."""
        text = self.tokenizer.decode([id], skip_special=False)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text: dict[str, Any] = {"text": choice.text}
        if self.chat:
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            text = {"message": {**message, "annotations": []}}
        return {
            "index": index, **text, "logprobs": self._logprobs(choice.pieces),
            "finish_reason": choice.last.finish_reason,
        }  # fmt: skip


def event(content: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def named_event(content: Mapping[str, Any]) -> bytes:
    """One server-sent event with its type as its name."""
    return f"event: {content['type']}\n".encode() + event(content)
