"""HiPrune and VisionZip against their equations in float64, on transformers' attention."""

# ruff: noqa: F811  (fixtures of another file)

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.picture.token_budget import TokenBudget
from mlx_vlm_edge.reduction.blocks import picture_places, staying_places
from mlx_vlm_edge.timings import result
from mlx_vlm_edge.vision.attended import listening
from mlx_vlm_edge.vision.pixels import CLIP_MEAN, CLIP_STD, normalized

from ..generation.test_prefix import models, picture  # noqa: F401  (fixtures)
from ..parity import FLOAT32, distance

QUESTION = "What is it?"
LAYERS = 3  # that the tiny LLaVA runs: up to the last but one
EARLY = 1  # 0.375 of them


@pytest.fixture(scope="module")
def theirs():
    import torch

    from ..reference import llava

    torch.set_num_threads(1)
    return llava.build()


@pytest.fixture(scope="module")
def seen(theirs, models):
    """Of one picture: attention [heads, N, N] of the layers that are run, keys [N, heads, d] of the
    last one and what comes out of it [N, C], all in float64, class token first."""
    import torch

    _, processor = models("llava")
    pixels = processor(QUESTION, images=[picture(1)]).pixels[0].data
    x = np.array(normalized(pixels[None], mx.float32, CLIP_MEAN, CLIP_STD)).astype(np.float64)
    keys, layers = [], [m for n, m in theirs.tower.named_modules() if n.endswith("k_proj")]
    hook = layers[LAYERS - 1].register_forward_hook(lambda _, __, out: keys.append(out))
    with torch.no_grad():
        out = theirs.tower(
            pixel_values=torch.from_numpy(x).permute(0, 3, 1, 2),
            output_attentions=True, output_hidden_states=True,
        )  # fmt: skip
    hook.remove()
    attention = [layer[0].numpy() for layer in out.attentions]
    heads = attention[0].shape[0]
    k = keys[0][0].numpy()
    return attention, k.reshape(len(k), heads, -1), out.hidden_states[LAYERS][0].numpy()


def visionzip(seen, count):
    """s_j = sum over heads of A[h, CLS, j]; dominant = top by s, and CLS; of the rest R every
    floor(|R| / K2)-th is a target, and token_t = h_t + the mean of those r whose k_r . k_t is the
    largest, k being the mean over heads, of length one."""
    attention, keys, hidden = seen
    merged = round(10 / 64 * count)
    s = attention[LAYERS - 1][:, 0, 1:].sum(axis=0)
    by_score = np.argsort(-s, kind="stable")
    dominant = by_score[: count - 1 - merged]
    tokens = {-1: hidden[0], **{j: hidden[1 + j] for j in dominant}}
    rest = sorted(set(range(len(s))) - set(dominant))
    k = keys.mean(axis=1)[1:]
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    targets = rest[:: len(rest) // merged][:merged] if merged else []
    groups = {t: [] for t in targets}
    for r in rest if merged else []:
        if r not in groups:
            groups[max(targets, key=lambda t: k[r] @ k[t])].append(hidden[1 + r])
    for t, group in groups.items():
        tokens[t] = hidden[1 + t] + (np.mean(group, axis=0) if group else 0)
    return np.array([tokens[j] for j in sorted(tokens)])


def hiprune(early, late, rows, columns, count):
    """round(0.1 K / 5) anchors by an early layer's a_j, with their four neighbours; the others by
    the last layer's. a_j: the mean over heads and queries of attention to j."""
    chosen = set()
    for anchor in np.argsort(-early)[: round(0.1 * count / 5)]:
        row, column = divmod(int(anchor), columns)
        for down, across in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)):
            if 0 <= row + down < rows and 0 <= column + across < columns:
                chosen.add((row + down) * columns + column + across)
    for token in np.argsort(-late):
        if len(chosen) < count:
            chosen.add(int(token))
    return sorted(chosen)


def test_what_the_tower_tells_is_transformers(seen, models):
    model, processor = models("llava")
    attention, keys, hidden = seen
    with listening() as calls:
        result(model.stages(processor(QUESTION, images=[picture(1)]).pixels[0]))
    (call,) = calls
    assert distance(call.early[0], attention[EARLY].mean(axis=(0, 1))[1:]) < FLOAT32
    assert distance(call.late[0], attention[LAYERS - 1].mean(axis=(0, 1))[1:]) < FLOAT32
    assert distance(call.of_class[0], attention[LAYERS - 1][:, 0, 1:].sum(axis=0)) < FLOAT32
    assert distance(call.keys[0], keys.mean(axis=1)[1:]) < FLOAT32
    assert distance(call.hidden[0], hidden) < FLOAT32


