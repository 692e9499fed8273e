"""Many prompts at once: every answer is the one its prompt gets alone, whatever the others do."""

import weakref
from queue import SimpleQueue
from threading import Event, Thread

import mlx.core as mx
import pytest

from mlx_vlm_edge import Options, PrefixCache, stream_generate
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.generation.engine import BusyError, ClosingError, Engine, Line, Ticket, pieces
from mlx_vlm_edge.generation.prefix import Run
from mlx_vlm_edge.timings import Timer

from .test_prefix import FAMILIES, digests, family, fastvlm, models, picture  # noqa: F401  (fixtures)

TOKENS = 12
QUESTIONS = ("What is this?", "Name the colour of it, please.", "Is it red?", "How many are there?")


@pytest.fixture
def start():
    """Makes engines that are closed at the end."""
    engines = []

    def make(model, processor, **options):
        engines.append(Engine(model, processor, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def ask(engine, inputs, **options):
    """Submit a prompt; what collects its pieces."""
    arrived = SimpleQueue()
    client = options.pop("client", "")
    ticket = engine.submit(
        inputs, Options(**{"max_tokens": TOKENS, **options}), arrived.put, client=client
    )
    return ticket, arrived


def collected(arrived):
    """All pieces up to the last, or the error that came instead."""
    answer = []
    while True:
        piece = arrived.get(timeout=60)
        if isinstance(piece, Exception):
            return piece
        answer.append(piece)
        if piece.finish_reason is not None:
            return answer


def ids(answer):
    return [piece.token for piece in answer if piece.token is not None]


def alone(model, processor, question, images, **options):
    stream = stream_generate(
        model, processor, question, images, **{"max_tokens": TOKENS, **options}
    )
    return ids(stream)


@pytest.mark.parametrize("shared", [False, True], ids=["no prefix cache", "prefix cache"])
def test_texts_equal_one_by_one_for_every_family(family, start, shared):  # noqa: F811
    _, model, processor = family
    prompts = [
        (question, [picture(index)] if index % 2 == 0 else [])
        for index, question in enumerate(QUESTIONS)
    ]
    want = [alone(model, processor, *prompt) for prompt in prompts]
    engine = start(model, processor, rows=3, prefix_cache=PrefixCache() if shared else None)
    asked = [ask(engine, processor(*prompt)) for prompt in prompts]
    assert [ids(collected(arrived)) for _, arrived in asked] == want
    again = [ask(engine, processor(*prompt)) for prompt in reversed(prompts)]
    answers = [collected(arrived) for _, arrived in again]
    assert [ids(answer) for answer in answers] == want[::-1]
    assert all((answer[-1].reused_tokens > 0) == shared for answer in answers)


def test_rows_are_decoded_together(fastvlm, start, monkeypatch):  # noqa: F811
    model, processor = fastvlm
    widths, step = [], type(model).step

    def counted(this, token, cache):
        widths.append(token.size)
        return step(this, token, cache)

    monkeypatch.setattr(type(model), "step", counted)
    engine = start(model, processor, rows=4)
    asked = [ask(engine, processor(question), max_tokens=30) for question in QUESTIONS]
    for _, arrived in asked:
        collected(arrived)
    assert max(widths) == 4
    assert sum(widths) <= 4 * 29  # none is decoded beyond its end


def test_sampling_penalties_and_kind_of_cache_are_each_row_s_own(fastvlm, start):  # noqa: F811
    model, processor = fastvlm
    settings = [
        {"temperature": 0.8, "seed": 3}, {"temperature": 0.8, "seed": 4, "top_k": 5},
        {"repetition_penalty": 1.5}, {"max_kv_size": 300},
    ]  # fmt: skip
    want = [alone(model, processor, QUESTIONS[0], [], **setting) for setting in settings]
    engine = start(model, processor)
    asked = [ask(engine, processor(QUESTIONS[0]), **setting) for setting in settings]
    assert [ids(collected(arrived)) for _, arrived in asked] == want


def test_one_that_fails_harms_no_other(fastvlm, start, monkeypatch):  # noqa: F811
    model, processor = fastvlm
    want = alone(model, processor, QUESTIONS[0], [])
    prefilling, bad = type(model).prefilling, processor(QUESTIONS[1])

    def failing(this, inputs, *arguments):
        if inputs.input_ids.shape == bad.input_ids.shape:
            raise MemoryError("no room")
        return prefilling(this, inputs, *arguments)

    monkeypatch.setattr(type(model), "prefilling", failing)
    engine = start(model, processor)
    first, second = ask(engine, processor(QUESTIONS[0])), ask(engine, bad)
    assert isinstance(collected(second[1]), MemoryError)
    assert ids(collected(first[1])) == want
    assert ids(collected(ask(engine, processor(QUESTIONS[0]))[1])) == want


def test_a_cancelled_prompt_frees_its_place(fastvlm, start):  # noqa: F811
    model, processor = fastvlm
    engine = start(model, processor, rows=1)
    long = processor(QUESTIONS[0])
    ticket, arrived = ask(engine, long, max_tokens=10_000)
    arrived.get(timeout=60)
    _, other = ask(engine, processor(QUESTIONS[1]))
    ticket.cancel()
    assert len(collected(other)) <= TOKENS + 1
    assert engine.answering == 0


def test_those_who_gave_up_keep_no_place_in_the_line_and_no_pictures(fastvlm, start):  # noqa: F811
    model, processor = fastvlm
    engine = start(model, processor, rows=1, waiting=2)
    running, arrived = ask(engine, processor(QUESTIONS[0]), max_tokens=10_000)
    arrived.get(timeout=60)
    inputs = [processor(QUESTIONS[0], [picture(seed)]) for seed in range(2)]
    held = [weakref.ref(each) for each in inputs]
    gone = [ask(engine, each, client=str(each))[0] for each in inputs]
    del inputs
    for ticket in gone:
        ticket.cancel()
    assert engine.waiting == 0
    _, other = ask(engine, processor(QUESTIONS[1]))
    assert engine.waiting == 1
    del gone, ticket
    assert [each() for each in held] == [None, None]
    running.cancel()
    assert len(collected(other)) <= TOKENS + 1


def test_a_full_line_is_refused_and_a_long_prompt_too(fastvlm, start):  # noqa: F811
    model, processor = fastvlm
    engine = start(model, processor, rows=1, waiting=1)
    running, arrived = ask(engine, processor(QUESTIONS[0]), max_tokens=10_000)
    arrived.get(timeout=60)
    waiting, _ = ask(engine, processor(QUESTIONS[0]))
    with pytest.raises(BusyError):
        ask(engine, processor(QUESTIONS[0]))
    too_long = processor("word " * model.config.context)
    with pytest.raises(UsageError, match="more than the context"):
        ask(engine, too_long)
    for ticket in (waiting, running):
        ticket.cancel()


@pytest.mark.parametrize("gone", [False, True], ids=["under way", "gone before its first token"])
def test_a_picture_is_encoded_once_for_all_that_wait(fastvlm, start, monkeypatch, gone):  # noqa: F811
    model, processor = fastvlm
    encoded, stages = [], type(model).stages
    first, cancelled = SimpleQueue(), []

    def counted(this, pixels):
        encoded.append(1)
        if gone:
            cancelled[0].cancel()
        return stages(this, pixels)

    monkeypatch.setattr(type(model), "stages", counted)
    engine = start(model, processor, rows=2, prefix_cache=PrefixCache())
    with engine._changed:
        for question in QUESTIONS[:2]:
            inputs = processor(question, [picture(7)])
            cancelled.append(engine.submit(inputs, Options(max_tokens=20), first.put))
    assert len(collected(first)) > 1
    assert encoded == [1]


class BrokenError(Exception):
    """What a callback may raise."""


def broken(piece):
    raise BrokenError("the window is closed")


@pytest.mark.parametrize("draft", [None, "prompt-lookup"])
def test_one_that_cannot_be_told_harms_no_other(fastvlm, start, capfd, draft):  # noqa: F811
    model, processor = fastvlm
    want = alone(model, processor, QUESTIONS[0], [])
    engine = start(model, processor, rows=2)
    options = Options(max_tokens=10_000, draft=draft)
    ticket = engine.submit(processor(QUESTIONS[1]), options, broken)
    assert ids(collected(ask(engine, processor(QUESTIONS[0]))[1])) == want
    assert ticket.cancelled
    assert engine.answering == 0
    told = "an answer is cancelled: it cannot be delivered (BrokenError: the window is closed)\n"
    assert capfd.readouterr().err == told


@pytest.mark.parametrize("fails", ["prefilling", "step", "nothing"])
def test_one_that_cannot_be_told_of_what_goes_wrong_either(fastvlm, start, monkeypatch, fails):  # noqa: F811
    """Nor that the engine closes, which ends all the same."""
    model, processor = fastvlm

    def failing(*_):
        raise RuntimeError("the device is lost")

    engine = start(model, processor, rows=1)
    with monkeypatch.context() as patch:
        if fails != "nothing":
            patch.setattr(type(model), fails, failing)
            engine.submit(processor(QUESTIONS[0]), Options(), broken)
            assert isinstance(collected(ask(engine, processor(QUESTIONS[1]))[1]), RuntimeError)
    _, arrived = ask(engine, processor(QUESTIONS[0]), max_tokens=10_000)
    assert arrived.get(timeout=60).token is not None
    engine.submit(processor(QUESTIONS[1]), Options(), broken)
    closing = Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()
    assert isinstance(collected(arrived), ClosingError)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_ends_the_engine_s_thread_it_is_closed_then(fastvlm, monkeypatch):  # noqa: F811
    model, processor = fastvlm

    def ending(*_):
        raise SystemExit

    engine = Engine(model, processor)
    monkeypatch.setattr(engine, "_admit", ending)
    ask(engine, processor(QUESTIONS[0]))
    _, other = ask(engine, processor(QUESTIONS[1]))
    assert isinstance(collected(other), ClosingError)
    engine._thread.join(60)
    engine.close()
    with pytest.raises(ClosingError):
        ask(engine, processor(QUESTIONS[1]))


def test_closing_tells_those_that_wait(fastvlm, start):  # noqa: F811
    model, processor = fastvlm
    engine = start(model, processor, rows=1)
    _, first = ask(engine, processor(QUESTIONS[0]), max_tokens=10_000)
    first.get(timeout=60)
    _, second = ask(engine, processor(QUESTIONS[1]))
    engine.close()
    assert isinstance(collected(first), ClosingError)
    assert isinstance(collected(second), ClosingError)
    with pytest.raises(ClosingError):
        ask(engine, None)


def test_nothing_joins_the_line_of_an_engine_that_closes_meanwhile(fastvlm, start):  # noqa: F811
    model, processor = fastvlm
    engine, arrived = start(model, processor), SimpleQueue()

    def closing():
        engine.close()
        return 0.0

    with pytest.raises(ClosingError):
        engine.submit(processor("Hi"), Options(), arrived.put, timer=Timer(clock=closing))


@pytest.mark.parametrize("gone", [False, True], ids=["answered", "cancelled"])
def test_what_cannot_be_remembered_harms_nobody(fastvlm, start, monkeypatch, capfd, gone):  # noqa: F811
    model, processor = fastvlm
    want = alone(model, processor, QUESTIONS[1], [])

    def full(*_):
        raise ValueError("no room")

    monkeypatch.setattr(Run, "end", full)
    engine = start(model, processor, prefix_cache=PrefixCache())
    ticket, first = ask(engine, processor(QUESTIONS[0]), max_tokens=10_000 if gone else 3)
    _, second = ask(engine, processor(QUESTIONS[1]))
    assert first.get(timeout=60).token is not None
    if gone:
        ticket.cancel()
    assert ids(collected(second)) == want
    assert "not remembered (ValueError)" in capfd.readouterr().err


@pytest.mark.parametrize(("fails", "files"), [("prefilling", 1), ("step", 1), ("nothing", 2)])
def test_an_encoded_picture_is_written_whatever_ends_its_answer(
    fastvlm,  # noqa: F811
    start,
    monkeypatch,
    tmp_path,
    fails,
    files,
):
    """The prompt as well where the engine is closed; no cache of a step that failed."""
    model, processor = fastvlm

    def failing(*_):
        raise RuntimeError("the device is lost")

    if fails != "nothing":
        monkeypatch.setattr(type(model), fails, failing)
    engine = start(model, processor, prefix_cache=PrefixCache(disk=tmp_path))
    inputs = processor(QUESTIONS[0], [picture(7)])
    _, arrived = ask(engine, inputs, max_tokens=10_000)
    if fails == "nothing":
        assert arrived.get(timeout=60).token is not None
    else:
        assert isinstance(collected(arrived), RuntimeError)
    engine.close()
    (name,) = digests(model, processor, 7)
    assert PrefixCache(disk=tmp_path).image(model, name) is not None
    assert len(list(tmp_path.iterdir())) == files


def test_pieces_give_an_answer_in_the_caller_s_thread(fastvlm, start):  # noqa: F811
    model, processor = fastvlm
    engine, inputs = start(model, processor), processor(QUESTIONS[0])
    options = Options(max_tokens=TOKENS)
    stream = pieces(lambda deliver: engine.submit(inputs, options, deliver))
    assert ids(stream) == alone(model, processor, QUESTIONS[0], [])


def test_clients_take_turns():
    line = Line(limit=9)
    for client in "aaabbc":
        line.put(Ticket(None, None, None, client, None, 0.0, None))
    order = []
    while (ticket := line.take()) is not None:
        order.append(ticket.client)
    assert "".join(order) == "abcaba"
    assert len(line) == 0


def test_a_step_that_fails_ends_its_rows_and_no_more(fastvlm, start, monkeypatch):  # noqa: F811
    model, processor = fastvlm
    step, broken = type(model).step, Event()
    broken.set()

    def failing(this, token, cache):
        if broken.is_set():
            raise RuntimeError("the device is lost")
        return step(this, token, cache)

    monkeypatch.setattr(type(model), "step", failing)
    engine = start(model, processor)
    assert isinstance(collected(ask(engine, processor(QUESTIONS[0]))[1]), RuntimeError)
    broken.clear()
    assert len(collected(ask(engine, processor(QUESTIONS[0]))[1])) > 1
    assert mx.get_active_memory() >= 0
