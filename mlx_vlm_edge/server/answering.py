"""A checked request -> prompts in the engine's line, and their pieces back in the event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool

from ..errors import UsageError
from ..generation.answer import GenerationResult
from ..generation.engine import BusyError, ClosingError, Engine, Ticket
from ..generation.loop import Options
from ..picture.token_budget import TokenBudget
from ..text.prompt import Inputs
from ..timings import Timer
from . import pictures
from .errors import RETRY_SECONDS, ApiError, bad_request
from .limits import Limits

PREPARING = 2  # requests whose pictures are decoded at the same time


@dataclass(frozen=True)
class Asked:
    """One request in our own terms, whichever API it came by.

    messages: as `processor` takes them, or with `raw` a text. addresses: (field, address) of each
    picture, in order. options: one for each answer that is asked for. field: the request's own name
    of what holds the prompt, for errors. budget: how many visual tokens each picture has, where
    that is said.
    """

    messages: Any
    addresses: Sequence[tuple[str, str]]
    options: Sequence[Options]
    client: str = ""
    field: str = "messages"
    raw: bool = False
    budget: TokenBudget | None = None


@dataclass
class Choice:
    """An answer so far."""

    text: str = ""
    pieces: list[GenerationResult] = field(default_factory=list)

    @property
    def last(self) -> GenerationResult:
        return self.pieces[-1]

    def add(self, piece: GenerationResult) -> None:
        self.text += piece.text
        self.pieces.append(piece)


class Answering:
    """Prepares requests beside the engine's thread and follows their answers."""

    def __init__(self, engine: Engine, limits: Limits, remote_images: bool) -> None:
        self.engine, self.limits, self.remote_images = engine, limits, remote_images
        self.processor = engine.processor  # which the engine lets go of when it closes
        self._preparing, self._under_way = asyncio.Semaphore(PREPARING), 0

    async def start(self, asked: Asked, adapter: str | None = None) -> "Answers":
        """Decode, tokenise and put in the line, for the model with an adapter. Raises ApiError."""
        timer = Timer(measured=True)
        started = timer.restart()
        inputs = await self._prepared(asked, timer)
        answers = Answers(len(asked.options))
        try:
            for index, options in enumerate(asked.options):
                ticket = self.engine.submit(
                    inputs, options, answers.deliverer(index), adapter=adapter,
                    client=asked.client, timer=timer.copy(), started=started,
                )  # fmt: skip
                answers.tickets.append(ticket)
        except BusyError:
            answers.cancel()
            raise busy() from None
        except ClosingError:
            answers.cancel()
            raise closing() from None
        except UsageError as error:
            raise bad_request(str(error), asked.field, "context_length_exceeded") from None
        return answers

    async def count(self, asked: Asked) -> int:
        """Tokens of the prompt, the visual ones included. Raises ApiError."""
        inputs = await self._prepared(asked, Timer())
        return int(inputs.input_ids.shape[1])

    async def _prepared(self, asked: Asked, timer: Timer) -> Inputs:
        if len(asked.options) > self.limits.waiting:  # not even alone
            told = f"n: at most {self.limits.waiting} answers to one request are given"
            raise bad_request(told, "n", "too_many")
        if self.engine.waiting + len(asked.options) > self.limits.waiting:
            raise busy()
        if self._under_way >= self.limits.waiting + self.limits.rows:  # each holds a whole body
            raise busy()
        self._under_way += 1
        try:
            async with self._preparing:
                work = asyncio.ensure_future(run_in_threadpool(self._prepare, asked, timer))
                # Looked at where nobody is left to be told, or the loop logs it as an error.
                work.add_done_callback(lambda done: done.cancelled() or done.exception())
                try:
                    await asyncio.wait([work])
                finally:  # cancelled or not, the thread goes on to its end, and has its place
                    await asyncio.wait([work])
                return work.result()
        finally:
            self._under_way -= 1

    def _prepare(self, asked: Asked, timer: Timer) -> Inputs:
        timer.mark("queue")
        images = pictures.read(asked.addresses, asked.field, self.limits, self.remote_images)
        try:
            steps = self.processor.steps(asked.messages, images, raw=asked.raw, budget=asked.budget)
            return timer.run(steps)
        except UsageError as error:
            raise bad_request(str(error), asked.field) from None


def busy() -> ApiError:
    return ApiError(
        429, "too many requests wait: try again later", code="busy", retry_after=RETRY_SECONDS
    )


def closing() -> ApiError:
    return ApiError(503, "the server is shutting down", code="closing", retry_after=RETRY_SECONDS)


class Answers:
    """The pieces of one request's answers, as they come."""

    def __init__(self, count: int) -> None:
        self.tickets: list[Ticket] = []
        self._open = count
        self._arrived: asyncio.Queue[tuple[int, GenerationResult | Exception]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def deliverer(self, index: int) -> Callable[[GenerationResult | Exception], None]:
        def deliver(piece: GenerationResult | Exception) -> None:
            try:
                self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, piece))
            except RuntimeError:  # the loop is closed: nobody waits any more
                self.cancel()

        return deliver

    def cancel(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, GenerationResult]]:
        """(choice, piece) until every answer has ended. Raises ApiError where one fails."""
        try:
            while self._open:
                index, piece = await self._arrived.get()
                if isinstance(piece, Exception):
                    raise _failure(piece)
                self._open -= piece.finish_reason is not None
                yield index, piece
        finally:
            self.cancel()


def _failure(error: Exception) -> ApiError:
    if isinstance(error, UsageError):
        return bad_request(str(error))
    if isinstance(error, ClosingError):
        return closing()
    return ApiError(500, f"the answer failed ({type(error).__name__})", code="failed")
