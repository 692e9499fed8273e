"""What an answer's times are made of, by a clock that the tests move."""

import asyncio
import threading
from functools import partial

import pytest

pytest.importorskip("starlette", reason="serving is an extra")

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
