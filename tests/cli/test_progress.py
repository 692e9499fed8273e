"""What a long prompt is at: on a terminal's last line, and nowhere else."""

import io

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_edge import load
from mlx_vlm_edge.cli import progress as line
from mlx_vlm_edge.cli.generate import _print
from mlx_vlm_edge.generation.conversation import Conversation
from mlx_vlm_edge.generation.loop import Options, stream_inputs
from mlx_vlm_edge.generation.progress import Progress
from mlx_vlm_edge.timings import Timer

from ..reference.fastvlm import picture


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Noted(Progress):
    """Writes down what it would say after each step."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def __call__(self, name, outcome):
        super().__call__(name, outcome)
        self.texts.append(self.text)


@pytest.fixture(scope="module")
def model(native_folder):
    return load(str(native_folder))


def asked(model, images, watch, **options):
    timer = Timer(progress=watch)
    inputs = timer.run(model[1].steps("What is this?", images))
    pieces = list(stream_inputs(*model, inputs, Options(max_tokens=2, **options), timer, 0.0, None))
    return inputs, [piece.token for piece in pieces]


def test_pictures_and_chunks_are_counted(model):
    watch = Noted()
    images = [picture(1), picture(2)]
    inputs, tokens = asked(model, images, watch, prefill_step_size=64)
    length = inputs.input_ids.shape[1]
    texts = list(dict.fromkeys(watch.texts))
    assert texts[:3] == [
        "reading the prompt", "encoding picture 2 of 2", f"prefill 0 of {length:,}"
    ]  # fmt: skip
    assert texts[3:] == [f"prefill {at:,} of {length:,}" for at in range(64, length, 64)]
    assert asked(model, images, None, prefill_step_size=64)[1] == tokens


def test_tiles_of_a_picture_are_one_picture():
    watch = Progress()
    tiled, plain = (type("Pixels", (), {"data": np.zeros(shape)}) for shape in
                    ((5, 8, 8, 3), (8, 8, 3)))  # fmt: skip
    watch.expect([tiled, plain], 0, 7_401, 1_024)
    said = []
    for tiles in (4, 1, 1):
        said.append(watch.text)
        watch("vision", mx.zeros((tiles, 2, 2)))
        watch("connector", mx.zeros((2, 2)))
    assert said == ["encoding picture 1 of 2"] * 2 + ["encoding picture 2 of 2"]
    for _ in range(2):
        watch("prefill", None)
    assert watch.text == "prefill 1,024 of 7,401"


def test_nothing_waits_where_nothing_is_shown(model, monkeypatch):
    waits = []
    evaluate = mx.eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: (waits.append(1), evaluate(*arrays)))
    asked(model, [picture(1)], None)
    plain = len(waits)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with line.shown() as shown:
        assert shown.progress is None
        asked(model, [picture(1)], shown.progress)
    assert len(waits) == 2 * plain


def test_the_line_is_wiped_before_the_answer(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    shown = line.Shown(delay=0.0)
    shown.progress.expect([], 0, 7_401, 1_024)
    while "7,401" not in terminal.getvalue():
        pass
    piece = type("Piece", (), {"text": "A cat."})
    assert (
        _print(iter([piece]), type("Args", (), {"json": False, "verbose": False}), shown, None) == 0
    )
    assert terminal.getvalue().endswith("prefill 0 of 7,401\x1b[K\r\x1b[K")
    assert capsys.readouterr().out == "A cat.\n"


def test_what_is_quick_says_nothing(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with line.shown() as shown:
        assert shown.progress is not None
    assert terminal.getvalue() == ""


def test_a_conversation_tells_of_what_it_does_not_know_yet(model):
    chat = Conversation(*model, max_tokens=2)
    chat.ask("What is this?", [picture(1)])
    watch = Noted()
    list(chat.stream("And what colour?", progress=watch))
    start, total = (int(n.replace(",", "")) for n in watch.texts[-1].split() if n[0].isdigit())
    assert 0 < start < total
