"""A cold start in its parts, by a clock that is one second further at each look."""

from itertools import count

import mlx.core as mx
import pytest

from mlx_vlm_edge.cli.cold import PARTS, ColdTimer
from mlx_vlm_edge.loading.load import LoadOptions, start_loading


def steps():
    for name in ("image decode", "preprocess", "tokenise", "vision", "connector", "prefill"):
        yield name, mx.zeros(1)
    yield "prefill", None  # of a second chunk
    return "logits"


@pytest.mark.parametrize("measured", [False, True])
def test_parts_follow_one_another_and_are_the_whole_together(measured):
    ticks = count(100.0)
    timer = ColdTimer(measured, clock=lambda: next(ticks), started=(3.0, 90.0))
    for part in ("imports", "weights", "tokenizer", "weights"):
        timer.part(part)
    assert timer.run(steps()) == "logits"
    timer.mark("first sample")
    shown = ["vision", "prefill"] if measured else []
    order = ["start", "imports", "weights", "tokenizer", "picture", "prompt", *shown, "first token"]
    assert list(timer.parts) == order
    assert timer.parts["start"] == 3
    assert timer.parts["imports"] == 11  # from 90; the timer's own start was the first look
    assert timer.parts["weights"] == 2
    assert sum(timer.parts.values()) == pytest.approx(timer.ttft)


def test_every_step_of_a_picture_is_of_a_part():
    assert set(PARTS.values()) == {"picture", "prompt", "vision", "prefill", "first token"}
    timer, ticks = ColdTimer(clock=lambda: 1.0, started=(0.0, 1.0)), 0
    timer.mark("retile", ticks)  # a family's own step is a part by its name
    assert list(timer.parts) == ["start", "retile"]


def test_loading_tells_what_was_waited_for():
    told = []
    model, _ = start_loading("demo", LoadOptions(), told.append)
    model.finish_loading()
    assert told == ["weights", "tokenizer", "weights"]
