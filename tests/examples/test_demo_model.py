"""The demo model's training code: what needs no fonts, photographs or hours."""

from random import Random

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from ..demo import ROOT, SIDE, VISUAL
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

    pictures = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), np.uint8)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    ours = DemoModel(Shape())
    assert (ours.shape.image_size, ours.shape.visual) == (SIDE, VISUAL)
    start.begin(DEMO, ours, pixels)
    ours.eval()
    with torch.no_grad():
        got = ours.connect(ours.tower(pixels[:1]))[0].numpy()
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
    from changes import NOTHING, change, pair
    from draw import shapes_scene

    for seed in range(12):
        rng = Random(seed)
        one = shapes_scene(rng)
        other, told = change(one, rng)
        assert (told.said == NOTHING) == (other == one)
        if told.what == "number":
            assert told.said == f"The number has changed from {one.count} to {other.count}."
            assert told.undone.said == f"The number has changed from {other.count} to {one.count}."
    assert not all(pair(f"any-{seed}")[2].what for seed in range(12))
    assert all(pair(f"any-{seed}", changed=True)[2].what for seed in range(12))


def test_a_stage_by_the_clock_goes_on_where_it_was_stopped(monkeypatch, tmp_path):
    """Its share that is over is the time of training, of earlier starts too."""
    import stage

    now = [100.0]
    monkeypatch.setattr(stage.time, "time", lambda: now[0])
    module = torch.nn.ModuleDict({"one": torch.nn.Linear(2, 2)})

    def run(peak=1.0):
        tuner = torch.optim.AdamW([{"params": list(module.parameters()), "peak": peak}])
        return stage.Run(tmp_path / "one.pt", module, tuner, 10, minutes=2)

    first = run()
    now[0] += 30
    first.save()
    now[0] += 1000
    second = run(peak=0.5)
    assert (second.done, second.over) == (pytest.approx(0.25), False)
    assert second.tuner.param_groups[0]["peak"] == 0.5
    now[0] += 90
    assert second.over


def a_text(text, boxes, **rest):
    """A scene with `text` in the boxes of its characters; a space has none."""
    from draw import Mark, Scene

    numbered = [(i, c) for i, c in enumerate(text, 1) if c != " "]
    marks = tuple(Mark(c, box, i) for (i, c), box in zip(numbered, boxes, strict=True))
    return Scene("text", "red", "white", (255, 0, 0), (255, 255, 255), marks, text=text, **rest)


def test_the_tokens_hold_the_text_in_the_order_it_is_read():
    """Each character is asked of the token whose square has its centre, a space before the next."""
    from vision import CHARACTERS, GRID, held, read

    last = 1 - 0.5 / GRID
    boxes = [(0.01, 0.01, 0.05, 0.05), (0.05, 0.01, 0.09, 0.05), (last, last, last, last)]
    table = held(a_text("Ab c", boxes))
    assert table[:, 0].tolist() == [1, *[0] * (GRID * GRID - 2), 4]
    said = [[CHARACTERS[c - 1] for c in row if c] for row in table[[0, -1], 1:]]
    assert said == [["A", "b"], [" ", "c"]]
    as_tensor = torch.from_numpy(table)[None]
    assert read(as_tensor[..., 0], as_tensor[..., 1:]) == ["Ab c"]
    # A low picture is padded: the same box lies a quarter of the side further down.
    low = held(a_text("Ab c", [(0.01, 0.0, 0.05, 0.1)] * 3, height=0.5))
    assert low[:, 0].nonzero()[0].tolist() == [GRID * int(GRID * 0.3)]


