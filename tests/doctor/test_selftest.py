"""`doctor --selftest`: right here, and a planted fault of any part is told by its name."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_edge import kernels
from mlx_vlm_edge.cli import main
from mlx_vlm_edge.doctor import selftest
from mlx_vlm_edge.kernels import cpu, gpu, quantized

from ..demo import IMAGES, KNOWN


def test_everything_is_right_here(capsys):
    assert main(["doctor", "--selftest", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"]
    assert all(test["right"] is not False for test in told["tests"])
    assert len(told["tests"]) > 25


def test_every_kernel_is_in_it():
    """A kernel that is added to kernels/ is added to the self test."""
    named = {name for name in vars(cpu) if hasattr(gpu, name) and hasattr(kernels, name)
             and callable(getattr(kernels, name)) and name[0].islower()}  # fmt: skip
    tested = selftest.kernel_cases()
    assert {"gelu", "attention", "conv2d"} <= named
    assert named - {"by_output"} <= tested.keys()


@pytest.mark.parametrize(
    ("module", "name", "fault"),
    [
        (cpu, "_gelu", gpu.plain_gelu_tanh),
        (cpu, "_softmax_times", lambda scores, mask, v: mx.softmax(scores, axis=-1) @ v),
        (cpu, "tall_matmul", lambda x, weight: x @ weight[::-1].T),
        (quantized.Weight, "_values", lambda self, codes, place: codes.view(mx.int32) & 15),
    ],
    ids=["gelu", "attention", "tall_matmul", "quantised"],
)
def test_a_planted_fault_is_caught(module, name, fault, monkeypatch):
    monkeypatch.setattr(module, name, fault)
    truth, others = selftest.places()
    cases = selftest.kernel_cases()
    told = [*selftest.compared(cases, truth, others, selftest.KERNEL)]
    told += selftest._quantised(others)
    assert [outcome.name for outcome in told if not outcome.right]


def test_a_kernel_that_raises_or_gives_nan_is_wrong():
    truth, others = selftest.places()

    def differs(value):
        def kernel():
            if kernels._plain.get():
                return mx.ones((2,))
            if value is None:
                raise RuntimeError("no kernel of that name\nin the library")
            return mx.full((2,), value)

        return kernel

    cases = {"raises": differs(None), "nan": differs(float("nan")), "same": differs(1.0)}
    told = [*selftest.compared(cases, truth, others[:1], selftest.KERNEL)]
    assert [outcome.right for outcome in told] == [False, False, True]
    assert told[0].said == "no kernel of that name"


def test_the_shipped_answers_are_the_recorded_ones():
    """record.py writes both."""
    golden = {(row.picture, row.question): row.answer for row in KNOWN}
    for row in selftest.known():
        assert golden[row["picture"], row["question"]] == row["answer"]
        picture = selftest.PICTURES / row["picture"]
        assert picture.read_bytes() == (IMAGES / row["picture"]).read_bytes()


def test_another_answer_is_told(monkeypatch):
    monkeypatch.setattr(selftest, "answer", lambda *_: "something else")
    told = [*selftest.known_answers(selftest.places()[1][0])]
    assert {outcome.right for outcome in told} == {False}
    assert "'something else' for " in told[0].said


def test_core_ml_is_compared_on_a_mac(monkeypatch):
    """With a double of its features: no Mac was seen by this test."""
    assert selftest.coreml("Linux").right is None
    monkeypatch.setattr(selftest, "find_spec", lambda _: None)
    assert selftest.coreml("Darwin").said == "coremltools is not installed"
    monkeypatch.setattr(selftest, "find_spec", lambda _: object())
    off = {"mlx": 1.0, "coreml": 1.01}
    monkeypatch.setattr(selftest, "_features", lambda setting: np.full((2, 3), off[setting]))
    assert selftest.coreml("Darwin").right
    off["coreml"] = 1.1
    assert selftest.coreml("Darwin").right is False


def test_a_wrong_comparison_is_the_exit_code(monkeypatch, capsys):
    outcomes = [selftest.Outcome("a", True, "x"), selftest.Outcome("b", False, "y")]
    monkeypatch.setattr(selftest, "selftest", lambda: iter(outcomes))
    assert main(["doctor", "--selftest"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "ok    a: x\nWRONG b: y\n"
    assert "2 comparisons, 1 wrong" in shown.err
