"""The application: routes to the APIs, one engine behind all of them, and what guards it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..generation.engine import Engine
from . import messages_api, openai, responses_api
from .answering import Answering, Answers, Asked, Choice, closing
from .errors import ApiError, bad_request
from .guards import Access, Guards
from .limits import Limits
from .messages_api import CountRequest, MessagesRequest
from .metrics import Metrics
from .requests import ChatRequest, CompletionRequest, check_count, parse
from .responses_api import ResponsesRequest

T = TypeVar("T")
PAGE = Path(__file__).parent / "page"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'"
)
FILES = {
    "/": "index.html", "/page.js": "page.js", "/page.css": "page.css", "/icon.svg": "icon.svg",
}  # fmt: skip


@dataclass
class Served:
    """What is served: name is the model's, as clients call it; engine is None while it loads.

    adapters: names of those that a request may ask for, as the model name:adapter. failure: why
    there will be none. on_failure: called when that is known, to end the server.
    """

    name: str
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)
    remote_images: bool = False
    engine: Engine | None = None
    failure: Exception | None = None
    on_failure: Callable[[], None] | None = None
    answering: Answering | None = field(default=None, init=False)
    metrics: Metrics = field(default_factory=Metrics)
    adapters: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.engine is not None:
            self.answer_with(self.engine)

    def answer_with(self, engine: Engine) -> None:
        """From now on; what the engine lets go of when it closes is taken here, not by a request
        that may come meanwhile."""
        self.engine = engine
        self.answering = Answering(engine, self.limits, self.remote_images)

    @property
    def models(self) -> dict[str, str | None]:
        """The names that requests may call a model by, and the adapter of each."""
        return {self.name: None} | {f"{self.name}:{adapter}": adapter for adapter in self.adapters}

    def ready(self, name: str | None) -> Answering:
        """Raises ApiError 404 for another model's name, 400 for another adapter's, 503 until the
        model is there and when the server ends, and 500 where it cannot be loaded."""
        self.adapter(name)
        if self.failure is not None:
            raise ApiError(500, "the model could not be loaded", code="failed")
        if self.answering is None:
            raise ApiError(503, "the model is still being loaded", code="loading", retry_after=1)
        if self.answering.engine.closing:
            raise closing()
        return self.answering

    def adapter(self, name: str | None) -> str | None:
        """The adapter of the model that a request names. Raises ApiError for another's name."""
        if name is None or name in self.models:
            return self.models[name or self.name]
        if self.adapters and name.startswith(f"{self.name}:"):
            raise bad_request(
                f"the adapters served here are {', '.join(self.adapters)}", "model",
                "adapter_not_found",
            )  # fmt: skip
        raise ApiError(
            404, f"the model served here is {self.name}", param="model", code="model_not_found"
        )


def application(served: Served, load: Callable[[], Engine] | None = None) -> Guards:
    """The ASGI application. load: makes the engine, in a thread, after the server has started."""
    routes = [
        Route("/v1/chat/completions", _endpoint(served, _chat), methods=["POST"]),
        Route("/v1/completions", _endpoint(served, _completion), methods=["POST"]),
        Route("/v1/responses", _endpoint(served, _responses), methods=["POST"]),
        Route("/v1/messages", _endpoint(served, _messages), methods=["POST"]),
        Route("/v1/messages/count_tokens", _endpoint(served, _count_tokens), methods=["POST"]),
        Route("/openapi.json", _endpoint(served, _openapi), methods=["GET"]),
        Route("/v1/models", _endpoint(served, _models), methods=["GET"]),
        Route("/v1/models/{id:path}", _endpoint(served, _model), methods=["GET"]),
        Route("/health", _endpoint(served, _health), methods=["GET"]),
        Route("/metrics", _endpoint(served, _metrics), methods=["GET"]),
        *(Route(path, _file(name), methods=["GET"]) for path, name in FILES.items()),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(served, load)) if load else None
        try:
            yield
        finally:
            if loading is not None:
                loading.cancel()
                if served.engine is not None:
                    await asyncio.to_thread(served.engine.close)

    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={404: _not_found, 405: _not_allowed, Exception: _failed},
    )
    # A load balancer has no key, and the page is where a key is typed in.
    return Guards(app, served.access, served.limits, open_paths={"/health", *FILES})


async def _load(served: Served, load: Callable[[], Engine]) -> None:
    try:
        served.answer_with(await asyncio.to_thread(load))
    except Exception as error:  # noqa: BLE001  (whoever started the server tells of it)
        served.failure = error
        if served.on_failure is not None:
            served.on_failure()


Handler = Callable[[Served, Request], Awaitable[Response]]


