"""Counts and times of a running server, in Prometheus' text form."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from ..generation.engine import Engine
from .answering import Choice

SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """One server's figures; nothing of what was asked or answered is in them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "requests", "Requests by HTTP status", ["status"], "mlx_vlm_edge",
            registry=self._registry,
        )  # fmt: skip
        self._tokens = Counter(
            "tokens", "Tokens by kind", ["kind"], "mlx_vlm_edge", registry=self._registry
        )
        self._ttft = Histogram(
            "ttft_seconds", "From a request to its first token", (), "mlx_vlm_edge",
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip
        self._places = Gauge(
            "prompts", "Prompts being answered or waiting", ["state"], "mlx_vlm_edge",
            registry=self._registry,
        )  # fmt: skip

    def refused(self, status: int) -> None:
        self._requests.labels(str(status)).inc()

    def answered(self, choices: Sequence[Choice]) -> None:
        self._requests.labels("200").inc()
        pieces = [choice.last for choice in choices if choice.pieces]
        if not pieces:
            return
        first = pieces[0]
        self._ttft.observe(first.ttft_e2e)
        self._tokens.labels("prompt").inc(first.prompt_tokens)
        self._tokens.labels("cached").inc(first.reused_tokens)
        self._tokens.labels("visual").inc(first.visual_tokens)
        self._tokens.labels("generated").inc(sum(piece.generation_tokens for piece in pieces))

    def page(self, engine: Engine | None) -> tuple[bytes, str]:
        """The figures and their content type."""
        self._places.labels("answering").set(engine.answering if engine else 0)
        self._places.labels("waiting").set(engine.waiting if engine else 0)
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
