"""Cambrian-1 against the golden numbers of its original code; layouts, masks, traps."""

import json
import shutil
from dataclasses import replace
from queue import SimpleQueue
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_vlm_edge_convert import convert
from mlx_vlm_edge_convert.families import cambrian as rules

from mlx_vlm_edge import kernels, load, stream_generate
from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.checkpoint.files import lacking, needed
from mlx_vlm_edge.connectors import sva
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.generation.engine import Engine
from mlx_vlm_edge.generation.loop import Options
from mlx_vlm_edge.language import looking
from mlx_vlm_edge.loading import cost
from mlx_vlm_edge.loading.counting import counted
from mlx_vlm_edge.models import cambrian, family_name
from mlx_vlm_edge.picture.pieces import cut_out
from mlx_vlm_edge.picture.token_budget import TokenBudget
from mlx_vlm_edge.reduction import places
from mlx_vlm_edge.timings import result
from mlx_vlm_edge.vision import dinov2, several
from mlx_vlm_edge.vision.pixels import normalized

from ..parity import FLOAT32, distance
from ..reference import cambrian as theirs
from ..reference.convllava import set_config

PICTURES = ("landscape", "portrait", "large")  # 233 x 131, 97 x 301 and 419 x 383 pixels
ASKED = "What is in the image?"


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return theirs.native(tmp_path_factory.mktemp("cambrian"))


@pytest.fixture(scope="module")
def loaded(native):
    return load(str(native))


@pytest.fixture(scope="module")
def expected():
    return {
        name: np.load(theirs.SOURCE / f"reference_{name}.npz") for name in (*PICTURES, "textonly")
    }


def picture(name):
    return [] if name == "textonly" else [str(theirs.SOURCE / f"{name}.png")]


def nhwc(array):
    return mx.array(array.transpose(0, 2, 3, 1))


def parameters(model):
    return dict(tree_flatten(model.parameters()))


def shown(model, pixels):
    """What each tower sees of a picture, normalised."""
    return [
        normalized(piece[None], mx.float32, view.mean, view.std)
        for piece, view in zip(cut_out(pixels), model.config.views, strict=True)
    ]


def unpadded(array, h, w, side=6):
    """[36, ...] -> its middle [h * w, ...]."""
    rows, columns = (side - h) // 2, (side - w) // 2
    grid = array.reshape(side, side, *array.shape[1:])
    return grid[rows : rows + h, columns : columns + w].reshape(h * w, *array.shape[1:])


@pytest.mark.parametrize("name", PICTURES)
def test_every_stage_is_the_originals(loaded, expected, name):
    model, processor = loaded
    want = expected[name]
    (pixels,) = processor(ASKED, images=picture(name)).pixels
    features = []
    for index, x in enumerate(shown(model, pixels)):
        assert distance(x, nhwc(want[f"pixels_{index}"])) < 1e-5
        features.append(model.tower(x, index)[0])
        assert distance(features[-1][None], want[f"tower_{index}"]) < FLOAT32, index
        if index < 3:
            aux = model.connector.projections[index](features[-1][None])
            assert distance(aux, want[f"aux_{index}"]) < FLOAT32
    seen = model.connector.seen(features, pixels.size)
    h, w = want["final_size"][0].tolist()
    assert seen.shape == (h, w, model.config.aggregator.seen)
    assert distance(seen[1, 1, :32], want["global_context"][0]) < FLOAT32
    masks = np.concatenate([want[f"llm_mask_{index}"] for index in range(4)], axis=1)
    assert np.array_equal(np.array(seen[..., -19:]).reshape(h * w, 19) > 0.5, masks)
    gathered = model.connector.aggregate(seen)
    assert distance(gathered, unpadded(want["sva_out"][:, 0], h, w)) < FLOAT32
    projected = model.connector.projector(gathered)
    assert distance(projected, unpadded(want["projector_out"][0], h, w)) < FLOAT32
    tokens = model.encode_image(pixels)
    assert tokens.shape == (h * (w + 1), 64)
    assert distance(tokens, want["image_tokens"]) < FLOAT32


def greedy(model, processor, images, **options):
    ends, processor.eos_ids = processor.eos_ids, frozenset()
    try:
        answer = list(stream_generate(model, processor, ASKED, images, max_tokens=12, **options))
    finally:
        processor.eos_ids = ends
    return [piece.token for piece in answer[:12]]


