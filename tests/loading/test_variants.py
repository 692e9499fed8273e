"""Adapters that requests name: each answers as the model that has it alone, in one memory."""

# ruff: noqa: F811  (fixtures that are imported)

from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_vlm_edge import Options, PrefixCache, load, stream_generate
from mlx_vlm_edge.checkpoint.adapter_choice import AdapterChoice, split_named
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.generation.engine import Engine
from mlx_vlm_edge.kernels import low_rank
from mlx_vlm_edge.language.fuse import fuse
from mlx_vlm_edge.loading.load import LoadOptions
from mlx_vlm_edge.loading.variants import Variants
from mlx_vlm_edge.models.adapted import Adapted
from mlx_vlm_edge.models.variants import Difference

from ..memory import Peak
from ..parity import distance
from .test_adapters import (  # noqa: F401  (fixtures)
    KINDS,
    PARITY,
    adapters,
    broken,
    folders,
    packed,
    picture,
    reference,
)

TOKENS = 10


def variants(base, named, **options):
    """The base's model and processor, and a model for each adapter."""
    chosen = {name: AdapterChoice.of(adapter) for name, adapter in named.items()}
    settings = LoadOptions(**options)
    checked = Variants(str(base), settings, chosen)
    model, processor = load(str(base), **options)
    return model, processor, checked.of(model)


def logits(model, processor):
    return np.array(model(processor("What is it?", images=[picture()]))[0].astype(mx.float32))


def arrays(model):
    return {id(array): array.nbytes for _, array in tree_flatten(model.parameters())}


@pytest.mark.parametrize("kind", KINDS)
def test_each_answers_as_the_model_that_is_loaded_with_it(folders, adapters, kind):
    folder, _ = adapters(kind)
    model, processor, tuned = variants(folders["hub"], {"a": folder})
    alone, _ = load(str(folders["hub"]), adapter=folder)
    plain, _ = load(str(folders["hub"]))
    assert distance(logits(tuned["a"], processor), logits(alone, processor)) < PARITY
    assert distance(logits(model, processor), logits(plain, processor)) == 0


@pytest.mark.parametrize("kind", ["lora", "rslora, patterns", "dora"])
def test_low_rank_updates_share_every_weight_of_the_model(folders, adapters, kind):
    """What a variant has beside the model's weights is of the adapter's size."""
    folder, peft = adapters(kind)
    model, _, tuned = variants(folders["hub"], {"a": folder})
    own, shared = arrays(tuned["a"]), arrays(model)
    assert shared.keys() - own.keys() == set()  # all of the model's
    beside = sum(own[array] for array in own.keys() - shared.keys())
    trained = [p for name, p in peft.named_parameters() if "lora_" in name]
    assert beside <= sum(4 * p.numel() for p in trained) + 4 * 4096  # and DoRA's factors


@pytest.mark.parametrize("layout", ["full precision", "packed"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "embedding, the table too"])
def test_what_they_will_hold_is_known_before_anything_is_read(
    folders, packed, adapters, kind, layout
):
    base = folders["hub"] if layout == "full precision" else packed[0]
    named = {"a": AdapterChoice.of(adapters(kind)[0]), "b": AdapterChoice.of(adapters("lora")[0])}
    checked = Variants(str(base), LoadOptions(), named)
    taken = Peak()
    counted = checked.nbytes()
    assert taken.bytes < 4096  # constants
    model, _ = load(str(base))
    held, shared = {}, arrays(model)
    tuned = checked.of(model)
    for one in tuned.values():
        held |= arrays(one)
    assert counted == sum(held[array] for array in held.keys() - shared.keys())


def test_weights_that_norms_are_computed_from_go_as_they_come(folders, adapters):
    """DoRA's, of which several variants need the same."""
    named = {name: AdapterChoice.of(adapters("dora")[0]) for name in ("a", "b")}
    checked = Variants(str(folders["hub"]), LoadOptions(), named)
    model, _ = load(str(folders["hub"]))
    beside, before = checked.nbytes(), mx.get_active_memory()
    tuned = checked.of(model)
    assert tuned
    assert mx.get_active_memory() - before <= beside + 4096
    assert mx.get_cache_memory() == 0


def test_whole_modules_are_the_variants_own(folders, adapters):
    folder, _ = adapters("biases and whole modules")
    model, _, tuned = variants(folders["hub"], {"a": folder})
    tower, head = tuned["a"].vision_tower, tuned["a"].language_model.lm_head
    assert head is not model.language_model.lm_head
    assert tower is not model.vision_tower  # with the connector
    layer = tuned["a"].language_model.model.layers[0]
    assert layer.self_attn is model.language_model.model.layers[0].self_attn


