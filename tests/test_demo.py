"""The bundled demo model, end to end: its known answers about drawn pictures, by the CLI too."""

import json
from pathlib import Path

import pytest

import mlx_vlm_edge
from mlx_vlm_edge import generate, load
from mlx_vlm_edge.cli import main

from .demo import IMAGES, KNOWN, ROOT, VISUAL, known

DEMO = Path(mlx_vlm_edge.__file__).parent / "demo"
FEW = KNOWN[::5]


@pytest.fixture
def ask(capfd):
    """Ask through the command line; returns the answer."""

    def run(row, *arguments):
        image = str(IMAGES / row.picture)
        question = ["--prompt", row.question]
        code = main(["generate", "--model", "demo", "--image", image, *question, *arguments])
        out, err = capfd.readouterr()
        assert code == 0, err
        return out.rstrip("\n")

    return run


@pytest.fixture(scope="module")
def demo():
    return load("demo")


def named(row):
    return f"{row.picture}-{row.question}"


def test_most_known_answers_are_right():
    assert sum(row.answer == row.right for row in KNOWN) >= 0.9 * len(KNOWN)


@pytest.mark.parametrize("row", KNOWN, ids=named)
def test_the_sample_pictures(ask, row):
    assert ask(row) == row.answer


@pytest.mark.parametrize("options", [["--bits", "8"], ["--dtype", "bfloat16"]], ids=" ".join)
@pytest.mark.parametrize("row", FEW, ids=named)
def test_the_sample_pictures_in_less_precision(ask, row, options):
    assert ask(row, *options) == row.answer


def test_a_four_bit_model_still_answers(ask):
    """Four bits cost so small a model accuracy; most of the samples must survive."""
    same = sum(ask(row, "--bits", "4") == row.answer for row in KNOWN)
    assert same >= 2 * len(KNOWN) / 3


def test_a_quantised_cache_still_answers(ask):
    for row in FEW:
        assert ask(row, "--kv-bits", "8") == row.answer


def test_json(ask):
    row = KNOWN[0]
    whole = json.loads(ask(row, "--json"))
    assert whole["text"] == row.answer
    assert whole["finish_reason"] == "stop"
    assert whole["visual_tokens"] == VISUAL


def test_a_question_as_a_chat_message(demo):
    row = known("shapes.png", "What shape is it?")
    parts = [{"type": "image"}, {"type": "text", "text": row.question}]
    messages = [{"role": "user", "content": parts}]
    assert generate(*demo, messages, images=[IMAGES / row.picture]) == row.answer


def test_without_a_model_the_demo_answers_and_says_what_it_is(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("MLX_VLM_EDGE_MODEL", raising=False)
    row = KNOWN[0]
    code = main(["generate", "--image", str(IMAGES / row.picture), "--prompt", row.question])
    out, err = capfd.readouterr()
    assert (code, out) == (0, row.answer + "\n")
    assert "demo model" in err
    assert "photographs" in err
    assert len(err.splitlines()) == 1


def test_the_package_stays_small():
    nbytes = sum(path.stat().st_size for path in DEMO.iterdir())
    assert nbytes <= 16_000_000


def test_the_model_is_a_fastvlm_of_at_most_eight_million_parameters(demo):
    from mlx.utils import tree_flatten

    model, _ = demo
    assert type(model).__module__ == "mlx_vlm_edge.models.fastvlm"
    assert sum(array.size for _, array in tree_flatten(model.parameters())) < 8e6


def test_held_out_pictures(demo, monkeypatch):
    """A small run of examples/demo_model/evaluate.py; its full run has the README's figures.

    With 24 pictures a category, a model at the required share passes nearly always, one ten
    points below it seldom.
    """
    pytest.importorskip("font_roboto", reason="the fonts come with pip install '.[demo]'")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "demo_model"))
    import evaluate

    model, processor = demo

    def answer(image, question):
        return generate(model, processor, question, images=[image], max_tokens=40)

    table = evaluate.measure(answer, 24, 256, "tests")
    short = {
        category: table[category]
        for category, required in evaluate.REQUIRED.items()
        if table[category]["share"] < required - 0.15
    }
    assert not short, short