@pytest.mark.parametrize("name", [*PICTURES, "textonly"])
def test_ids_logits_and_greedy_ids_are_the_originals(loaded, expected, name):
    model, processor = loaded
    want = expected[name]
    inputs = processor(ASKED, images=picture(name))
    count = len(inputs.visual)
    ids = [i for i in want["input_ids"][0].tolist() for i in [i] * (count if i == -200 else 1)]
    assert inputs.input_ids[0].tolist() == ids
    assert inputs.visual.tolist() == [at for at, token in enumerate(ids) if token == -200]
    assert distance(model(inputs), want["logits"]) < FLOAT32
    assert greedy(model, processor, picture(name)) == want["greedy_ids"].tolist()


@pytest.mark.parametrize("step", [50, 170, 7])
def test_a_prompt_in_parts_looks_as_the_whole_does(loaded, expected, step):
    """Parts that end before, in and behind the picture, at 166 to 193."""
    model, processor = loaded
    images = picture("landscape")
    wanted = expected["landscape"]["greedy_ids"].tolist()
    assert greedy(model, processor, images, prefill_step_size=step) == wanted


def test_prompts_that_are_answered_together_are_as_each_alone(loaded):
    model, processor = loaded
    engine = Engine(model, processor, rows=3)
    options = Options(max_tokens=6)
    arrived = {name: SimpleQueue() for name in PICTURES}
    try:
        for name, queue in arrived.items():
            engine.submit(processor(ASKED, images=picture(name)), options, queue.put)
        answers = {
            name: [queue.get(timeout=60) for _ in range(6)] for name, queue in arrived.items()
        }
    finally:
        engine.close()
    for name in PICTURES:
        alone = list(stream_generate(model, processor, ASKED, picture(name), max_tokens=6))
        assert [p.token for p in answers[name]] == [p.token for p in alone[:6]]


def test_chosen_tokens_look_at_what_is_theirs(loaded):
    model, processor = loaded
    budget = TokenBudget(14, "random")
    inputs = processor(ASKED, images=picture("landscape"), budget=budget)
    every = result(model.stages(replace(inputs.pixels[0], reduction=None)))
    inputs = replace(inputs, tokens=result(model.encode(inputs.pixels)))
    (rows,), views = inputs.tokens, model.views(inputs)
    assert len(rows) == len(inputs.visual) == 14
    where = places(every[:, :64], inputs.pixels[0].reduction)
    assert mx.array_equal(rows, every[mx.array(where)])
    assert views.looking.tolist() == [bool(at % 7 != 6) for at in where]  # 6 columns and a newline
    assert mx.array_equal(views.seen, every[mx.array(where), 64:])
    assert not views.looking.all()
    bare = looking.Views(views.positions, views.seen)  # newlines look as well
    without, wanted = (
        model.language_model(model.embed(inputs), views=one) for one in (bare, views)
    )
    assert mx.isfinite(wanted).all()
    assert not mx.allclose(without, wanted, equal_nan=False)


# Planted faults.


def reversed_projections(model):
    model.connector.projections[1].layers[3].bias = model.connector.projections[2].layers[3].bias


FAULTS = {
    "no positions in windows": lambda model: [
        layer.update({"pos_embed_3": mx.zeros_like(layer.pos_embed_3)})
        for layer in model.connector.sampler.layers
    ],
    "another tower's norm": reversed_projections,
    "a sampler layer less": lambda model: model.connector.sampler.layers.pop(),
    "no context": lambda model: model.connector.sampler.layers[0].proj_context.update(
        {"weight": mx.zeros((32, 32))}
    ),
    "eps of ConvNeXt": lambda model: setattr(
        model.tower.towers[3].model.stages[2].norm, "eps", 1e-2
    ),
    "no newline": lambda model: setattr(model.connector, "image_newline", mx.zeros((64,))),
}
PATCHES = {
    "everything visible": (sva, "seen_mask", lambda size, side, window: np.ones(
        (side, side, window**2), bool)),
    "windows by columns": (sva, "cut", lambda grid, window: cut_by_columns(grid, window)),
    "tanh GELU": (sva, "gelu", kernels.gelu_tanh),
    "resized with smoothing": (several, "resize_bilinear", lambda x, h, w: smoothed(x, h)),
}  # fmt: skip


