"""What an answer's times are made of, by a clock that the tests move; clients that go away."""

import asyncio
import gc
import threading
from functools import partial

import pytest

pytest.importorskip("starlette", reason="serving is an extra")

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.generation.loop import Options
from mlx_vlm_edge.server import answering
from mlx_vlm_edge.server.limits import Limits
from mlx_vlm_edge.timings import Timer


class Engine:
    """Notes the times that prompts come with, none of which is ready before it may be."""

    waiting = 0

    def __init__(self):
        self.processor, self.submitted = self, {}
        self.begun, self.go_on = threading.Semaphore(0), threading.Event()

    def steps(self, messages, images, raw, budget):
        self.begun.release()
        assert self.go_on.wait(60)
        yield "tokenise", None
        return messages

    def submit(self, inputs, options, deliver, *, timer, started, **rest):
        self.submitted[inputs] = timer.seconds, timer.clock() - started


def test_a_request_that_waits_to_be_prepared_says_how_long(monkeypatch):
    """And what it says adds up to the time since it came."""
    now = [0.0]
    monkeypatch.setattr(answering, "Timer", partial(Timer, clock=lambda: now[0]))
    engine = Engine()
    asked = [answering.Asked(str(n), (), [Options()]) for n in range(answering.PREPARING + 1)]

    async def ask():
        under_way = answering.Answering(engine, Limits(), remote_images=False)
        starting = [asyncio.create_task(under_way.start(one)) for one in asked]
        for _ in range(answering.PREPARING):
            await asyncio.to_thread(engine.begun.acquire, timeout=60)
        now[0] = 5.0
        engine.go_on.set()
        await asyncio.gather(*starting)

    asyncio.run(ask())
    *first, last = (engine.submitted[one.messages] for one in asked)
    assert first == [({"queue": 0.0, "tokenise": 5.0}, 5.0)] * answering.PREPARING
    assert last == ({"queue": 5.0, "tokenise": 0.0}, 5.0)


def test_a_bad_picture_of_a_client_that_is_gone_is_no_error_of_the_server():
    """The event loop would log it, with a traceback."""

    class Refusing(Engine):
        def steps(self, *arguments, **options):
            yield from super().steps(*arguments, **options)
            raise UsageError("the picture is damaged")

    engine, told = Refusing(), []

    async def leave():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context["message"]))
        under_way = answering.Answering(engine, Limits(), remote_images=False)
        starting = asyncio.create_task(under_way.start(answering.Asked("x", (), [Options()])))
        await asyncio.to_thread(engine.begun.acquire, timeout=60)
        starting.cancel()
        engine.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await starting

    asyncio.run(leave())
    gc.collect()
    assert told == []