@pytest.mark.parametrize("count", [2, 3, 6, 11, 15])
def test_visionzip_is_its_equations(seen, models, theirs, count):
    import torch

    model, processor = models("llava")
    inputs = processor(QUESTION, images=[picture(1)], budget=TokenBudget(count, "visionzip"))
    features = torch.from_numpy(visionzip(seen, count))
    with torch.no_grad():
        want = theirs.model.model.multi_modal_projector(features).numpy()
    got = model.encode_image(inputs.pixels[0])
    assert got.shape == want.shape == (count, 128)
    assert distance(got, want) < FLOAT32


def test_a_fault_in_visionzip_is_seen(seen, models, theirs):
    """The scores of another layer, or no merging, are far off."""
    import torch

    model, processor = models("llava")
    inputs = processor(QUESTION, images=[picture(1)], budget=TokenBudget(11, "visionzip"))
    attention, keys, hidden = seen
    features = torch.from_numpy(visionzip((attention[::-1], keys, hidden), 11))
    with torch.no_grad():
        wrong = theirs.model.model.multi_modal_projector(features).numpy()
    assert distance(model.encode_image(inputs.pixels[0]), wrong) > 20 * FLOAT32


@pytest.mark.parametrize("count", [1, 5, 12])
def test_hiprune_is_its_equations(seen, models, count, monkeypatch):
    model, processor = models("llava")
    pixels = processor(QUESTION, images=[picture(1)]).pixels[0]
    every = np.array(model.encode_image(pixels))
    attention, _, _ = seen
    early, late = (attention[at].mean(axis=(0, 1))[1:] for at in (EARLY, LAYERS - 1))
    wanted = hiprune(early, late, 4, 4, count)
    got = model.encode_image(processor.within(pixels, TokenBudget(count, "hiprune")))
    assert distance(got, every[wanted]) < FLOAT32


def test_anchors_bring_their_neighbours():
    """24 x 24 tokens cut to 150: 3 anchors, two of them at the border."""
    from mlx_vlm_edge.picture.token_budget import Block, planned
    from mlx_vlm_edge.reduction.attended import by_layers

    draw, block = np.random.default_rng(3), Block(24, 24, ended=True, before=1)
    early, late = draw.random((2, 576)) / 576
    early[[0, 300, 47]] = 0.5
    plan = planned(TokenBudget(170, "hiprune"), [block])
    (part,) = plan.cuts
    assert round(0.1 * part.tokens / 5) == 3
    body = picture_places(block)
    scores = np.zeros((2, block.total), np.float32)
    scores[:, body] = early, late
    every = mx.arange(block.total, dtype=mx.float32)[:, None]
    got = np.array(by_layers(every, plan, *map(mx.array, scores)))[:, 0].astype(int)
    chosen = hiprune(early, late, 24, 24, part.tokens)
    assert {0, 1, 24, 300, 276, 324, 299, 301, 47, 23, 46, 71} <= {*chosen}
    assert got.tolist() == sorted([*body[chosen], *staying_places(part)])


@pytest.mark.parametrize("name", ["llava", "llava_onevision"])
def test_attention_is_not_taken_in_bands(models, name, monkeypatch):
    """A tile has its scores as a whole, and no pairs of tokens are compared."""
    model, processor = models(name)
    pixels = processor(QUESTION, images=[picture(1)]).pixels[0]
    budget = TokenBudget(0.5, "hiprune")
    whole = np.array(model.encode_image(processor.within(pixels, budget)))
    monkeypatch.setattr("mlx_vlm_edge.picture.token_budget.TOGETHER", 5)
    got = np.array(model.encode_image(processor.within(pixels, budget)))
    assert np.array_equal(got, whole)