def test_merged_branches_give_what_the_branches_give():
    """The same features, and the same gradients of every parameter."""
    from network import ConvBN, LargeKernel, MobileOne, RepMixer

    def one_by_one(block, x):
        if isinstance(block, ConvBN):
            return block.bn(block.conv(x))
        if isinstance(block, RepMixer):
            mixed = one_by_one(block.mixer, x) - block.norm.rbr_skip(x)
            return x + block.layer_scale * mixed
        if isinstance(block, LargeKernel):
            both = one_by_one(block.lkb_origin, x) + one_by_one(block.small_conv, x)
            return torch.nn.functional.gelu(both)
        y = sum(one_by_one(branch, x) for branch in (*block.rbr_conv, block.rbr_scale) if branch)
        return block.act(block.se(y if block.rbr_skip is None else y + block.rbr_skip(x)))

    torch.manual_seed(0)
    x = torch.randn(2, 32, 8, 8)
    for block in (
        RepMixer(32, 0.5), MobileOne(32, 32, 3, 2, groups=32), MobileOne(32, 32, 1),
        LargeKernel(32, 64), MobileOne(32, 64, 3, groups=32, se=True), ConvBN(32, 32, 7, groups=32),
    ):  # fmt: skip
        for norm in block.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                for value in (norm.weight, norm.bias, norm.running_mean):
                    torch.nn.init.normal_(value)
                torch.nn.init.uniform_(norm.running_var, 0.5, 2)
                norm.eval()
        want, got = one_by_one(block, x), block(x)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        direction, values = torch.randn_like(want), list(block.parameters())
        merged, apart = (torch.autograd.grad((y * direction).sum(), values) for y in (got, want))
        torch.testing.assert_close(merged, apart, atol=2e-4, rtol=1e-4)


def test_a_picture_seen_again_is_asked_by_its_new_colours():
    from colours import name
    from pictures import recoloured

    one = a_text("A", [(0.4, 0.4, 0.6, 0.6)])
    other = recoloured(one, [2, 1, 0])
    assert (other.colour, other.background) == ("blue", "white")
    assert (other.colour_rgb, other.background_rgb) == ((0, 0, 255), (255, 255, 255))
    assert recoloured(one, [1, 0, 2]).colour == name((0, 255, 0)) == "green"


def test_a_row_asks_for_its_answers_and_no_more():
    """The targets are the next tokens, and only of what the model says."""
    from language import VISUAL, row
    from prompts import Prompter
    from tokenizers import Tokenizer

    prompter = Prompter(Tokenizer.from_file(str(DEMO / "tokenizer.json")))
    turns = [("What does it say?", "HELLO", "HELLO"), ("What color is it?", "red", "HELLO")]
    ids, targets = row(turns, 1, prompter)
    assert len(ids) == len(targets)
    said = [i for i, target in enumerate(targets) if target >= 0]
    assert all(targets[i] == ids[i + 1] for i in said[:-1])
    text = prompter.tokenizer.decode([targets[i] for i in said], skip_special_tokens=False)
    assert text == "HELLO<|im_end|>red<|im_end|>"
    start = len(prompter.before)
    assert ids[start : start + VISUAL] == [0] * VISUAL


def test_what_has_changed_is_the_answer_about_a_pair():
    """Both pictures have their places in the row, and so have their tokens in the embeddings."""
    from changes import Change
    from decoder import DemoModel
    from language import VISUAL, said_of_pair
    from network import Shape
    from prompts import Prompter
    from tokenizers import Tokenizer
    from vision import GRID

    prompter = Prompter(Tokenizer.from_file(str(DEMO / "tokenizer.json")))
    said = 'The text has changed from "AB" to "CD".'
    ids, targets = said_of_pair(Change("text", "AB", "CD"), Random(0), prompter)
    assert len(ids) == len(targets)
    answer = [target for target in targets if target >= 0]
    assert prompter.tokenizer.decode(answer) == said
    assert ids[-len(answer) + 1 :] == answer[:-1]
    start, model = len(prompter.before), DemoModel(Shape())
    features = torch.randn(1, 2, 768, GRID, GRID)
    visual = torch.stack([model.connect(features[:, number]) for number in (0, 1)], 1)
    rows = model.merge(visual, torch.tensor([ids]), start)
    assert rows.shape[1] == len(ids)
    for number in (0, 1):
        place = start + number * (VISUAL + 1)
        assert ids[place : place + VISUAL] == [0] * VISUAL
        torch.testing.assert_close(rows[:, place : place + VISUAL], visual[:, number])


def test_a_yes_and_a_no_are_found_where_they_begin():
    """Not in a text that has the same letters among others."""
    from language import judgements, padded_rows, row
    from prompts import Prompter
    from tokenizers import Tokenizer

    prompter = Prompter(Tokenizer.from_file(str(DEMO / "tokenizer.json")))
    asked = "Is there a star?"
    rows = [
        row([(asked, "no", ""), ("What color is it?", "red", ""), (asked, "yes", "")], 1, prompter),
        row([("What does it say?", "nose", "nose"), (asked, "no", "")], 1, prompter),
    ]
    _, targets = padded_rows(rows)
    found = judgements(targets, prompter)
    assert found.sum(1).tolist() == [2, 1]
    first = [prompter.ids(word)[0] for word in ("no", "yes", "no")]
    assert targets[found].tolist() == first


