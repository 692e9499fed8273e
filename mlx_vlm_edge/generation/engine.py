"""One model answers many prompts: each joins a running batch, and a step decodes all of it.

Prompts may name an adapter: a step then goes through the model once for each that is in the batch.

One thread does everything with MLX, in turns: it prefills a prompt that waits while there is a
place, then decodes one token of every prompt that is being answered. Prompts leave when their
answer ends, when they are cancelled, or when they fail, and no other notices.
"""

import atexit
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Condition, Event, Thread
from typing import cast

import mlx.core as mx

from ..errors import UsageError
from ..language.cache import Cache, QuantizingCaches
from ..language.rows import rows_of
from ..models.base import VisionLanguageModel
from ..text.prompt import Inputs, Processor
from ..timings import Timer
from ..wording import say
from .answer import Answer, GenerationResult
from .choosing import TokenSampler
from .drafting import PromptLookup, prompt_lookup, verified_together
from .loop import Options, answer_to, budget, make_cache, prompt_logits, token_sampler
from .prefix import PrefixCache, Run

ROWS = 8
WAITING = 32

Deliver = Callable[[GenerationResult | Exception], None]


class BusyError(Exception):
    """As many prompts wait as may."""


class ClosingError(Exception):
    """The engine answers nothing any more."""


@dataclass(eq=False)
class Ticket:
    """A prompt on its way; `cancel` gives its place free at the next step.

    deliver: called in the engine's thread with every piece of the answer, the last of which has a
    finish reason, or with what went wrong; where it raises, the prompt is cancelled. client: whose
    turn it is when several wait. model: which of the engine's answers.
    """

    inputs: Inputs
    options: Options
    deliver: Deliver
    client: str
    timer: Timer
    started: float
    model: VisionLanguageModel
    _cancelled: Event = field(default_factory=Event)

    def tell(self, piece: GenerationResult | Exception) -> None:
        """Deliver; one that cannot take it harms no other."""
        try:
            self.deliver(piece)
        except Exception as error:  # noqa: BLE001  (whatever the one who asked has it raise)
            self.cancel()
            say(f"an answer is cancelled: it cannot be delivered ({type(error).__name__}: {error})")

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()


