"""The demo model's training code: what needs no fonts, photographs or hours."""

from random import Random

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from ..demo import ROOT
from ..test_demo import DEMO

torch = pytest.importorskip("torch", reason="training needs pip install '.[demo]'")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "demo_model"))


def test_training_begins_where_the_bundled_model_is():
    """The un-fused modules, filled and calibrated, give the runtime's visual tokens."""
    import start
    from decoder import DemoModel
    from network import Shape

    from mlx_vlm_edge import load

    pictures = np.random.default_rng(0).integers(0, 256, (4, 128, 128, 3), np.uint8)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    ours = DemoModel(Shape())
    start.begin(DEMO, ours, pixels)
    ours.eval()
    with torch.no_grad():
        got = ours.connect(ours.tower(pixels[:1])[0])[0].numpy()
    model, processor = load("demo")
    want = model.encode_image(processor.preprocess(Image.fromarray(pictures[0])))
    want = np.array(want.astype(mx.float32)).reshape(got.shape)
    np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("seed", range(20))
def test_shapes_lie_inside_the_picture_and_are_counted(seed):
    from draw import shapes_scene
    from questions import answers

    scene = shapes_scene(Random(seed))
    assert answers(scene)["count"] == str(len(scene.marks))
    for mark in scene.marks:
        left, top, right, bottom = mark.box
        assert 0 <= left < right <= scene.width + 1e-9
        assert 0 <= top < bottom <= scene.height + 1e-9


def test_what_is_unknown_is_declined_whatever_is_asked():
    from draw import unknown_scene
    from questions import QUESTIONS, UNKNOWN, phrase

    scene = unknown_scene(Random(0))
    for category in QUESTIONS:
        assert phrase(category, scene, Random(1))[1] == UNKNOWN


def test_yes_and_no_are_true():
    """A thing that is asked for is there where the answer says so, by its shape and its colour."""
    from draw import shapes_scene
    from questions import phrase, wanted

    for seed in range(24):
        scene = shapes_scene(Random(seed))
        if scene.colour:
            thing, there = wanted(scene, Random(seed))
            colour, _, shape = thing.rpartition(" ")
            assert there == (shape in (scene.shape, "shape") and colour in (scene.colour, ""))
            assert phrase("is it", scene, Random(seed))[1] in ("yes", "no")


def test_a_printed_text_is_answered_character_by_character():
    from prompts import Prompter
    from tokenizers import Tokenizer

    prompter = Prompter(Tokenizer.from_file(str(DEMO / "tokenizer.json")))
    ids = prompter.spelled('The text "hello" in red.', "hello")
    assert ids[-1] == prompter.end
    assert prompter.tokenizer.decode(ids[:-1]) == 'The text "hello" in red.'
    assert len(ids) == len(prompter.ids('The text "')) + 5 + len(prompter.ids('" in red.')) + 1


def test_a_warp_takes_the_corners_where_it_says():
    from draw import apply, homography

    corners = [(0.1, 0.0), (0.9, 0.1), (1.0, 0.9), (0.0, 1.0)]
    h = homography(corners)
    for (x, y), want in zip([(0, 0), (1, 0), (1, 1), (0, 1)], corners, strict=True):
        assert apply(h, x, y) == pytest.approx(want)


def test_a_change_is_what_it_says():
    from changes import NOTHING, change
    from draw import shapes_scene

    for seed in range(12):
        rng = Random(seed)
        one = shapes_scene(rng)
        other, said = change(one, rng)
        assert (said == NOTHING) == (other == one)
        if "number" in said:
            assert f"from {one.count} to {other.count}" in said


def test_a_stage_by_the_clock_goes_on_where_it_was_stopped(monkeypatch, tmp_path):
    """Its share that is over is the time of training, of earlier starts too."""
    import stage

    now = [100.0]
    monkeypatch.setattr(stage.time, "time", lambda: now[0])
    module = torch.nn.ModuleDict({"one": torch.nn.Linear(2, 2)})

    def run():
        tuner = torch.optim.AdamW(module.parameters())
        return stage.Run(tmp_path / "one.pt", module, tuner, 10, minutes=2)

    first = run()
    now[0] += 30
    first.save()
    now[0] += 1000
    second = run()
    assert (second.done, second.over) == (pytest.approx(0.25), False)
    now[0] += 90
    assert second.over


def test_a_picture_seen_again_has_other_colours_that_are_not_asked():
    from vision import NEVER, ORDERS, twice

    drawn = {
        "pixels": torch.arange(2 * 3).view(1, 1, 2, 3),
        "cells": torch.ones(1, 2, 16, 16, dtype=torch.long),
        "facts": torch.arange(19)[None],
    }
    once, again = list(twice(iter([drawn]), 0))
    assert once is drawn
    assert again["pixels"][0, 0, 0].tolist() in ORDERS
    assert again["facts"][0].tolist() == [NEVER, NEVER, *range(2, 19)]
    assert torch.equal(again["cells"], drawn["cells"])


def test_a_talk_asks_three_different_things(monkeypatch):
    pytest.importorskip("font_roboto", reason="the fonts come with pip install '.[demo]'")
    from talks import three_turns

    for talk in three_turns(4, "tests"):
        assert len(talk.pictures) == 1
        assert len(set(talk.questions)) == len(talk.right) == len(talk.groups) == 3
