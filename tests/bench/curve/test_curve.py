"""The curve of fewer visual tokens: what is compared, what is printed, what is refused."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_vlm_edge_bench.curve import questions, run, shown
from mlx_vlm_edge_bench.curve.forced import Forced, agreement, forced

from mlx_vlm_edge import generate, load
from mlx_vlm_edge.cli import main
from mlx_vlm_edge.picture.token_budget import TokenBudget

from ...demo import VISUAL

QUESTION = "What is this?"


@pytest.fixture(scope="module")
def demo():
    return load("demo")


def picture(seed=1):
    return np.random.default_rng(seed).integers(0, 256, (90, 120, 3), np.uint8)


def test_agreement_is_its_equation():
    draw = np.random.default_rng(0)
    p, q = (x / x.sum(axis=1, keepdims=True) for x in draw.random((2, 5, 7)))
    got = agreement(Forced((0,) * 5, np.log(p)), Forced((0,) * 5, np.log(q)))
    assert got.kl == pytest.approx(
        np.mean([sum(a * np.log(a / b)) for a, b in zip(p, q, strict=True)])
    )
    assert got.top1 == np.mean(p.argmax(axis=1) == q.argmax(axis=1))
    same = agreement(Forced((0,) * 5, np.log(p)), Forced((0,) * 5, np.log(p)))
    assert (same.top1, same.kl) == (1.0, 0.0)


def test_a_model_is_led_along_an_answer(demo):
    """Its own greedy one gives what the whole text gives at once."""
    model, processor = demo
    inputs = processor(QUESTION, images=[picture()])
    led = forced(model, inputs, positions=6)
    processor_ends, processor.eos_ids = processor.eos_ids, frozenset()
    try:
        whole = generate(model, processor, QUESTION, [picture()], max_tokens=6, full=True)
    finally:
        processor.eos_ids = processor_ends
    assert whole.text == processor.tokenizer.decode(list(led.ids), skip_special=True)
    other = forced(model, inputs, [5, 6, 7], positions=3)
    assert np.allclose(other.logprobs[0], led.logprobs[0])
    assert not np.allclose(other.logprobs[1], led.logprobs[1])
    assert np.exp(other.logprobs).sum(axis=1) == pytest.approx([1, 1, 1], abs=1e-5)


def point(way, tokens, ttft, **more):
    figures = {name: {"median": ttft} for name in ("ttft", "ttft_e2e", "peak_memory")}
    return {"way": way, "label": way, "visual_tokens": tokens, "figures": figures,
            "top1": tokens / 16, "kl": 0.5, **more}  # fmt: skip


POINTS = [point("all tokens", 16, 0.9), point("divprune", 4, 0.2), point("pool", 4, 0.3)]


def test_a_table_and_a_page_show_every_point():
    text = shown.table(POINTS, random=True)
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["16", "4", "4"]
    assert "the weights are random: how far such answers agree says little" in text
    assert "random" not in shown.table(POINTS, random=False)
    drawn = shown.page({"points": POINTS, "weights": "random weights", "model": "x & y"})
    assert "x &amp; y" in drawn
    assert drawn.count("<figure>") == 2
    assert drawn.count("<circle") == 2 * 4
    assert "weights are random" in drawn
    scored = [p | {"accuracy": {"all": 0.75}} for p in POINTS]
    assert "75%" in shown.table(scored, random=False)
    assert shown.page({"points": scored, "weights": "checkpoint", "model": "m"}).count("<fig") == 6


def test_baselines_are_beside_every_method():
    options = run.CurveOptions((2, 0.5), ("dpp",), (), 1, b"", QUESTION)
    named = [(way.name, way.budget) for way in run.ways(options)]
    assert named[0] == ("all tokens", None)
    assert [name for name, _ in named[1:]] == ["dpp", "dpp", "random", "random", "pool", "pool"]
    assert named[1][1] == TokenBudget(2, "dpp")


@pytest.mark.skipif(not questions.available(), reason="the fonts come with pip install '.[demo]'")
def test_questions_are_the_demo_models_own(demo):
    model, processor = demo
    shares = questions.accuracy(
        lambda image, question: generate(model, processor, question, [image], max_tokens=40), 1
    )
    assert shares["all"] > 0.5
    assert questions.accuracy(lambda image, question: "never", 1)["all"] == 0


def test_the_command_writes_record_and_page(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "available", lambda: False)
    record, page = tmp_path / "curve.json", tmp_path / "curve.html"
    arguments = ["--model", "demo", "--visual-tokens", "2", "--runs", "1"]
    assert main(["bench", *arguments, "--json", str(record), "--plot", str(page)]) == 0
    out = capsys.readouterr().out
    points = json.loads(record.read_text())["points"]
    assert [(p["label"], p["visual_tokens"]) for p in points[:4]] == [
        ("all tokens", VISUAL), ("divprune", 2), ("random", 2), ("pool", 2)
    ]  # fmt: skip
    assert (points[0]["top1"], points[0]["kl"]) == (1.0, 0.0)
    assert all(p["kl"] > 0 for p in points[1:4])
    assert "stage: reduce" in points[1]["figures"]
    assert points[-1]["way"] == "resolution"
    assert "same top" in out
    assert page.read_text().startswith("<!DOCTYPE html>")
    mx.clear_cache()


@pytest.mark.parametrize("place", ["/no/such/x.html", "/"])
def test_a_page_that_cannot_be_written_is_told_before_the_curve_is_measured(
    capsys, monkeypatch, place
):
    monkeypatch.setattr("mlx_vlm_edge_bench.curve.run.run", lambda *_: pytest.fail("was run"))
    assert main(["bench", "--model", "demo", "--visual-tokens", "2", "--plot", place]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert f"--plot {place}: " in told.err
    assert told.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--visual-tokens", "0"], "visual tokens 0: give a whole number"),
        (["--visual-tokens", "many"], "visual tokens 'many': give a number"),
        (["--visual-tokens", "99"], f"visual tokens 99: the picture has {VISUAL}"),
        (["--visual-tokens", "2", "--token-method", "best"], "'best' is not one of"),
        (["--visual-tokens", "2", "--token-method", "visionzip"], "is not defined for this model"),
        (["--visual-tokens", "2", "--energy"], "--energy is not for --visual-tokens"),
        (["--visual-tokens", "2", "--bits", "4", "8"], "of one model at one precision"),
        (["--plot", "x.html"], "are for --visual-tokens"),
        (["--claims", "--visual-tokens", "2"], "--visual-tokens is not for --claims"),
    ],
)
def test_a_mistake_is_one_line(capsys, flags, message):
    model = [] if "--claims" in flags else ["--model", "demo"]
    assert main(["bench", *model, *flags]) == 2
    told = capsys.readouterr()
    assert message in told.err.splitlines()[-1]
