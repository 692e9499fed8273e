"""Work in a thread: results in their order, errors where they are wanted."""

import contextlib
import subprocess
import sys
import threading
from queue import Queue
from threading import Barrier, BrokenBarrierError, Event

import numpy as np
import pytest

from mlx_vlm_edge import load, stream_generate
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.loading import load as loading
from mlx_vlm_edge.loading import steps as stepping
from mlx_vlm_edge.loading.load import LoadOptions, start_loading
from mlx_vlm_edge.loading.steps import Background, Steps
from mlx_vlm_edge.models.fastvlm import Model

from ..reference.fastvlm import picture


def test_a_step_is_waited_for_and_no_more():
    go = Event()

    def work():
        yield "first"
        go.wait(10)
        yield "second"

    steps = Steps(work())
    assert steps.wait(0) == "first"
    go.set()
    assert (steps.wait(1), steps.wait(0)) == ("second", "first")


def test_an_error_is_raised_where_its_step_is_waited_for():
    def work():
        yield 1
        raise UsageError("damaged")

    steps = Steps(work())
    assert steps.wait(0) == 1
    for _ in range(2):
        with pytest.raises(UsageError, match="damaged"):
            steps.wait(1)


def test_images_are_encoded_while_the_language_model_is_read(native_folder, monkeypatch):
    """Its weights wait here until an image has been encoded; the answer is the usual one."""
    encoded = Event()
    arrange, encode = loading.arrange, Model.stages

    def late(this):
        assert encoded.wait(10)
        arrange(this)

    def first(this, *arguments):
        encoded.set()
        return encode(this, *arguments)

    model, processor = load(str(native_folder))
    ask = {"prompt": "What is it?", "images": [picture(1)], "max_tokens": 6}
    want = [piece.token for piece in stream_generate(model, processor, **ask)]
    monkeypatch.setattr(loading, "arrange", late)
    monkeypatch.setattr(Model, "stages", first)
    model, processor = start_loading(str(native_folder), LoadOptions())
    assert model.unread is not None
    assert [piece.token for piece in stream_generate(model, processor, **ask)] == want
    assert model.unread is None


def test_everything_is_evaluated_where_it_was_made(tmp_path):
    """Scaled rotation periods are no parameters, but another thread needs them all the same."""
    from ..reference import idefics3 as theirs

    case = theirs.CASES["idefics3"]
    model, processor = load(str(theirs.save(theirs.build(case), case, tmp_path)))
    attention = model.language_model.model.layers[0].self_attn
    assert np.isfinite(np.array(attention._periods)).all()
    assert list(stream_generate(model, processor, "Hi", [picture(1)], max_tokens=2))


def test_what_goes_wrong_while_reading_is_told(native_folder, monkeypatch):
    def broken(this):
        raise UsageError("the disk is gone")

    monkeypatch.setattr(loading, "arrange", broken)
    with pytest.raises(UsageError, match="gone"):
        load(str(native_folder))
    model, processor = start_loading(str(native_folder), LoadOptions())
    with pytest.raises(UsageError, match="gone"):
        list(stream_generate(model, processor, "Hi"))


def test_a_gpu_s_model_is_all_there_and_answers_the_same(native_folder, monkeypatch):
    """The other path of loading, on the CPU."""
    answers = []
    for cpu in (True, False):
        monkeypatch.setattr(loading, "on_cpu", lambda cpu=cpu: cpu)
        model, processor = start_loading(str(native_folder), LoadOptions(dtype="float32"))
        assert (model.unread is None) is not cpu
        pieces = stream_generate(model, processor, "Hi", [picture(1)], max_tokens=4)
        answers.append([piece.token for piece in pieces])
    assert answers[0] == answers[1]


def test_one_thread_does_all_and_never_ends():
    """A thread that used MLX and is ending when the process exits may abort it."""
    done = [Steps(iter([index])) for index in range(5)]
    assert [steps.wait(0) for steps in done] == [*range(5)]
    workers = [t for t in threading.enumerate() if "_work" in t.name]
    assert len(workers) == 1
    assert workers[0].daemon


def test_two_first_jobs_start_one_thread(monkeypatch):
    """They meet while the thread is being started, if they can."""
    meeting, started, worker = Barrier(2), [], stepping._Worker()

    def queue():
        with contextlib.suppress(BrokenBarrierError):
            meeting.wait(0.2)
        return Queue()

    def thread(**options):
        started.append(options)
        return threading.Thread(**options)

    monkeypatch.setattr(stepping, "Queue", queue)
    monkeypatch.setattr(stepping, "Thread", thread)
    done = [Event(), Event()]
    callers = [threading.Thread(target=worker.put, args=(event.set,)) for event in done]
    for caller in callers:
        caller.start()
    assert all(event.wait(10) for event in done)
    assert len(started) == 1


def test_a_function_in_the_background():
    assert Background(lambda: 7).wait() == 7
    with pytest.raises(ZeroDivisionError):
        Background(lambda: 1 // 0).wait()


def test_long_work_ends_between_its_parts_when_the_process_does():
    program = """if True:
        import sys
        from threading import Event
        from mlx_vlm_edge.loading.steps import Steps, stop_if_exiting
        begun = Event()
        def work():
            begun.set()
            while True:
                stop_if_exiting()
            yield 0
        Steps(work())
        begun.wait()
        sys.exit(2)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


def test_a_process_that_ends_while_work_is_under_way_says_its_own_exit_code():
    """As with a misspelt image while weights are read; the thread's next step is not begun."""
    program = """if True:
        import sys, mlx.core as mx
        from mlx_vlm_edge.loading.steps import Steps
        def work():
            yield 0
            for _ in range(100):
                mx.eval(mx.ones((200, 200)) @ mx.ones((200, 200)))
            yield 1
            print("too far")
        Steps(work()).wait(0)
        sys.exit(2)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")