@pytest.mark.parametrize("kind", ["lora", "dora", "biases and whole modules", "embedding"])
def test_beside_packed_weights_as_a_cpu_has_them(packed, adapters, kind):
    """In fused layers whose codes are turned, at the places of the layers that went into them."""
    folder, _ = adapters(kind)
    _, processor, tuned = variants(packed[0], {"a": folder})
    alone, _ = load(str(packed[0]), adapter=folder)
    assert distance(logits(tuned["a"], processor), logits(alone, processor)) < PARITY


@pytest.mark.parametrize("kind", KINDS)
def test_beside_fused_weights_as_a_gpu_has_them(folders, adapters, kind):
    folder, _ = adapters(kind)
    checked = Variants(str(folders["hub"]), LoadOptions(), {"a": AdapterChoice.of(folder)})
    model, processor = load(str(folders["hub"]))
    model.language_model.fuse()
    tuned = checked.of(model)["a"]
    alone, _ = load(str(folders["hub"]), adapter=folder)
    assert distance(logits(tuned, processor), logits(alone, processor)) < PARITY


def test_updates_of_fused_layers_are_of_their_own_outputs():
    """DoRA of one, LoRA of another, nothing of the third."""
    mx.random.seed(2)
    block = nn.Module()
    for name, width in (("q", 4), ("k", 6), ("v", 2)):
        block[name] = nn.Linear(8, width)
    x, layers = mx.random.normal((3, 8)), [block.q, block.k, block.v]

    def update(layer, rank, factor):
        a, b = mx.random.normal((8, rank)), mx.random.normal((rank, layer.weight.shape[0]))
        scaled = 1 + mx.random.uniform(shape=b.shape[1:]) if factor else None
        return low_rank.Linear(layer, a, b, scaled)

    q, v = update(block.q, 2, True), update(block.v, 3, False)
    want = mx.concatenate([q(x), layers[1](x), v(x)], axis=1)
    fuse(block, ("q", "k", "v"), "qkv")
    places = block._fused
    assert "q" not in block
    updates = [(places["q"][1], q), (places["v"][1], v)]
    assert mx.allclose(low_rank.beside_fused(block.qkv, updates)(x), want, atol=1e-5)


def test_beside_what_every_request_has(folders, adapters):
    """An adapter of the whole model and one that a request names add up."""
    both = [str(adapters("lora")[0]), str(adapters("dora")[0])]
    _, processor, tuned = variants(folders["hub"], {"a": both[1]}, adapter=[both[0]])
    alone, _ = load(str(folders["hub"]), adapter=both)
    assert distance(logits(tuned["a"], processor), logits(alone, processor)) < PARITY


def test_beside_weights_that_are_quantised_at_load(folders, adapters):
    folder, _ = adapters("lora")
    model, processor, tuned = variants(folders["hub"], {"a": folder}, bits=8)
    alone, _ = load(str(folders["hub"]), adapter=folder)
    assert distance(logits(tuned["a"], processor), logits(alone, processor)) < 0.05
    assert distance(logits(model, processor), logits(alone, processor)) > 0.05


ASKED = [None, "lora", "tower", "dora", "lora", None]


@pytest.mark.parametrize("shared", [False, True], ids=["no prefix cache", "prefix cache"])
@pytest.mark.parametrize("layout", ["full precision", "packed"])
def test_rows_with_other_adapters_answer_as_they_do_alone(
    folders,
    packed,
    adapters,
    layout,
    shared,
):
    """In one batch, and the second time from what the prefix cache has of their own."""
    base = folders["hub"] if layout == "full precision" else packed[0]
    kinds = {"lora": "lora", "dora": "dora", "tower": "tower and connector"}
    named = {name: adapters(kind)[0] for name, kind in kinds.items()}
    model, processor, tuned = variants(base, named)
    questions = [f"What is it, {index}?" for index in range(3)] * 2
    want = []
    for name, question in zip(ASKED, questions, strict=True):
        alone, _ = load(str(base), adapter=named.get(name))
        said = stream_generate(alone, processor, question, [picture()], max_tokens=TOKENS)
        want.append([piece.token for piece in said if piece.token is not None])
    assert len({tuple(answer) for answer in want}) > 2  # adapters tell
    cache = PrefixCache() if shared else None
    engine = Engine(model, processor, rows=4, prefix_cache=cache, adapters=tuned)
    try:
        for _ in range(2):
            answers = together(engine, processor, questions)
            tokens = [[p.token for p in answer if p.token is not None] for answer in answers]
            assert tokens == want
        assert all((answer[-1].reused_tokens > 0) == shared for answer in answers)
    finally:
        engine.close()


