"""Connections whose client sends or takes nothing in time end; uvicorn lets them stay.

Those beyond as many as may be open are marked, and refused by the guards in the API's own form.
"""

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .guards import FULL

HEADER_SECONDS = 10.0
STUCK_SECONDS = 45.0  # longer than Limits.send_seconds, which tells the answer first


class Protocol(H11Protocol):
    """HTTP/1.1 with limits on waiting that no byte of a client's extends.

    A request's line and headers are there HEADER_SECONDS after connecting, or after the time that
    a connection may be idle; what is sent is taken within STUCK_SECONDS. uvicorn's own limit, which
    counts the one that asks and answers without JSON, is taken over.
    """

    _late: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._most, self.limit_concurrency = self.limit_concurrency, None
        self._inner, self.app = self.app, self._marked
        self.admitted = False

    async def _marked(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._admit()
        await self._inner({**scope, FULL: not self.admitted}, receive, send)

    def _admit(self) -> None:
        """Take a place if there is one; it is kept until the connection ends."""
        own = (each for each in self.connections if isinstance(each, Protocol))
        taken = sum(each.admitted for each in own)
        self.admitted = self.admitted or self._most is None or taken < self._most

    def connection_made(self, transport: Any) -> None:
        self._admit()
        super().connection_made(transport)
        self._late = self.loop.call_later(HEADER_SECONDS, transport.abort)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            _cancel(self._late)

    def on_response_complete(self) -> None:
        _cancel(self._late)
        seconds = self.timeout_keep_alive + HEADER_SECONDS
        self._late = self.loop.call_later(seconds, self.transport.abort)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(STUCK_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._stuck)

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._late)
        _cancel(self._stuck)
        super().connection_lost(exc)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
