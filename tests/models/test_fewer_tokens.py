"""Fewer visual tokens in every family: which these are, where they stand, what they cost."""

# ruff: noqa: F811  (fixtures of another file)

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_edge import Conversation, PrefixCache, generate, load, stream_generate
from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.loading import cost
from mlx_vlm_edge.loading.load import LoadOptions
from mlx_vlm_edge.picture.preprocessing import Preprocessing
from mlx_vlm_edge.picture.token_budget import TokenBudget
from mlx_vlm_edge.reduction.blocks import picture_places, staying_places
from mlx_vlm_edge.timings import result

from ..generation.test_prefix import family, models, picture  # noqa: F401  (fixtures)
from ..parity import FLOAT32, distance
from ..reduction.test_choosing import divprune, dpp

QUESTION = "What is it?"


def separators(name, model, pixels, tokens):
    """Which of all tokens are the model's own, told by their values: newlines, class tokens."""
    if name == "fuyu":
        own = model.language_model.embed(mx.array([pixels.newline]))
    elif name == "llava_onevision":
        own = model.image_newline[None]
    elif name == "cambrian":
        own = model.connector.image_newline[None]
    elif name == "eve2":
        own = mx.stack([model.tower.class_embedding, model.tower.split_embedding])
    elif name == "eve":
        split = model.connector(model.tower.split_embedding[None])
        own = mx.concatenate([tokens[:1], split])
    else:
        return []
    near = mx.abs(tokens[:, None] - own[None]).max(axis=-1) < 1e-5 * mx.abs(own).max()
    return np.flatnonzero(np.array(near.any(axis=1))).tolist()


def test_separators_are_where_the_blocks_say(family):
    name, model, processor = family
    pixels = processor(QUESTION, images=[picture(1)]).pixels[0]
    tokens, start, said = model.encode_image(pixels), 0, []
    for block in processor.blocks(pixels):
        own = {*range(block.total)} - {*picture_places(block).tolist()}
        said += [start + place for place in sorted(own)]
        start += block.total
    assert start == len(tokens) == processor.visual_tokens(pixels)
    assert said == separators(name, model, pixels, tokens)


@pytest.mark.parametrize("method", ["divprune", "dpp"])
def test_chosen_tokens_are_those_of_the_equations(family, method):
    _, model, processor = family
    every = np.array(model.encode_image(processor(QUESTION, images=[picture(1)]).pixels[0]))
    pixels = processor(QUESTION, images=[picture(1)], budget=TokenBudget(0.5, method)).pixels[0]
    reference, wanted, start = {"divprune": divprune, "dpp": dpp}[method], [], 0
    for part in pixels.reduction.cuts:
        body = picture_places(part.block)
        chosen = body[reference(every[start + body], part.tokens)]
        wanted += [start + place for place in sorted([*chosen, *staying_places(part)])]
        start += part.block.total
    got = np.array(model.encode_image(pixels))
    assert np.array_equal(got, every[wanted])


def test_every_method_of_a_family_gives_what_was_counted(family):
    _, model, processor = family
    for method in sorted(processor.token_methods):
        inputs = processor(QUESTION, images=[picture(1)], budget=TokenBudget(0.5, method))
        (pixels,) = inputs.pixels
        tokens = model.encode_image(pixels)
        assert len(tokens) == processor.visual_tokens(pixels) == len(inputs.visual)
        assert np.isfinite(np.array(tokens)).all()


def test_the_text_around_the_picture_stays(family):
    """Placeholders alone become fewer; what is said is tokenised as ever."""
    _, _, processor = family
    whole = processor(QUESTION, images=[picture(1)])
    fewer = processor(QUESTION, images=[picture(1)], budget=TokenBudget(0.3))

    def text(inputs):
        return np.delete(inputs.input_ids[0], inputs.visual).tolist()

    assert text(fewer) == text(whole)
    left = len(fewer.visual)
    assert left < len(whole.visual)
    assert fewer.input_ids.shape[1] == whole.input_ids.shape[1] - len(whole.visual) + left
    # Where one run of tokens was, one is: at the same place of the text.
    before = [np.searchsorted(np.setdiff1d(np.arange(i.input_ids.size), i.visual), i.visual)
              for i in (whole, fewer)]  # fmt: skip
    assert {*before[0].tolist()} == {*before[1].tolist()}


def test_the_answer_is_that_of_a_prompt_with_those_tokens(family):
    _, model, processor = family
    inputs = processor(QUESTION, images=[picture(1)], budget=TokenBudget(0.5))
    every = model.encode_image(replace(inputs.pixels[0], reduction=None))
    tokens = model.encode_image(inputs.pixels[0])
    assert len(tokens) < len(every)
    known = replace(inputs, tokens=result(model.encode(inputs.pixels)))
    assert distance(model(inputs), model(known)) < FLOAT32
    logits = model.prefill(inputs, model.make_cache(), 2048)
    assert distance(logits, model(known)[:, -1]) < FLOAT32