def test_a_talk_asks_three_different_things(monkeypatch):
    pytest.importorskip("font_roboto", reason="the fonts come with pip install '.[demo]'")
    from talks import three_turns

    for talk in three_turns(4, "tests"):
        assert len(talk.pictures) == 1
        assert len(set(talk.questions)) == len(talk.right) == len(talk.groups) == 3


def test_a_deeper_tower_begins_as_the_one_it_starts_from():
    """Attention blocks that the checkpoint has not change nothing at first."""
    import start
    from decoder import DemoModel
    from network import Shape

    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 64, 64)
    same = Shape()
    deeper = Shape(layers=(*same.layers[:3], same.layers[3] + 1, same.layers[4] + 2))
    features = []
    for shape in (same, deeper):
        model = DemoModel(shape)
        start.begin(DEMO, model, pixels)
        model.eval()
        with torch.no_grad():
            features.append(model.tower(pixels))
    torch.testing.assert_close(*features)


def test_the_upper_part_goes_on_from_the_lower_parts_map():
    from network import Shape, VisionTower

    torch.manual_seed(0)
    tower = VisionTower(Shape()).eval()
    pixels = torch.rand(1, 3, 128, 64)
    fine = tower.lower(pixels)
    features, middle = tower.upper(fine)
    assert fine.shape == (1, 96, 8, 4)
    assert middle.shape == (1, 192, 4, 2)
    assert features.shape == (1, 768, 2, 1)
    torch.testing.assert_close(tower(pixels), features)


def test_the_lower_part_stands_once_everything_is_learned(tmp_path):
    """At its averaged weights; neither weights nor statistics move, and its maps are the same."""
    import argparse

    import train
    from decoder import DemoModel
    from network import Shape
    from prompts import Prompter
    from stage import Run
    from tokenizers import Tokenizer
    from vision import Heads

    torch.manual_seed(0)
    module = train.modules(DemoModel(Shape()), Heads(Shape()))
    model = module["model"]
    args = argparse.Namespace(tower_rate=1e-2, heads_rate=1e-2, decoder_rate=1e-2, batch=2)
    run = Run(tmp_path / "run.pt", module, train.tuner(model, module["heads"], args), 10)
    for name, value in run.average.items():
        if value.is_floating_point() and "network.0" in name:
            run.average[name] = value * 1.01
    training = train.Training.__new__(train.Training)
    training.args, training.run, training.model = args, run, model
    training.prompter = Prompter(Tokenizer.from_file(str(DEMO / "tokenizer.json")))
    training.fix_lower()
    best = run.averaged("model", DemoModel(Shape())).tower.lower_part.state_dict()
    pixels = torch.rand(2, 3, 64, 64)
    fine = model.tower.lower(pixels)
    assert not fine.requires_grad
    for _ in range(2):
        run.update(model.tower.upper(model.tower.lower(pixels))[0].square().mean(), {})
    for name, value in model.tower.lower_part.state_dict().items():
        torch.testing.assert_close(value, best[name], rtol=0, atol=0)
    torch.testing.assert_close(model.tower.lower(pixels), fine, rtol=0, atol=0)


def test_batches_seen_before_come_again_with_other_questions():
    """The latest ones, with their maps and labels; of pairs, what has changed."""
    from changes import Change
    from prompts import Prompter
    from seen import Seen
    from tokenizers import Tokenizer

    prompter = Prompter(Tokenizer.from_file(str(DEMO / "tokenizer.json")))
    seen = Seen(prompter, 0, most=2)
    scene = a_text("AB", [(0.1, 0.1, 0.2, 0.2), (0.2, 0.1, 0.28, 0.2)])
    for value in range(3):
        batch = {"facts": torch.full((1, 5), value), "pixels": torch.zeros(1), "shown": [scene]}
        seen.add(batch, torch.full((1, 4), float(value), requires_grad=True))
    picked = [seen.pick() for _ in range(20)]
    assert {int(batch["facts"][0, 0]) for batch, _ in picked} == {1, 2}
    for batch, fine in picked:
        assert fine.dtype == torch.float32
        assert not fine.requires_grad
        assert (fine == batch["facts"][0, 0]).all()
        assert "pixels" not in batch
    assert len({batch["ids"].shape for batch, _ in picked}) > 1
    pairs = Seen(prompter, 0, most=1)
    pairs.add({"shown": [Change()]}, torch.zeros(2, 4))
    batch, _ = pairs.pick()
    said = [target for target in batch["targets"][0].tolist() if target >= 0]
    assert prompter.tokenizer.decode(said) == "Nothing has changed."