def cut_by_columns(grid, window):
    side, C = grid.shape[0] // window, grid.shape[-1]
    parts = grid.reshape(side, window, side, window, C).transpose(0, 2, 3, 1, 4)
    return parts.reshape(side, side, window * window, C)


def smoothed(x, side):
    """As an antialiased resize does: what lies between is looked at as well."""
    return kernels.resize_bilinear((x + mx.roll(x, 1, 0)) / 2, side, side)


@pytest.mark.parametrize("fault", [*FAULTS, *PATCHES])
def test_a_fault_before_the_language_model_is_caught(native, expected, fault, monkeypatch):
    model, processor = load(str(native))
    if fault in PATCHES:
        monkeypatch.setattr(*PATCHES[fault])
    else:
        FAULTS[fault](model)
    (pixels,) = processor(ASKED, images=picture("landscape")).pixels
    tokens = model.encode_image(pixels)
    assert distance(tokens, expected["landscape"]["image_tokens"]) > 3 * FLOAT32


def moved(model):
    views = model.views
    model.views = lambda inputs: looking.Views(views(inputs).positions + 1, views(inputs).seen)


def unmasked(model):
    views = model.views

    def all_seen(inputs):
        view = views(inputs)
        seen = mx.concatenate([view.seen[:, :-19], mx.ones((len(view.seen), 19))], axis=1)
        return looking.Views(view.positions, seen)

    model.views = all_seen


INSIDE = {
    "none looks": lambda model: setattr(
        model, "views", lambda inputs: looking.Views(np.zeros((0,), int), mx.zeros((0, 0)))
    ),
    "a position off": moved,
    "everything visible": unmasked,
    "after another layer": lambda model: setattr(model.language_model, "_after", [0, 2, 3]),
    "newlines look": lambda model: setattr(
        model, "views", lambda inputs: every_place(model, inputs)
    ),
}


def every_place(model, inputs):
    (rows,) = inputs.tokens
    return looking.Views(inputs.visual, rows[:, 64:])


@pytest.mark.parametrize("fault", INSIDE)
def test_a_fault_inside_the_language_model_is_caught(native, expected, fault):
    model, processor = load(str(native))
    INSIDE[fault](model)
    inputs = processor(ASKED, images=picture("landscape"))
    assert distance(model(inputs), expected["landscape"]["logits"]) > 3 * FLOAT32


# Layouts, sizes, configs.


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The checkpoint as it is published, its towers in the Hub's cache."""
    monkeypatch.setenv("HF_HUB_CACHE", str(theirs.hub_cache(tmp_path)))
    return theirs.checkpoint(tmp_path)


def test_as_published_it_is_the_native_one(published, loaded):
    got, want = parameters(load(str(published))[0]), parameters(loaded[0])
    assert got.keys() == want.keys()
    assert all(mx.array_equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("siglip/CLIP-ViT-SO400M-14-104", 104),  # 7 patches of 14 and a rest, as of 384
        ("siglip/CLIP-ViT-SO400M-14-104-interp36", 104),
        ("siglip/CLIP-ViT-SO400M-14-384", 98),  # another grid than that of the weights
        ("siglip/CLIP-ViT-SO400M-14", 98),
        ("siglip/CLIP-ViT-SO400M-14-384-res98", 98),
    ],
)
def test_siglip_is_shown_the_size_of_its_name(published, name, side):
    """What lies beyond the last patch is not seen, but makes the picture larger."""
    names = json.loads((published / "config.json").read_text())[rules.NAMES]
    set_config(published, **{rules.NAMES: [name, *names[1:]]})
    model, processor = load(str(published))
    (pixels,) = processor(ASKED, images=picture("landscape")).pixels
    first, *others = shown(model, pixels)
    assert first.shape == (1, side, side, 3)
    assert [x.shape[1] for x in others] == [84, 98, 224]
    assert model.tower(first, 0).shape == (1, 36, 40)


def test_every_tower_and_sampler_is_verified(published, tmp_path, monkeypatch):
    said = []
    convert(published, tmp_path / "out", verify=True, report=said.append)
    assert sum("vision tower" in line for line in said) == 4
    from mlx_vlm_edge_convert import verify

    written = verify._build(verify._read(tmp_path / "out"))
    sampler = written.language_model.model.vision_sampler_layers[1].layers[0]
    sampler.norm.weight = sampler.norm.weight * 1.5
    same = verify._build(verify._read(tmp_path / "out"))
    errors = verify.compare(written, same, rules.probe(same.config.source))
    off = {error.part for error in errors if error.relative > 1e-5}
    assert off == {"decoder layers", "logits"}