def test_all_of_them_are_as_if_nothing_was_said(family):
    _, _, processor = family
    whole = processor(QUESTION, images=[picture(1)])
    for tokens in (1.0, len(whole.visual)):
        same = processor(QUESTION, images=[picture(1)], budget=TokenBudget(tokens))
        assert np.array_equal(same.input_ids, whole.input_ids)
        assert same.pixels[0].reduction is None


def test_more_than_there_are_is_refused(family):
    _, _, processor = family
    count = len(processor(QUESTION, images=[picture(1)]).visual)
    with pytest.raises(UsageError, match=f"visual tokens {count + 1:,}: the picture has {count:,}"):
        processor(QUESTION, images=[picture(1)], budget=TokenBudget(count + 1))


def test_what_a_family_has_no_method_for_is_refused(family):
    _, _, processor = family
    for method in {"visionzip", "hiprune", "pool"} - processor.token_methods:
        with pytest.raises(UsageError, match=f"'{method}' is not defined for this model: it has"):
            processor(QUESTION, images=[picture(1)], budget=TokenBudget(0.5, method))


def test_several_pictures_each_have_their_own(family):
    name, model, processor = family
    if name in ("fuyu", "cambrian"):
        pytest.skip("takes one image")
    inputs = processor("And?", images=[picture(1), picture(2)], budget=TokenBudget(0.5))
    counts = [processor.visual_tokens(pixels) for pixels in inputs.pixels]
    assert sum(counts) == len(inputs.visual)
    assert [len(model.encode_image(pixels)) for pixels in inputs.pixels] == counts


def test_a_prefix_cache_does_not_mix_them(models):
    model, processor = models("fastvlm")
    store, options = PrefixCache(), {"max_tokens": 4}
    said, before = {}, processor(QUESTION, images=[picture(1)]).visual[0]  # of the text
    for tokens, method in ((None, None), (0.5, "divprune"), (0.5, "random"), (0.25, "divprune")):
        asked = {"visual_tokens": tokens, "token_method": method, **options}
        cold = generate(model, processor, QUESTION, [picture(1)], **asked)
        (*_, last) = stream_generate(
            model, processor, QUESTION, [picture(1)], prefix_cache=store, **asked
        )
        assert last.reused_tokens == (before if said else 0)
        warm = generate(model, processor, QUESTION, [picture(1)], prefix_cache=store, **asked)
        assert warm == cold
        said[tokens, method] = last.visual_tokens
    assert len({*said.values()}) == 3


def test_a_conversation_may_change_its_mind(models):
    model, processor = models("fastvlm")
    chat = Conversation(model, processor, max_tokens=2, visual_tokens=0.5)
    counts = []
    for question in ({"text": "What?", "images": [picture(1)]}, {"text": "And?"},
                     {"text": "So?", "visual_tokens": None}):  # fmt: skip
        (*_, last) = chat.stream(**question)
        counts.append(last.visual_tokens)
    assert counts[0] == counts[1] == counts[2] // 2


def test_load_remembers_what_was_asked(native_folder):
    _, processor = load(str(native_folder), visual_tokens=2, token_method="random")
    assert len(processor(QUESTION, images=[picture(1)]).visual) == 2
    assert len(processor(QUESTION, images=[picture(1)], budget=TokenBudget(3)).visual) == 3
    with pytest.raises(UsageError, match="visual tokens 0: give a whole number"):
        load(str(native_folder), visual_tokens=0)
    with pytest.raises(UsageError, match="'visionzip' is not defined for this model"):
        load(str(native_folder), visual_tokens=2, token_method="visionzip")


FULL = {"llava-onevision-0.5b": (1152, 1152), "idefics3-8b": (1456, 1092)}


@pytest.mark.parametrize("alias", FULL)
def test_a_quarter_of_the_tokens_costs_less_than_two_fifths(alias):
    """Operations of the prefill with those of choosing, which are under 3 % of what it saves."""
    config, prices = configs.read(alias), {}
    for tokens in (None, 0.25):
        budget = None if tokens is None else TokenBudget(tokens)
        plan = cost.blueprint(config, asked=Preprocessing(budget=budget))
        prices[tokens] = cost.cost(plan, cost.question(plan, FULL[alias]))
    whole, fewer = prices[None], prices[0.25]
    assert fewer.visual_tokens == round(0.25 * whole.visual_tokens)
    assert fewer.vision == whole.vision
    assert whole.reduction.flops == 0 < fewer.reduction.flops
    assert whole.prefill.flops > 2.5 * (fewer.prefill.flops + fewer.reduction.flops)
    assert fewer.reduction.flops < 0.03 * (whole.prefill.flops - fewer.prefill.flops)


def test_memory_is_counted_with_fewer_tokens():
    asked = LoadOptions(visual_tokens=0.25).preprocessing
    config = configs.read("llava-1.5-7b")
    plan = cost.blueprint(config, asked=asked)
    assert cost.question(plan).input_ids.shape[1] == 144 + cost.TEXT_TOKENS