def test_yes_and_no_are_learned_in_batches_of_their_own():
    """One question to a row; without "not" at first."""
    from draw import shapes_scene
    from prompts import Prompter
    from settle import Store, judged_batches
    from tokenizers import Tokenizer

    prompter = Prompter(Tokenizer.from_file(str(DEMO / "tokenizer.json")))
    scenes = [scene for scene in map(shapes_scene, map(Random, range(8))) if scene.colour]
    features = torch.zeros(len(scenes), 1, 4, 1, 1)
    stored = Store(scenes, features, [], features)
    share = [0.0]
    source = judged_batches(stored, prompter, 64, 0, lambda: share[0])
    for share[0], negated in ((0.0, False), (1.0, True)):
        batch = next(source)
        assert batch["features"].shape == (64, 1, 4, 1, 1)
        asked = prompter.tokenizer.decode_batch(batch["ids"].tolist())
        assert any(" not " in row or " no " in row for row in map(str.lower, asked)) == negated
        for targets in batch["targets"]:
            said = [target for target in targets.tolist() if target >= 0]
            assert prompter.tokenizer.decode(said) in ("yes", "no")


def test_a_pair_is_asked_in_either_order_and_a_picture_with_itself():
    """Of a picture shown twice the answer is that nothing has changed."""
    from changes import Change
    from prompts import Prompter
    from settle import Store, paired_batches
    from tokenizers import Tokenizer

    prompter = Prompter(Tokenizer.from_file(str(DEMO / "tokenizer.json")))
    scenes = [a_text("AB", [(0.1, 0.1, 0.2, 0.2), (0.2, 0.1, 0.28, 0.2)])]
    single, pair = torch.full((1, 1, 4, 1, 1), 7.0), torch.arange(2.0).view(1, 2, 1, 1, 1)
    stored = Store(scenes, single, [Change("color", "red", "blue")], pair.expand(1, 2, 4, 1, 1))
    batch = next(paired_batches(stored, prompter, 64, 0))
    seen = set()
    for two, targets in zip(
        batch["features"][:, :, 0, 0, 0].tolist(), batch["targets"], strict=True
    ):
        said = prompter.tokenizer.decode([t for t in targets.tolist() if t >= 0])
        seen.add((*two, said.removesuffix("<|im_end|>")))
    assert seen == {
        (0.0, 1.0, "The color has changed from red to blue."),
        (1.0, 0.0, "The color has changed from blue to red."),
        (7.0, 7.0, "Nothing has changed."),
    }


def test_a_page_is_asked_for_the_characters_of_each_square():
    """In reading order, words apart; a square that holds more than is asked is left out."""
    from draw import scene
    from vision import CHARACTERS, GRID, HELD, NEVER, held, labels, lettered, printed, read

    one = scene("a-page", "page")
    table = held(one)
    assert labels(one)["held"].tolist() == table.tolist()
    batch = {name: torch.from_numpy(value)[None] for name, value in labels(one).items()}
    assert lettered(batch).item()
    assert not printed(batch).item()
    said = "".join(CHARACTERS[c - 1] for row in table[:, 1:].tolist() for c in row if c > 0)
    lines = " ".join(line.text for line in one.lines)
    asked = table[:, 1] != NEVER
    assert set(said) <= set(lines)
    assert asked.all() == (len(said.replace(" ", "")) == len(lines.replace(" ", "")))
    crowded = a_text(
        "A" * 12, [(0.01 + 0.001 * i, 0.01, 0.012 + 0.001 * i, 0.1) for i in range(12)]
    )
    table = held(crowded)
    assert table[0].tolist() == [1] + [NEVER] * HELD[GRID]
    assert read(torch.from_numpy(table[None, :, 0]), torch.from_numpy(table[None, :, 1:])) == [""]
