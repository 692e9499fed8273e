"""The timed runs, on a model that moves a clock of its own as it works."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_vlm_edge_bench.bench.figures import figures, unaccounted
from mlx_vlm_edge_bench.bench.measure import Question, measure
from mlx_vlm_edge_bench.random.question import text_of

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.text.prompt import Inputs
from mlx_vlm_edge.text.tokenizer import Tokenizer
from mlx_vlm_edge.timings import Timer

from ...reference import tokenizer as tiny

VISION, CONNECTOR, PREFILL, STEP, DECODE, PREPROCESS = 0.2, 0.01, 0.3, 0.04, 0.02, 0.03


class Clock:
    """Stands still but for the work below, and a nanosecond whenever it is looked at."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        self.now += 1e-9
        return self.now


class Working:
    """Takes the times above for its work; always says the same token."""

    unread = openings = None

    def __init__(self, clock, token):
        self.clock, self.token = clock, token
        self.config = SimpleNamespace(context=1000)

    def make_cache(self):
        return []

    def logits(self):
        row = np.zeros(tiny.VOCAB, np.float32)
        row[self.token] = 1
        return mx.array(row)[None]

    def encode(self, images):
        for name, seconds in (("vision", VISION), ("connector", CONNECTOR)):
            self.clock.now += seconds
            yield name, None
        return []

    def prefilling(self, inputs, cache, step_size):
        self.clock.now += PREFILL
        yield "prefill", None
        return self.logits()

    def step(self, token, cache):
        self.clock.now += STEP
        return self.logits()


class Preparing:
    def __init__(self, tokenizer, clock):
        self.tokenizer, self.clock = tokenizer, clock
        self.eos_ids, self.rows = frozenset({tiny.STOP}), tiny.VOCAB

    def steps(self, prompt, images, *, raw=False, budget=None):
        self.clock.now += DECODE
        yield "image decode", None
        self.clock.now += PREPROCESS
        yield "preprocess", None
        return Inputs(np.zeros((1, 50), np.int32), np.arange(2, 18, dtype=np.int32), [])


@pytest.fixture
def tokenizer(tmp_path):
    tiny.save(tmp_path)
    return Tokenizer.from_folder(tmp_path)


@pytest.fixture
def parts(tokenizer):
    clock = Clock()
    return Working(clock, tiny.STOP), Preparing(tokenizer, clock), clock


def test_every_figure_is_what_the_clock_says(parts):
    model, processor, clock = parts
    said = []
    runs = measure(model, processor, Question(b"", "Hi", 5), 3, clock=clock, progress=said.append)
    found = {name: figure.median for name, figure in figures(runs).items()}
    before = DECODE + PREPROCESS + VISION + CONNECTOR + PREFILL
    first = before + STEP  # the next token is under way when the first is out
    assert found["ttft"] == pytest.approx(VISION + PREFILL)
    assert found["ttft_e2e"] == pytest.approx(first)
    assert found["staged total"] == pytest.approx(first)
    assert found["stage: vision"] == pytest.approx(VISION)
    assert found["stage: first sample"] == pytest.approx(STEP)
    assert found["prompt_tps"] == pytest.approx(50 / first)
    assert found["prefill_tps"] == pytest.approx(50 / PREFILL)
    assert found["decode_tps"] == pytest.approx(4 / (3 * STEP))  # the first step is in the TTFT
    assert unaccounted(runs.staged) < 1e-6
    assert said == ["warm-up", "run 1 of 3", "run 2 of 3", "run 3 of 3"]


def test_an_end_token_does_not_end_a_run(parts):
    model, processor, clock = parts
    runs = measure(model, processor, Question(b"", "Hi", 5), 1, clock=clock)
    assert [run.generated for run in runs.plain] == [5, 5]
    assert processor.eos_ids == {tiny.STOP}, "the caller's processor is as it was"


def test_staged_and_plain_runs_alternate(parts, monkeypatch):
    from mlx_vlm_edge_bench.bench import measure as module

    order, marked = [], []
    mark = Timer.mark

    def watched(timer, name, outcome=None):
        if timer.measured:
            marked.append(name)
        mark(timer, name, outcome)

    monkeypatch.setattr(Timer, "mark", watched)
    for kind in ("staged_run", "plain_run"):
        real = getattr(module, kind)
        monkeypatch.setattr(
            module, kind, lambda *given, k=kind, r=real: (order.append(k), r(*given))[1]
        )
    model, processor, clock = parts
    measure(model, processor, Question(b"", "Hi", 2), 2, clock=clock)
    assert order == ["staged_run", "plain_run"] * 3
    assert marked.count("prefill") == 3  # the plain ones have no stage boundary


def test_a_stage_that_is_not_marked_shows(parts, monkeypatch):
    model, processor, clock = parts
    mark = Timer.mark

    def forgetful(timer, name, outcome=None):
        mark(timer, name, outcome)
        timer.seconds.pop("vision", None)

    monkeypatch.setattr(Timer, "mark", forgetful)
    runs = measure(model, processor, Question(b"", "Hi", 2), 1, clock=clock)
    assert unaccounted(runs.staged) > 0.3


class Counting:
    """A prompt of 7 tokens around the question, which counts its words and commas."""

    def __call__(self, text, images):
        length = 7 + len(text.replace(",", " ,").split()) * self.each
        visual = np.arange(1, 5, dtype=np.int32)
        return Inputs(np.zeros((1, length + 4), np.int32), visual, [])

    each = 1
    config = SimpleNamespace(context=100)


def test_prompt_tokens_are_exact_and_visual_ones_come_on_top():
    text = text_of(Counting(), b"", 40)
    assert Counting()(text, []).input_ids.shape[1] == 44
    assert text_of(Counting(), b"", None) == "What is in this picture?"


def test_too_few_prompt_tokens_are_refused():
    with pytest.raises(UsageError, match="takes 8 tokens with the shortest one"):
        text_of(Counting(), b"", 7)


def test_more_prompt_tokens_than_the_context_are_refused():
    assert Counting()(text_of(Counting(), b"", 96), []).input_ids.shape[1] == 100
    with pytest.raises(UsageError, match=r"101 tokens, 4 of them visual, .* context of 100"):
        text_of(Counting(), b"", 97)


def test_a_length_that_no_question_has_is_refused():
    uneven = Counting()
    uneven.each = 2
    with pytest.raises(UsageError, match="no question"):
        text_of(uneven, b"", 10)
