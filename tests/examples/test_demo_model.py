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