@pytest.mark.parametrize(
    ("repository", "index"), [(name, at) for at, name in enumerate(theirs.REPOSITORIES.values())]
)
def test_a_tower_that_is_not_here_is_named(published, repository, index, monkeypatch, tmp_path):
    home = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    shutil.rmtree(home)
    with pytest.raises(UsageError, match=f"models pull {repository}` gets what lacks"):
        load(str(published))


def test_a_tower_of_open_clip_is_a_whole_repository():
    towers = theirs.SOURCE / "towers"
    for name in theirs.REPOSITORIES:
        assert lacking(towers / name) == ""
    names = ["open_clip_config.json", "open_clip_pytorch_model.bin", "README.md", "x/y.bin"]
    assert needed(names) == sorted(names[:3])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type 'mlp2x_gelu'"),
        ({"connector_only": True}, "connector_only True"),  # as LongVU's
        ({"num_query_group": 2}, "num_query_group 2"),
        ({"mm_vision_select_layer": -1}, "mm_vision_select_layer"),
        ({"mm_vision_tower_aux_token_len_list": [36, 36, 36]}, "no list of 4 whole numbers"),
        ({"mm_vision_tower_aux_token_len_list": [36, 36, 36, 577]}, "no square grid"),
        ({"mm_vision_tower_aux_token_len_list": [36, 36, 36, 625]}, "cut into 6 windows"),
        ({"num_of_vision_sampler_layers": 4}, "after layer 6 of 5"),
        ({"num_of_vision_sampler_layers": None}, "num_of_vision_sampler_layers cannot be None"),
        ({"query_num_list": [25]}, "cut into 5 windows"),
        ({"vision_hidden_size": 40}, "no multiple of 16"),
        ({"vision_config": {"towers": 3}}, "towers is not a list"),
        ({"text_config": None}, "lacks 'text_config'"),
    ],
)
def test_what_cannot_be_is_one_line(native, tmp_path, changes, says):
    folder = shutil.copytree(native, tmp_path / "changed")
    set_config(folder, **changes)
    with pytest.raises(UsageError, match=says) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


def test_a_tower_that_it_has_not_is_refused(published):
    names = ["siglip/x", "openai/clip-x", "eva-02", "clip-convnext-XXL"]
    set_config(published, mm_vision_tower_aux_list=names)
    with pytest.raises(UsageError, match="vision tower 'eva-02' is not known"):
        load(str(published))


def test_what_a_towers_name_says():
    assert rules.named_size("facebook/dinov2-giant-res378") == 378
    assert rules.named_size("clip-convnext-XXL-multi-stage-res1024-interp9216") == 1024
    assert rules.named_size("openai/clip-vit-large-patch14-336") is None
    assert rules._repository("facebook/dinov2-large-res518-interp576") == "facebook/dinov2-large"


def test_several_pictures_and_slivers_are_refused(loaded):
    _, processor = loaded
    with pytest.raises(UsageError, match="one picture per prompt, not 2"):
        processor(ASKED, images=picture("landscape") * 2)
    with pytest.raises(UsageError, match="too elongated"):
        processor(ASKED, images=[np.zeros((2, 90, 3), np.uint8)])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resolution": 336}, "these towers take 98, 84, 98, 224 only"),
        ({"image_strategy": "stretch"}, "go by a picture's padding"),
        ({"max_tiles": 2}, "one tile"),
    ],
)
def test_what_cannot_be_chosen_is_one_line(native, options, says):
    with pytest.raises(UsageError, match=says):
        load(str(native), **options)


def test_13b_once_had_llavas_model_type():
    config = {"model_type": "llava_llama", "mm_projector_type": "sva"}
    assert family_name(config) == "cambrian"


def flat(alias):
    """The published config.json of an alias."""
    shipped = configs.read(alias)
    text, _ = shipped.pop("text_config"), shipped.pop("vision_config")
    return {**text, **shipped}


@pytest.mark.parametrize("alias", ["cambrian-8b", "cambrian-13b", "cambrian-34b"])
def test_the_published_config_is_the_shipped_one(alias):
    read = cambrian.Config.from_dict
    assert read(cost.native(flat(alias))) == read(configs.read(alias))
    names = ["siglip/x", "openai/clip-x", "facebook/dinov2-base", "clip-convnext-XXL"]
    with pytest.raises(UsageError, match="is not known"):
        cost.native({**flat(alias), "mm_vision_tower_aux_list": names})