class Line:
    """Prompts that wait, taken from one client after the other; cancelled ones have no place."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._by_client: OrderedDict[str, deque[Ticket]] = OrderedDict()

    def __len__(self) -> int:
        return sum(not ticket.cancelled for each in self._by_client.values() for ticket in each)

    def drop_cancelled(self) -> None:
        """Let go of prompts that nobody waits for, and of their pictures."""
        for client, tickets in list(self._by_client.items()):
            left = deque(ticket for ticket in tickets if not ticket.cancelled)
            if left:
                self._by_client[client] = left
            else:
                del self._by_client[client]

    def put(self, ticket: Ticket) -> None:
        """Raises BusyError when the line is full."""
        self.drop_cancelled()
        if len(self) >= self.limit:
            raise BusyError
        self._by_client.setdefault(ticket.client, deque()).append(ticket)

    def take(self) -> Ticket | None:
        """The next ticket of the client who has waited longest for a turn; None when none waits."""
        if not self._by_client:
            return None
        client, tickets = self._by_client.popitem(last=False)
        ticket = tickets.popleft()
        if tickets:
            self._by_client[client] = tickets  # behind the others
        return ticket


class _Row:
    """A prompt that is being answered: its caches, its next token, and its answer so far."""

    def __init__(
        self,
        ticket: Ticket,
        answer: Answer,
        cache: list[Cache],
        sample: TokenSampler,
        run: Run | None,
    ) -> None:
        self.ticket, self.answer, self.cache, self.run = ticket, answer, cache, run
        self.sample = sample
        self.token = mx.array([0])  # int[1], under way
        self.left = 0  # tokens that may come, the one under way included
        self.said: list[int] = []
        self.drafts: PromptLookup | None = None

    def known(self) -> int:
        """The token under way, once it is there."""
        token = cast(int, self.token.item())
        return token if self.drafts is None else self.drafts.said(token)

    def likely_drafts(self) -> PromptLookup | None:
        """Its drafts, where some are likely after the token under way."""
        if self.drafts is None or self.left < 3 or self.ticket.cancelled:
            return None
        return self.drafts if self.drafts.likely() else None

    def deliver(self, token: int) -> bool:
        """Hand out a token; whether the answer goes on."""
        piece = self.answer.add(token, self.sample.told())
        self.said.append(token)
        self.left -= 1
        self.ticket.tell(piece)
        if self.run is not None and len(self.said) == 1:
            self.run.keep_images()
        if piece.finish_reason is not None or self.ticket.cancelled:
            return False
        if not self.left:
            self.ticket.tell(self.answer.cut())
        return self.left > 0

    def remember(self) -> None:
        try:
            if self.run is not None:
                self.run.end(self.said)
        except Exception as error:  # noqa: BLE001  (the answer is whole; the others go on)
            say(f"an answer is not remembered ({type(error).__name__})")


class Engine:
    """Answers prompts with one model; for any number of threads.

    rows: prompts answered together. waiting: prompts that may wait beside them. prefix_cache:
    shared by all of them; None for none. adapters: models with adapters, by the names that prompts
    may ask for them by.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        *,
        rows: int = ROWS,
        waiting: int = WAITING,
        prefix_cache: PrefixCache | None = None,
        adapters: Mapping[str, VisionLanguageModel] | None = None,
    ) -> None:
        self.model, self.processor, self.adapters = model, processor, dict(adapters or {})
        self.rows_limit, self.prefix_cache = rows, prefix_cache
        self._line, self._rows = Line(waiting), list[_Row]()
        self._changed = Condition()
        self._closing, self._idle = False, Event()
        self._thread = Thread(target=self._work, name="mlx-vlm-edge engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(
        self,
        inputs: Inputs,
        options: Options,
        deliver: Deliver,
        *,
        adapter: str | None = None,
        client: str = "",
        timer: Timer | None = None,
        started: float | None = None,
    ) -> Ticket:
        """Put a prompt in the line. Raises BusyError when it is full, ClosingError when it is
        closed, UsageError for a long prompt or an adapter that is not there.

        timer and started: of the prompt's preparation, for its times.
        """
        timer = timer or Timer()
        started = timer.clock() if started is None else started
        with self._changed:  # of one piece: nothing joins a line that is no longer emptied
            if self._closing:
                raise ClosingError
            model = self.model if adapter is None else self.adapters.get(adapter)
            if model is None:
                raise UsageError(f"there is no adapter of the name {adapter}")
            budget(model, inputs, options)
            ticket = Ticket(inputs, options, deliver, client, timer, started, model)
            self._line.put(ticket)
            self._changed.notify_all()
        return ticket

    @property
    def closing(self) -> bool:
        return self._closing

    @property
    def answering(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        with self._changed:
            return len(self._line)

    def close(self) -> None:
        """End what is under way; the thread stays, since MLX may abort a process where one ends."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._idle.wait()
        atexit.unregister(self.close)

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        finally:  # whatever ended it: `close` and the exit wait for that
            self._end()
        Event().wait()

    def _end(self) -> None:
        try:
            with self._changed:
                self._closing = True
            for row in self._rows:
                row.ticket.tell(ClosingError())
            while (ticket := self._line.take()) is not None:
                ticket.tell(ClosingError())
            self._drop(lambda row: True)
            del self.model, self.processor, self.prefix_cache, self.adapters
        finally:
            self._idle.set()

    def _turn(self) -> bool:
        """Admit one prompt where there is a place, decode one token of each; False at the end."""
        with self._changed:
            self._changed.wait_for(self._asked)
            if self._closing:
                return False
            ticket = self._line.take() if len(self._rows) < self.rows_limit else None
        if ticket is not None and not ticket.cancelled:
            self._admit(ticket)
        self._drop(lambda row: row.ticket.cancelled)
        try:
            self._step()
        except Exception as error:  # noqa: BLE001  (no row can go on; the next prompts may)
            for row in self._rows:
                row.ticket.tell(error)
                row.said.clear()  # its pictures are remembered, and no cache that a step failed in
            self._drop(lambda row: True)
        return True

    def _asked(self) -> bool:
        """Whether there is something to do, now that nothing is left of cancelled prompts."""
        self._line.drop_cancelled()
        return self._closing or bool(self._rows) or len(self._line) > 0

    def _admit(self, ticket: Ticket) -> None:
        """Prefill a prompt; its first token is under way when it joins the rows."""
        try:
            self._rows.append(self._prefilled(ticket))
        except Exception as error:  # noqa: BLE001  (told to the one whose prompt it is)
            ticket.tell(error)

    def _prefilled(self, ticket: Ticket) -> _Row:
        model, inputs, options, timer = ticket.model, ticket.inputs, ticket.options, ticket.timer
        cache = make_cache(model, inputs, options)
        store = self.prefix_cache
        run = None if store is None else store.begin(model, self.processor, inputs, cache)
        reused = 0 if run is None else run.start
        timer.mark("queue")
        answer = answer_to(self.processor, inputs, options, timer, ticket.started, reused)
        sample = token_sampler(model, self.processor, inputs, options)
        row = _Row(ticket, answer, cache, sample, run)
        row.left = budget(model, inputs, options)
        if options.draft is not None:
            row.drafts = prompt_lookup(model, inputs, self.processor.eos_ids)
            answer.drafts = row.drafts
        try:
            steps = prompt_logits(model, run or inputs, cache, options.prefill_step_size)
            row.token = row.sample(timer.run(steps))
            mx.async_eval(row.token)
        except Exception:
            row.remember()  # its pictures may be encoded
            raise
        return row

    def _step(self) -> None:
        """Start every row's next token, then hand out the ones that were under way."""
        if len(self._rows) == 1 and (drafts := self._rows[0].likely_drafts()) is not None:
            self._drop(lambda row: not self._drafted(row, drafts))
            return
        on = [row for row in self._rows if row.left > 1]
        following = self._next(on) if on else {}
        over = [row for row in self._rows if not self._delivered(row)]
        for row, token in following.items():
            row.token = token
        self._drop(lambda row: row in over)

    def _next(self, rows: Sequence[_Row]) -> dict[_Row, mx.array]:
        """Each row's token after the one under way, int[1]; one that fails is left out."""
        for row in rows:
            if isinstance(row.cache, QuantizingCaches):
                row.cache.quantize()
        following: dict[_Row, mx.array] = {}
        for row, logits in _logits(rows):
            try:
                following[row] = row.sample(logits)
            except Exception as error:  # noqa: BLE001  (told to the one whose sampling it is)
                row.ticket.cancel()
                row.ticket.tell(error)
        mx.async_eval(list(following.values()))
        return following

    @staticmethod
    def _delivered(row: _Row) -> bool:
        return not row.ticket.cancelled and row.deliver(row.known())

    def _drafted(self, row: _Row, drafts: PromptLookup) -> bool:
        """Hand out the token under way of the only row, and the drafts after it that are right."""
        if isinstance(row.cache, QuantizingCaches):
            row.cache.quantize()
        said = row.known()
        model, left = row.ticket.model, row.left
        verifying = verified_together(model, said, left, row.cache, row.sample, drafts)
        if not row.deliver(said):
            return False
        right, row.token = verifying.outcome()
        drafts.verified(verifying.draft, len(right))
        return all(row.deliver(drafts.said(token)) for token in right)

    def _drop(self, is_over: Callable[[_Row], bool]) -> None:
        over = [row for row in self._rows if is_over(row)]
        self._rows = [row for row in self._rows if row not in over]
        for row in over:
            row.remember()


def _logits(rows: Sequence[_Row]) -> Iterator[tuple[_Row, mx.array]]:
    """Each row with the logits [1, V] after its token, by one step of each model."""
    by_model: dict[int, list[_Row]] = {}
    for row in rows:
        by_model.setdefault(id(row.ticket.model), []).append(row)
    for group in by_model.values():
        tokens = mx.concatenate([row.token for row in group])
        logits = group[0].ticket.model.step(tokens, rows_of([row.cache for row in group]))
        yield from zip(group, mx.split(logits, len(group)), strict=True)


def pieces(
    submit: Callable[[Deliver], Ticket], timeout: float | None = None
) -> Iterator[GenerationResult]:
    """A ticket's pieces as an iterator, for callers that wait in their own thread."""
    from queue import SimpleQueue

    arrived: SimpleQueue[GenerationResult | Exception] = SimpleQueue()
    ticket = submit(arrived.put)
    try:
        while True:
            piece = arrived.get(timeout=timeout)
            if isinstance(piece, Exception):
                raise piece
            yield piece
            if piece.finish_reason is not None:
                return
    finally:
        ticket.cancel()