def squares(scores, rows, columns):
    """The means of squares of patches, rows * columns of them."""
    side = math.isqrt(len(scores))
    grid = scores.reshape(rows, side // rows, columns, side // columns)
    return grid.mean(axis=(1, 3)).ravel()


@pytest.mark.parametrize("name", ["llava", "mobilevlm", "idefics3", "llava_onevision", "fastvlm"])
def test_hiprune_in_every_family_that_has_attention(models, name):
    model, processor = models(name)
    pixels = processor(QUESTION, images=[picture(1)]).pixels[0]
    every = np.array(model.encode_image(pixels))
    with listening() as calls:
        result(model.stages(pixels))
    early, late = (
        np.concatenate([np.array(getattr(call, which), np.float64) for call in calls])
        for which in ("early", "late")
    )
    fewer = processor.within(pixels, TokenBudget(0.5, "hiprune"))
    wanted, start = [], 0
    for index, part in enumerate(fewer.reduction.cuts):
        block, body = part.block, picture_places(part.block)
        if name == "llava_onevision" and index:  # the tiles' rows, put together and cut out
            both = [mx.array(seen.astype(np.float32))[:, :, None] for seen in (early, late)]
            packed = [np.array(model.pack(x, pixels, mx.zeros((1,))))[:, 0] for x in both]
            own = [seen[start + body] for seen in packed]
        else:
            own = [squares(seen[index], block.rows, block.columns) for seen in (early, late)]
        chosen = hiprune(*own, block.rows, block.columns, part.tokens)
        wanted += [start + place for place in sorted([*body[chosen], *staying_places(part)])]
        start += block.total
    got = np.array(model.encode_image(fewer))
    assert len(got) == processor.visual_tokens(fewer) == len(wanted)
    assert distance(got, every[wanted]) < FLOAT32


def test_what_fastvithd_tells_is_its_last_stage_s_attention(models):
    """Of its first and last block, from their own weights in float64."""
    model, processor = models("fastvlm")
    pixels = processor(QUESTION, images=[picture(1)]).pixels[0]
    tower = model.vision_tower
    stage = tower.stages[-1]
    with listening() as calls:
        told_features = result(model.stages(pixels))
    (call,) = calls
    x = dict(tower.stage_outputs(normalized(pixels.data[None], mx.float32)))[
        f"stage {len(tower.stages) - 2}"
    ]
    for layer in stage.entry:
        x = layer(x)
    wanted = []
    for block in stage.blocks:
        normed = np.array(block.norm(x), np.float64).reshape(-1, x.shape[-1])
        qkv = normed @ np.array(block.attention.qkv.weight, np.float64)
        q, k, _ = np.split(qkv.reshape(len(qkv), -1, 32).swapaxes(0, 1), 3)  # [heads, n, 32]
        logits = q @ k.swapaxes(1, 2) * 32**-0.5
        a = np.exp(logits - logits.max(axis=-1, keepdims=True))
        wanted.append((a / a.sum(axis=-1, keepdims=True)).mean(axis=(0, 1)))
        x = block(x)
    assert distance(call.early[0], wanted[0]) < FLOAT32
    assert distance(call.late[0], wanted[-1]) < FLOAT32
    assert distance(told_features, result(model.stages(pixels))) < FLOAT32


@pytest.mark.parametrize("method", ["hiprune", "visionzip"])
def test_nothing_waits(models, monkeypatch, method):
    model, processor = models("llava")
    pixels = processor(QUESTION, images=[picture(1)], budget=TokenBudget(8, method)).pixels[0]
    waits, evaluate = [], mx.eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: (waits.append(1), evaluate(*arrays)))
    model.encode_image(pixels)
    assert not waits


def test_another_back_end_has_no_attention_to_show(models, monkeypatch):
    model, processor = models("llava")
    inputs = processor(QUESTION, images=[picture(1)], budget=TokenBudget(8, "hiprune"))
    features = model.features(inputs.pixels[0].data[None])
    monkeypatch.setattr(model, "encoder", lambda pictures: features)
    with pytest.raises(UsageError, match="needs the attention of the model's own vision tower"):
        model.encode_image(inputs.pixels[0])
    plain = replace(inputs.pixels[0], reduction=None)
    assert model.encode_image(plain).shape == (16, 128)


def test_a_tower_without_a_class_token_is_no_visionzip_s(models, monkeypatch):
    model, processor = models("llava_onevision")
    monkeypatch.setattr(type(processor), "token_methods", frozenset({"visionzip"}))
    monkeypatch.setattr(type(processor), "preprocessor", lambda self, _: self.single_tile)
    inputs = processor(QUESTION, images=[picture(1)], budget=TokenBudget(8, "visionzip"))
    with pytest.raises(UsageError, match=r"'visionzip' asks the class token.*hiprune does"):
        model.encode_image(inputs.pixels[0])