# What the original's modules cost at full size, in GMAC.
TOWERS = (333.2, 183.0, 892.8, 3167.4)


def test_the_full_model_costs_what_the_original_does():
    plan = cost.blueprint(configs.read("cambrian-8b"))
    for index, view in enumerate(plan.config.views):
        side = view.tower.image_size
        x = mx.zeros((1, side, side, 3), mx.bfloat16)
        work = counted(lambda x=x, index=index: plan.model.tower(x, index))
        assert work.flops / 2e9 == pytest.approx(TOWERS[index], rel=2e-3), index
    whole = cost.cost(plan, cost.question(plan, (1024, 1024), text_tokens=0))
    assert (whole.visual_tokens, whole.tiles) == (600, 1)  # which each of four towers sees
    assert whole.connector.flops / 2e9 == pytest.approx(68.0 + 81.6 + 12.1, rel=2e-3)
    embeddings = mx.zeros((1, 600, 4096), mx.bfloat16)
    plain = counted(lambda: plan.model.language_model(embeddings, last_only=True))
    assert (whole.prefill.flops - plain.flops) / 2e9 == pytest.approx(308.3, rel=2e-3)


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((640, 480), (3, 21), (0, 24)),
        ((480, 640), (0, 24), (3, 21)),
        ((1920, 1080), (5, 19), (0, 24)),
        ((1000, 300), (8, 16), (0, 24)),
        ((512, 512), (0, 24), (0, 24)),
        ((3000, 10), (12, 12), (0, 24)),
    ],
)
def test_what_is_visible(size, rows, columns):
    assert sva.visible(size, 24) == (slice(*rows), slice(*columns))


def test_a_window_without_picture_is_seen_whole():
    mask = sva.seen_mask((640, 480), 96, 4)
    assert mask.shape == (24, 24, 16)
    assert mask[:3].all()
    assert mask[3:21].all()
    part = sva.seen_mask((640, 470), 96, 4)  # 70 rows of 96: 13 above, one of which is in a window
    assert part[3, 0].tolist() == [False] * 4 + [True] * 12


@pytest.mark.parametrize(
    ("words", "begins"),
    [
        (
            ["<|start_header_id|>", "<|begin_of_text|>"],
            "<|begin_of_text|><|start_header_id|>system",
        ),
        (["<|im_end|>"], "<|im_start|>system\nYou are Cambrian, a highly"),
        ([], "A chat between a curious user"),
    ],
)
def test_the_prompt_is_that_of_the_vocabulary(words, begins):
    class Vocabulary:
        chat_template = "{{ anything }}"

        def token_id(self, word):
            return 1 if word in words else None

    processor = cambrian.Processor.__new__(cambrian.Processor)
    processor.tokenizer, processor.config = Vocabulary(), SimpleNamespace(eos_token_ids=(1,))
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = processor.render([{"role": "user", "content": content}])
    assert text.startswith(begins)
    assert "<image>\nWhat?" in text


def test_the_golden_prompt_is_the_models(loaded):
    said = json.loads((theirs.SOURCE / "meta.json").read_text())["prompt"]
    content = [{"type": "image"}, {"type": "text", "text": ASKED}]
    assert loaded[1].render([{"role": "user", "content": content}]) == said


def test_the_line_break_after_an_image_is_left_out_alone(loaded):
    """A raw prompt may have words there, which the original would lose the first of."""
    _, processor = loaded
    images = picture("landscape")
    one = processor("<|begin_of_text|><image>\nWhat", images=images, raw=True)
    other = processor("<image>What", images=images, raw=True)
    assert one.input_ids.tolist() == other.input_ids.tolist()
    assert one.input_ids[0, 0] == processor.tokenizer.token_id("<|begin_of_text|>")


def test_the_grid_offset_of_dinov2s_positions_matters(published, expected, monkeypatch):
    monkeypatch.setattr(dinov2, "GRID_OFFSET", 0.0)
    model, processor = load(str(published))
    (pixels,) = processor(ASKED, images=picture("large")).pixels
    x = shown(model, pixels)[2]
    assert distance(model.tower(x, 2), expected["large"]["tower_2"]) > 3 * FLOAT32
