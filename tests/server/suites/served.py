"""The demo model's server, as a suite of others' tests needs it: python -m ... PORT [llama [KEY]].

llama: under the addresses of llama.cpp's server, and whatever model a request names.
"""

import json
import sys

import mlx.core as mx
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_vlm_edge import PrefixCache, load
from mlx_vlm_edge.generation import engine as engine_module
from mlx_vlm_edge.server.app import Served, application
from mlx_vlm_edge.server.connections import Protocol
from mlx_vlm_edge.server.guards import Access

AS_LLAMA = ("/models", "/responses", "/completions", "/chat/completions")

WEIGHTS = {'"': 300, "}": 200, "]": 200, ",": 100, ":": 100}  # first what ends a text


class AnyModel:
    """ASGI: /chat/completions is /v1/chat/completions, and the model's name is left out."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in AS_LLAMA:
            scope = {**scope, "path": "/v1" + scope["path"]}
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        sent = json.loads(body)
        sent.pop("model", None)
        body = json.dumps(sent).encode()
        headers = [item for item in scope["headers"] if item[0] != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self.app({**scope, "headers": headers}, replay, send)


def end_texts_soon() -> None:
    """Answers that follow a schema lean to the marks that close something: the demo model has never
    seen JSON, and would go on with a text until no token is left."""
    make = engine_module.token_sampler

    def leaning(model, processor, inputs, options):
        sample = make(model, processor, inputs, options)
        if options.schema is None:
            return sample
        size = model.language_model.config.vocab_size
        texts = [processor.tokenizer.decode([token]) for token in range(size)]
        closing = [WEIGHTS.get(text[:1], 0) * (set(text) <= set(WEIGHTS)) for text in texts]
        bias = mx.array(closing, mx.float32)
        draw = sample._penalized
        sample._penalized = lambda logits: draw(logits) + bias
        return sample

    engine_module.token_sampler = leaning


def main(port: str, kind: str = "", key: str = "") -> None:
    end_texts_soon()
    engine = engine_module.Engine(*load("demo"), prefix_cache=PrefixCache())
    name = "tinyllama-2" if kind == "llama" else "demo"
    app: ASGIApp = application(Served(name, access=Access(key=key or None), engine=engine))
    uvicorn.run(
        AnyModel(app) if kind == "llama" else app, port=int(port), http=Protocol, ws="none",
        log_level="error", timeout_graceful_shutdown=1,
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