def together(engine, processor, questions):
    """All in the line before the first is answered."""
    options, arrived = Options(max_tokens=TOKENS), []
    for name, question in zip(ASKED, questions, strict=True):
        queue = SimpleQueue()
        engine.submit(processor(question, [picture()]), options, queue.put, adapter=name)
        arrived.append(queue)
    answers = []
    for queue in arrived:
        answer = [queue.get(timeout=60)]
        while answer[-1].finish_reason is None:
            answer.append(queue.get(timeout=60))
        answers.append(answer)
    return answers


def test_a_picture_is_encoded_once_for_adapters_that_leave_the_tower_alone(
    folders,
    adapters,
    monkeypatch,
):
    kinds = {"lora": "lora", "tower": "tower and connector"}
    named = {name: adapters(kind)[0] for name, kind in kinds.items()}
    model, processor, tuned = variants(folders["hub"], named)
    encoded, encode = [], type(model).image_features

    def counted(this, pictures):
        encoded.append(this)
        return encode(this, pictures)

    monkeypatch.setattr(type(model), "image_features", counted)
    cache = PrefixCache()
    for one in (model, *tuned.values(), model, *tuned.values()):
        list(stream_generate(one, processor, "?", [picture()], max_tokens=2, prefix_cache=cache))
    first, second = encoded
    assert first is model
    assert second is tuned["tower"]


@pytest.mark.parametrize(
    ("changed", "pictures", "sight"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", False, False),
        ("language_model.lm_head.weight", False, False),
        ("language_model.model.embed_tokens.weight", True, False),  # Fuyu's newlines are from there
        ("mm_projector.layers.0.bias", True, True),
        ("image_newline", True, True),
    ],
)
def test_pictures_are_others_where_anything_but_the_decoder_is(changed, pictures, sight):
    kind = SimpleNamespace(rename=str)
    arrays = {changed: mx.zeros(1), "other": mx.zeros(1)}
    difference = Difference(kind, Adapted(arrays), Adapted({**arrays, changed: mx.ones(1)}))
    assert (difference.pictures, difference.sight) == (pictures, sight)


def test_an_engine_refuses_an_adapter_that_it_does_not_have(folders):
    model, processor = load(str(folders["hub"]))
    engine = Engine(model, processor)
    try:
        with pytest.raises(UsageError, match="no adapter of the name french"):
            engine.submit(processor("?"), Options(), print, adapter="french")
    finally:
        engine.close()


def test_identities_of_variants_differ(folders, adapters):
    named = {"a": adapters("lora")[0], "b": f"{adapters('lora')[0]}:0.5"}
    model, _, tuned = variants(folders["hub"], named)
    merged, _ = load(str(folders["hub"]), adapter=named["a"])
    models = (model, *tuned.values(), merged)
    assert len({one.identity for one in models}) == len(models)


def test_a_wrong_adapter_is_told_of_before_the_model_is_loaded(folders, adapters, tmp_path):
    folder = broken(adapters("lora")[0], tmp_path / "deeper", "deeper")
    with pytest.raises(UsageError, match=r"this model \(llava\) has no"):
        Variants(str(folders["hub"]), LoadOptions(), {"a": AdapterChoice.of(folder)})
    with pytest.raises(UsageError, match="changes the vision tower, which coreml would run"):
        Variants(
            str(folders["hub"]), LoadOptions(vision_backend="coreml"),
            {"a": AdapterChoice.of(adapters("tower and connector")[0])},
        )  # fmt: skip


def test_names_are_told_from_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    several = ["a=b", "a=b:2", "folder:0.5", "./q=r", "french=some/folder:0.5", "x=y=z"]
    always, named = split_named(several)
    assert always == ["a=b", "a=b:2", "folder:0.5", "./q=r"]
    assert named == {
        "french": AdapterChoice(Path("some/folder"), 0.5), "x": AdapterChoice(Path("y=z")),
    }  # fmt: skip
    assert split_named(None) == (None, {})
    with pytest.raises(UsageError, match="two are named french"):
        split_named(["french=a", "french=b"])