def _endpoint(served: Served, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(served, request)
        except ApiError as error:
            served.metrics.refused(error.status)
            return _refused(request, error)

    return endpoint


def _refused(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.form(request.url.path), error.status, error.headers)


async def _not_found(request: Request, error: Exception) -> Response:
    told = ApiError(404, "there is nothing at this address; see /openapi.json", code="not_found")
    return _refused(request, told)


async def _not_allowed(request: Request, error: Exception) -> Response:
    told = ApiError(405, "this address takes another method; see /openapi.json", code="method")
    response = _refused(request, told)
    response.headers.update(getattr(error, "headers", None) or {})  # Allow
    return response


async def _failed(request: Request, error: Exception) -> Response:
    told = ApiError(500, f"the request failed ({type(error).__name__})", code="failed")
    return _refused(request, told)


async def _body(request: Request) -> Any:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if kind != "application/json":
        raise ApiError(415, "the body must be application/json", code="content_type")
    body = await request.body()
    check_count(body)
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise bad_request("the body is not valid JSON", code="invalid_json") from None


async def _chat(served: Served, request: Request) -> Response:
    sent = parse(ChatRequest, await _body(request))
    return await _complete(served, request, sent, openai.chat_asked(sent, served.limits))


async def _completion(served: Served, request: Request) -> Response:
    sent = parse(CompletionRequest, await _body(request))
    return await _complete(served, request, sent, openai.completion_asked(sent, served.limits))


async def _complete(
    served: Served, request: Request, sent: ChatRequest | CompletionRequest, asked: Asked
) -> Response:
    tokenizer = served.ready(sent.model).processor.tokenizer
    reply = openai.Reply(sent, sent.model or served.name, tokenizer)
    return await _reply(served, request, sent, asked, reply)


async def _responses(served: Served, request: Request) -> Response:
    sent = parse(ResponsesRequest, await _body(request))
    asked = responses_api.asked(sent, served.limits)
    reply = responses_api.Reply(sent, sent.model or served.name)
    return await _reply(served, request, sent, asked, reply)


async def _messages(served: Served, request: Request) -> Response:
    sent = parse(MessagesRequest, await _body(request))
    asked = messages_api.asked(sent, served.limits)
    reply = messages_api.Reply(sent.model or served.name)
    return await _reply(served, request, sent, asked, reply)


async def _count_tokens(served: Served, request: Request) -> Response:
    sent = parse(CountRequest, await _body(request))
    asked = messages_api.asked(sent, served.limits)
    counting = served.ready(sent.model).count(asked)
    return JSONResponse({"input_tokens": await _unless_gone(request, counting)})


class Reply(Protocol):
    """An answer in one API's form."""

    choices: list[Choice]

    async def whole(self, answers: Answers) -> dict[str, Any]: ...
    def events(self, answers: Answers) -> AsyncIterator[bytes]: ...


class Sent(Protocol):
    """What every request for an answer says."""

    @property
    def model(self) -> str | None: ...
    @property
    def stream(self) -> bool: ...


async def _reply(
    served: Served, request: Request, sent: Sent, asked: Asked, reply: Reply
) -> Response:
    starting = served.ready(sent.model).start(asked, served.adapter(sent.model))
    answers = await _unless_gone(request, starting)
    if sent.stream:
        return _Events(served, reply, answers)
    try:
        whole = await _unless_gone(request, reply.whole(answers))
    finally:
        answers.cancel()
    served.metrics.answered(reply.choices)
    return JSONResponse(whole, headers={"Cache-Control": "no-store"})


class _Events(StreamingResponse):
    """An answer as events. Whatever ends it, also before its first event, cancels what is still
    being answered, and counts it."""

    def __init__(self, served: Served, reply: Reply, answers: Answers) -> None:
        super().__init__(
            reply.events(answers),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )
        self.served, self.reply, self.answers = served, reply, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answers.cancel()
            self.served.metrics.answered(self.reply.choices)


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives; of a client that goes away meanwhile it is ended."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(400, "the client is gone")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _models(served: Served, request: Request) -> Response:
    return JSONResponse(
        {"object": "list", "data": [_entry(served, name) for name in served.models]}
    )


async def _model(served: Served, request: Request) -> Response:
    name = request.path_params["id"]
    served.adapter(name)
    return JSONResponse(_entry(served, name))


def _entry(served: Served, name: str) -> dict[str, Any]:
    return {
        "id": name, "object": "model", "created": 0, "owned_by": "mlx-vlm-edge",
        "loaded": served.engine is not None,
    }  # fmt: skip


async def _openapi(served: Served, request: Request) -> Response:
    from .openapi import document

    return JSONResponse(document(list(served.models)))


async def _health(served: Served, request: Request) -> Response:
    if served.engine is None:
        return JSONResponse({"status": "failed" if served.failure else "loading"}, 503)
    return JSONResponse({"status": "ok"})


async def _metrics(served: Served, request: Request) -> Response:
    content, kind = served.metrics.page(served.engine)
    return Response(content, media_type=kind)


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return FileResponse(
            PAGE / name, headers={"Content-Security-Policy": CSP, "Cache-Control": "no-cache"}
        )

    return endpoint
