"""What is taken over from earlier prompts: never another answer, never more work than is new."""

import gc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_edge import generate, load, stream_generate, whole_file
from mlx_vlm_edge.generation import prefix
from mlx_vlm_edge.generation.prefix import PrefixCache, digest, position_keys, shared
from mlx_vlm_edge.language.cache import KVCache, QuantizedKVCache
from mlx_vlm_edge.loading.load import LoadOptions, start_loading
from mlx_vlm_edge.picture.image import Pixels, open_image
from mlx_vlm_edge.picture.tiling import Tiles
from mlx_vlm_edge.text.prompt import Inputs

from ..conftest import GOLDEN

TOKENS = 8
IMAGE = {"type": "image"}


def eve2(folder):
    from ..reference import eve2 as theirs

    return theirs.save(theirs.build(), folder / "eve2")


def fuyu(folder):
    from ..reference import fuyu as theirs

    return theirs.save(theirs.build(), folder / "fuyu", "hub")


def idefics3(folder):
    from ..reference import idefics3 as theirs

    case = theirs.CASES["smolvlm"]
    return theirs.save(theirs.build(case), case, folder)


def llava(folder):
    from ..reference import llava as theirs

    return theirs.save(theirs.build(), "hub", folder / "llava")


def convllava(folder):
    from ..reference import convllava as theirs

    return theirs.inside(folder)


def cambrian(folder):
    from ..reference import cambrian as theirs

    return theirs.native(folder)


def llava_onevision(folder):
    from ..reference import llava_onevision as theirs

    return theirs.save(theirs.weights(theirs.build()), folder, "native")


FAMILIES = {
    "fastvlm": None,  # the session's native folder
    "mobilevlm": lambda _: GOLDEN.parent / "mobilevlm_v2",
    "eve": lambda _: GOLDEN.parent / "eve_tiny",
    "eve2": eve2,
    "fuyu": fuyu,
    "idefics3": idefics3,
    "llava": llava,
    "llava_onevision": llava_onevision,
    "convllava": convllava,
    "cambrian": cambrian,
    "idefics2": lambda _: GOLDEN.parent / "idefics2_tiny",
    "moe_llava": lambda _: GOLDEN.parent / "moe_llava_stablelm",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, native_folder):
    """Per family, on demand: (model, processor)."""
    made = {}

    def get(name):
        if name not in made:
            build = FAMILIES[name]
            folder = build(tmp_path_factory.mktemp(name)) if build else native_folder
            made[name] = load(str(folder))
        return made[name]

    return get


@pytest.fixture(params=FAMILIES)
def family(request, models):
    return request.param, *models(request.param)


@pytest.fixture
def fastvlm(models):
    return models("fastvlm")


def picture(seed, width=90, height=70):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


class Asker:
    """Asks with one prefix cache, checks each answer against one without, counts the work."""

    def __init__(self, model, processor, monkeypatch, **options):
        self.model, self.processor = model, processor
        self.options = {"max_tokens": TOKENS, **options}
        self.store = PrefixCache()
        self.encoded = 0
        kind = type(model)
        stages = kind.stages

        def counted(this, pixels):
            self.encoded += 1
            return stages(this, pixels)

        monkeypatch.setattr(kind, "stages", counted)
        prefilling = kind.prefilling

        def watched(this, *arguments):
            self.logits = yield from prefilling(this, *arguments)
            return self.logits

        monkeypatch.setattr(kind, "prefilling", watched)

    def __call__(self, prompt, *images, **more):
        """(reused, encoded, prompt positions, the answer's ids) of one prompt."""
        options = self.options | more
        cold = self._cold(prompt, *images, **options)
        logits, self.encoded = self.logits, 0
        pieces = list(
            stream_generate(
                self.model, self.processor, prompt, [*images], prefix_cache=self.store, **options
            )
        )
        assert self._ids(pieces) == cold
        assert mx.abs(self.logits - logits).max().item() < 1e-4 * mx.abs(logits).max().item()
        return SimpleNamespace(
            reused=pieces[-1].reused_tokens,
            encoded=self.encoded,
            length=pieces[-1].prompt_tokens,
            visual=pieces[-1].visual_tokens,
            text="".join(piece.text for piece in pieces),
            ids=cold,
        )

    def _cold(self, prompt, *images, **options):
        pieces = stream_generate(
            self.model, self.processor, prompt, [*images], prefix_cache=False, **options
        )
        return self._ids(pieces)

    @staticmethod
    def _ids(pieces):
        return [piece.token for piece in pieces if piece.token is not None]


@pytest.fixture
def ask(family, monkeypatch):
    return Asker(*family[1:], monkeypatch)


@pytest.fixture
def ask_fastvlm(fastvlm, monkeypatch):
    return Asker(*fastvlm, monkeypatch)


def test_a_second_question_on_the_image_encodes_nothing_and_prefills_the_new_text(ask):
    first = ask("Is it red?", picture(1))
    second = ask("What is it?", picture(1))
    assert (first.reused, first.encoded, second.encoded) == (0, 1, 0)
    assert second.visual < second.reused < second.length
    assert second.length - second.reused <= 30


def test_the_same_prompt_again_computes_its_last_position(ask):
    ask("Is it red?", picture(1))
    again = ask("Is it red?", picture(1))
    assert (again.reused, again.encoded) == (again.length - 1, 0)


def test_another_image_with_the_same_text_is_another_prompt(ask):
    first = ask("Is it red?", picture(1))
    other = ask("Is it red?", picture(2))
    assert other.encoded == 1
    assert other.reused < first.length - first.visual
    assert ask("Is it red?", picture(1)).encoded == 0


def test_a_smaller_image_with_the_same_text(ask):
    ask("Is it red?", picture(1))
    assert ask("Is it red?", picture(1, 70, 90)).encoded == 1


def test_text_alone_shares_its_beginning(ask):
    ask("What is red?")
    assert ask("What is blue?").reused > 0


def changed_before(family):
    """Two prompts that differ before the image."""
    if family == "fuyu":
        pytest.skip("Fuyu has nothing before the image")
    rest = [IMAGE, {"type": "text", "text": "What is it?"}]
    return [
        [{"role": "user", "content": [{"type": "text", "text": text}, *rest]}]
        for text in ("Look here. ", "Look there. ")
    ]


def test_changed_text_before_the_image_prefills_it_again_but_does_not_encode_it(family, ask):
    one, two = changed_before(family[0])
    first = ask(one, picture(1))
    second = ask(two, picture(1))
    assert second.encoded == 0
    assert 0 < second.reused < second.length - first.visual


def test_two_images(family, ask):
    if family[0] in ("fuyu", "cambrian"):
        pytest.skip("takes one image")
    first = ask("Which is red?", picture(1), picture(2))
    assert first.encoded == 2
    second = ask("Which is blue?", picture(1), picture(2))
    assert second.encoded == 0
    assert second.reused > second.visual
    swapped = ask("Which is red?", picture(2), picture(1))
    assert swapped.encoded == 0
    assert swapped.reused < swapped.length - swapped.visual
    changed = ask("Which is red?", picture(1), picture(3))
    assert changed.encoded == 1
    assert changed.reused > first.visual // 2 - 1


def test_the_same_image_twice_in_a_prompt_is_encoded_once(ask_fastvlm):
    assert ask_fastvlm("Which is red?", picture(1), picture(1)).encoded == 1


def chat(*turns, images=1):
    """A user's and the assistant's words in turn; the images come first."""
    messages = [
        {"role": "assistant" if index % 2 else "user", "content": [{"type": "text", "text": turn}]}
        for index, turn in enumerate(turns)
    ]
    messages[0]["content"] = [IMAGE] * images + messages[0]["content"]
    return messages


def test_a_conversation_takes_over_its_history(family, ask):
    if family[0] == "fuyu":
        pytest.skip("Fuyu takes one question")
    turns, before = ["What is it?"], 0
    for question in ("And here?", "Is it?"):
        last = ask(chat(*turns), picture(1))
        assert last.reused >= before
        before = last.length - 10
        turns += [last.text, question]
    assert ask(chat(*turns), picture(1)).encoded == 0


def test_an_answer_in_the_history_is_not_computed_again(fastvlm, ask_fastvlm, monkeypatch):
    """Where its ids are what the tokenizer makes of its text: here they are set to be."""
    processor = fastvlm[1]
    first = ask_fastvlm("Is it?", picture(1))
    inputs = processor("Is it?", images=[picture(1)])
    more = np.array([[*inputs.input_ids[0], *first.ids[:-1], 40, 41, 42]], np.int32)

    def steps(*_, **__):
        yield from ()
        return Inputs(more, inputs.visual, inputs.pixels)

    monkeypatch.setattr(type(processor), "steps", steps)
    second = ask_fastvlm("the same and more", picture(1))
    assert second.reused == inputs.input_ids.shape[1] + len(first.ids) - 1
    assert second.length == second.reused + 3


def test_an_edited_answer_is_computed_again(ask_fastvlm):
    ask_fastvlm("What is it?", picture(1))
    known = ask_fastvlm(chat("What is it?", "A cat.", "Really?"), picture(1))
    other = ask_fastvlm(chat("What is it?", "A dog.", "Really?"), picture(1))
    assert known.visual < other.reused < known.length - 8  # from "dog" on


QUANTISED = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0, "max_tokens": TOKENS}


@pytest.fixture
def ask_quantised(models):
    """Asks a model whose heads are wide enough: (pieces, logits of the prompt's last position)."""
    model, processor = models("llava")
    store = PrefixCache()

    def ask(prompt, prefix_cache=store, **options):
        stream = stream_generate(
            model, processor, prompt, [picture(1)], prefix_cache=prefix_cache, **options
        )
        return list(stream)

    ask.store = store
    return ask


def ids(pieces):
    return [piece.token for piece in pieces if piece.token is not None]


def test_a_cache_that_is_not_yet_quantised_is_taken_over_as_it_is(models, monkeypatch):
    asker = Asker(*models("llava"), monkeypatch)
    options = QUANTISED | {"quantized_kv_start": 1000}
    asker("Is it red?", picture(1), **options)
    second = asker("What is it?", picture(1), **options)
    assert second.encoded == 0
    assert second.reused > second.visual
    assert asker("What is it?", picture(1)).reused == second.length - 1


def test_a_quantised_cache_is_taken_over_quantised(ask_quantised):
    ask_quantised("Is it red?", **QUANTISED)
    second = ask_quantised("What is it?", **QUANTISED)
    assert second[0].reused_tokens > second[0].visual_tokens
    assert ids(second) == ids(ask_quantised("What is it?", False, **QUANTISED))
    again = ask_quantised("What is it?", **QUANTISED)
    assert again[0].reused_tokens == again[0].prompt_tokens - 1
    assert ids(again) == ids(second)


def test_what_is_quantised_is_for_those_who_ask_for_that(ask_quantised):
    in_full = {"max_tokens": TOKENS}
    for other in (in_full, QUANTISED | {"kv_bits": 4}):
        ask_quantised.store.clear()
        ask_quantised("Is it red?", **QUANTISED)
        assert ask_quantised("Is it blue?", **other)[0].reused_tokens == 0
        again = ask_quantised("Is it blue?", **other)
        assert again[0].reused_tokens == again[0].prompt_tokens - 1
    want = ask_quantised("Is it red?", False, **in_full)
    for _ in range(2):
        assert ids(ask_quantised("Is it red?", **in_full)) == ids(want)
    assert ask_quantised("Is it red?", **QUANTISED)[0].reused_tokens > 0  # in full is for all


def test_a_prompt_that_never_reaches_the_start_takes_over_nothing_quantised(models, monkeypatch):
    """Its answer would depend on what was asked before it."""
    asker = Asker(*models("llava"), monkeypatch)
    options = QUANTISED | {"kv_bits": 2}
    length = asker("Is it?", picture(1), **options).length
    asker.store.clear()
    options["quantized_kv_start"] = length + 2 * TOKENS
    longer = "Is it red, or is it of some other colour that one could name?"
    assert asker(longer, picture(1), **options).length > options["quantized_kv_start"]
    assert asker("Is it?", picture(1), **options).reused == 0
    assert asker("Is it?", picture(1), **options).reused == length - 1  # its own, in full


def test_what_was_quantised_is_for_prompts_of_the_same_start(ask_quantised):
    started = [QUANTISED | {"quantized_kv_start": start} for start in (0, 1)]
    for options in started:
        assert ask_quantised("Is it red?", **options)[0].reused_tokens == 0
    for options in started:
        again = ask_quantised("Is it red?", **options)
        assert again[0].reused_tokens == again[0].prompt_tokens - 1


def test_what_is_quantised_leaves_the_full_keys_and_values_it_continues(ask_quantised):
    """Those who want no less than them have no use for it."""
    first = ask_quantised("Is it red?", max_tokens=1)[0]
    ask_quantised("Is it red?", **QUANTISED)  # with its answer, which continues that
    again = ask_quantised("Is it red?", max_tokens=1)[0]
    assert again.reused_tokens == first.prompt_tokens - 1
    assert ask_quantised("Is it red?", **QUANTISED | {"kv_bits": 4})[0].reused_tokens > 0


def test_what_is_kept_replaces_only_what_it_can_stand_for(models):
    model, _ = models("fastvlm")
    layers = [(mx.zeros((1, 1, 4, 1)),) * 2]
    short, long = key_of(1, 2), key_of(1, 2, 3)
    kinds = [None, (32, 8, 0), (32, 4, 0), (32, 8, 1)]
    for before in kinds:
        for after in kinds:
            store = PrefixCache()
            store.keep(model, short, layers, before)
            store.keep(model, long, layers, after)
            assert len(store._entries) == (1 if after in (None, before) else 2)


def test_a_quantised_cache_is_held_once_and_is_smaller(ask_quantised, models):
    """While it answers and after: of what was there in full nothing is left."""
    model, processor = models("llava")
    ask_quantised("Is it red?", max_tokens=TOKENS)
    whole = ask_quantised.store.nbytes
    ask_quantised.store.clear()
    gc.collect()
    before = {id(cache) for cache in gc.get_objects() if type(cache) is KVCache}
    stream = stream_generate(
        model, processor, "Is it red?", [picture(1)], prefix_cache=ask_quantised.store, **QUANTISED
    )
    next(stream)
    kept = [c for c in gc.get_objects() if type(c) is KVCache and id(c) not in before]
    assert sum(array.nbytes for cache in kept for array in cache.state[:2]) == 0
    stream.close()
    assert 0 < ask_quantised.store.nbytes < 0.7 * whole


def test_what_is_quantised_is_not_written_to_the_disk(models, tmp_path):
    model, processor = models("llava")
    store = PrefixCache(disk=tmp_path)
    asked = {"prefix_cache": store, **QUANTISED}
    list(stream_generate(model, processor, "Is it red?", [picture(1)], **asked))
    assert model.identity is not None
    assert not list(store.disk.prompts(model.identity))
    second = list(stream_generate(model, processor, "What?", [picture(1)], **asked))
    assert second[0].reused_tokens > second[0].visual_tokens


def test_a_long_prompt_is_quantised_on_the_way(models, monkeypatch):
    """Between its parts, as mlx-lm does: what comes after the start is never held in full."""
    sizes, update = [], QuantizedKVCache.update_and_fetch

    def watched(this, keys, values):
        sizes.append((this.offset, keys.shape[2]))
        return update(this, keys, values)

    monkeypatch.setattr(QuantizedKVCache, "update_and_fetch", watched)
    model, processor = models("llava")
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 12, "prefill_step_size": 8}
    pieces = list(stream_generate(model, processor, "Hi", [picture(1)], max_tokens=2, **options))
    layers = len(model.language_model.model.layers)
    assert sizes[: 2 * layers] == [(0, 16)] * layers + [(16, 8)] * layers
    assert pieces[0].prompt_tokens > 24


def test_a_request_that_fails_leaves_nothing_that_others_cannot_use(fastvlm, monkeypatch):
    """An array that is not evaluated yet belongs to the thread that made it."""
    model, processor = fastvlm
    ask = {"prompt": "Is it red?", "images": [picture(1)], "max_tokens": 4}
    want, store = generate(model, processor, **ask), PrefixCache()

    def broken(this, *arguments):
        raise MemoryError("no room")

    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as worker:
        patch.setattr(type(model), "prefilling", broken)
        first = worker.submit(generate, model, processor, **ask, prefix_cache=store)
        with pytest.raises(MemoryError):
            first.result()
    assert generate(model, processor, **ask, prefix_cache=store) == want


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_picture_that_was_encoded_is_known_though_its_prompt_is_broken_off(
    fastvlm, error, monkeypatch
):
    model, processor = fastvlm
    store = PrefixCache()

    def broken(*_):
        raise error

    monkeypatch.setattr(type(model), "prefilling", broken)
    with pytest.raises(error):
        generate(model, processor, "Is it red?", [picture(1)], prefix_cache=store)
    (name,) = digests(model, processor, 1)
    assert store.image(model, name) is not None


def test_threads_that_ask_about_the_same_pictures_get_their_own_answers(fastvlm):
    model, processor = fastvlm
    questions = [
        {"prompt": text, "images": [picture(seed)], "max_tokens": 4}
        for seed in (1, 2, 3)
        for text in ("Is it red?", "What is it?")
    ]
    want = [generate(model, processor, **ask) for ask in questions]
    for _ in range(3):
        store = PrefixCache()
        with ThreadPoolExecutor(4) as workers:
            answers = [
                workers.submit(generate, model, processor, **ask, prefix_cache=store)
                for ask in questions * 2
            ]
            assert [answer.result() for answer in answers] == want * 2


def test_a_rotating_cache_that_holds_the_prompt_takes_over_and_hands_on(ask_fastvlm):
    ask_fastvlm("Is it red?", picture(1), max_kv_size=200)
    second = ask_fastvlm("What is it?", picture(1), max_kv_size=200)
    assert second.reused > second.visual
    assert ask_fastvlm("Why is it?", picture(1)).reused >= second.reused


def test_a_rotating_cache_that_forgets_is_left_alone(ask_fastvlm):
    length = ask_fastvlm("Is it red?", picture(1)).length
    ask_fastvlm.store.clear()
    wrapped = ask_fastvlm("Is it red?", picture(1), max_kv_size=length + 2)
    assert ask_fastvlm("What is it?", picture(1)).reused == 0
    short = ask_fastvlm("Is it red?", picture(1), max_kv_size=length - 2)
    assert (wrapped.reused, short.reused) == (0, 0)
    assert short.encoded == 0  # features do not depend on the cache


def test_prefill_in_chunks(ask_fastvlm):
    ask_fastvlm("Is it red?", picture(1), prefill_step_size=7)
    assert ask_fastvlm("What is it, say?", picture(1), prefill_step_size=7).encoded == 0


def test_unknown_caches_are_bypassed(fastvlm, monkeypatch):
    class Other(KVCache):
        pass

    asker = Asker(*fastvlm, monkeypatch)
    model = fastvlm[0]
    monkeypatch.setattr(type(model), "make_cache", lambda this: [Other() for _ in range(layers)])
    layers = len(model.language_model.model.layers)
    asker("Is it red?", picture(1))
    assert asker("Is it red?", picture(1)).reused == 0


@pytest.mark.parametrize("kind", ["none", "memory", "disk"])
def test_nothing_waits_for_the_device_or_the_disk_before_the_first_token(
    fastvlm, kind, tmp_path, monkeypatch
):
    model, processor = fastvlm
    store = {"none": None, "memory": PrefixCache(), "disk": PrefixCache(disk=tmp_path)}[kind]
    waits, evaluate, settle = [], mx.eval, whole_file.settle
    stream = stream_generate(
        model, processor, "Are they red?", [picture(1), picture(2)], prefix_cache=store
    )
    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", lambda *x: (waits.append("device"), evaluate(*x))[1])
        patch.setattr(whole_file, "settle", lambda *x: (waits.append("disk"), settle(*x))[1])
        next(stream)
        assert waits == []
        next(stream)
        assert "disk" not in waits
    if store is not None:  # while the answer goes on others have the pictures
        images = [store.image(model, name) for name in digests(model, processor, 1, 2)]
        assert all(image is not None for image in images)
        assert store.nbytes == sum(image.nbytes for image in images)
    stream.close()
    if kind == "disk":
        assert len(list(tmp_path.iterdir())) == 3
        later = PrefixCache(disk=tmp_path)
        assert all(later.image(model, name) is not None for name in digests(model, processor, 1, 2))


def digests(model, processor, *seeds):
    return [digest(processor.preprocess(open_image(picture(s))), repr(model.config)) for s in seeds]


def test_an_abandoned_answer_leaves_its_prompt(fastvlm):
    model, processor = fastvlm
    store = PrefixCache()
    stream = stream_generate(model, processor, "Is it?", [picture(1)], prefix_cache=store)
    next(stream)
    assert store.nbytes < 10_000  # the image's features alone
    stream.close()
    (piece, *_) = stream_generate(model, processor, "Is it?", [picture(1)], prefix_cache=store)
    assert piece.reused_tokens == piece.prompt_tokens - 1


def test_memory_is_bounded_and_the_oldest_goes_first(fastvlm, monkeypatch):
    asker = Asker(*fastvlm, monkeypatch)
    asker("Is it red?", picture(1))
    one = asker.store.nbytes
    asker.store.max_bytes = 5 * one // 2  # room for two
    for seed in (2, 1, 3):
        asker("Is it red?", picture(seed))
        assert one < asker.store.nbytes <= 5 * one // 2
    assert asker("Is it red?", picture(1)).encoded == 0
    assert asker("Is it red?", picture(2)).encoded == 1
    asker.store.max_bytes = 0
    asker("Is it red?", picture(4))
    assert asker.store.nbytes == 0


def test_pictures_that_are_asked_about_again_stay_longest(fastvlm):
    store = PrefixCache()
    for seed in (1, 2, 1):
        list(stream_generate(*fastvlm, f"Is {seed} red?", [picture(seed)], max_tokens=1,
                             prefix_cache=store))  # fmt: skip
    names = [name for name in store._entries if isinstance(name, tuple)]
    model, processor = fastvlm
    pixels = processor("x", [picture(2), picture(1)]).pixels
    assert [name for _, name in names] == [digest(each, repr(model.config)) for each in pixels]


def test_a_continued_conversation_is_held_once(ask_fastvlm):
    ask_fastvlm("Is it red?", picture(1))
    one = ask_fastvlm.store.nbytes
    ask_fastvlm("Is it red?", picture(1))
    assert ask_fastvlm.store.nbytes == one


def test_models_do_not_share_and_are_not_kept_alive(fastvlm, native_folder):
    store = PrefixCache()
    model, processor = load(str(native_folder))
    list(stream_generate(model, processor, "Is it?", [picture(1)], prefix_cache=store))
    pieces = stream_generate(*fastvlm, "Is it?", [picture(1)], prefix_cache=store)
    assert next(iter(pieces)).reused_tokens == 0
    both = store.nbytes
    del model, processor
    gc.collect()
    list(stream_generate(*fastvlm, "What?", [picture(1)], prefix_cache=store))
    assert store.nbytes < 2 * both


def test_threads_share_a_cache(fastvlm):
    model, processor = fastvlm
    store = PrefixCache()

    def answer(question):
        pieces = stream_generate(
            model, processor, question, [picture(1)], prefix_cache=store, max_tokens=4
        )
        return [piece.token for piece in pieces]

    questions = ["Is it red?", "Is it blue?", "What is it?", "Why?"] * 3
    want = [answer(question) for question in questions]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, questions)) == want


def test_pixels_of_an_earlier_prompt_are_not_read_again(fastvlm):
    _, processor = fastvlm
    first = processor("Is it?", images=[picture(1)])
    second = processor("What?", images=first.pixels)
    assert second.pixels[0] is first.pixels[0]


def test_a_model_still_being_read_encodes_a_picture_once(native_folder, monkeypatch):
    model, processor = start_loading(str(native_folder), LoadOptions())
    asker = Asker(model, processor, monkeypatch)
    stream = stream_generate(
        model, processor, "Is it?", [picture(1)], prefix_cache=asker.store, max_tokens=1
    )
    assert next(stream).reused_tokens == 0
    assert asker.encoded == 1


def key_of(*parts):
    """Positions' keys of ids and of images, each (digest, tokens)."""
    ids, visual, digests, counts = [], [], [], []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
            continue
        digests.append(part[0] * 16)
        counts.append(part[1])
        visual += range(len(ids), len(ids) + part[1])
        ids += [9] * part[1]
    inputs = Inputs(np.array([ids], np.int32), np.array(visual, np.int32), [])
    return position_keys(inputs, digests, counts)


def test_keys_of_positions():
    one = key_of(1, (b"a", 2), 5, (b"b", 3), 6)
    assert one.shape == (8, 3)
    assert shared(one, one) == 8
    assert shared(one, key_of(1, (b"a", 2), 5, (b"b", 3), 7)) == 7
    assert shared(one, key_of(1, (b"a", 2), 5, (b"c", 3), 6)) == 4
    assert shared(one, key_of(1, (b"b", 2), 5, (b"b", 3), 6)) == 1
    assert shared(one, key_of(1, 9, 9, 5)) == 1  # ids alone are not a picture
    assert shared(one, key_of(2)) == 0
    assert shared(one, one[:0]) == 0


def test_the_digest_is_of_all_that_matters():
    data = picture(1)
    pixels = Pixels(data, (90, 70))
    rows, columns = Tiles(data[None], (1, 1), 1, 2), Tiles(data[None], (1, 1), 2, 1)
    changed = data.copy()
    changed[-1, -1, -1] ^= 1
    digests = [
        digest(pixels, "pad"),
        digest(pixels, "crop"),
        digest(replace(pixels, size=(91, 70)), "pad"),
        digest(replace(pixels, data=changed), "pad"),
        digest(replace(pixels, data=data.reshape(90, 70, 3)), "pad"),
        digest(rows, "pad"),
        digest(columns, "pad"),
    ]
    assert len(set(digests)) == len(digests)
    assert digest(Pixels(data.copy(), (90, 70)), "pad") == digests[0]


@pytest.mark.parametrize("fault", ["digest", "trim", "place"])
def test_a_planted_fault_is_caught(fastvlm, monkeypatch, fault):
    """A digest that does not look at the picture, one position too many, a picture's place lost."""
    if fault == "digest":
        monkeypatch.setattr(prefix, "digest", lambda pixels, settings: b"0" * 16)
    elif fault == "trim":
        right = prefix.shared
        monkeypatch.setattr(
            prefix, "shared", lambda one, other: min(right(one, other) + 1, len(one), len(other))
        )
    else:
        monkeypatch.setattr(
            prefix, "position_keys", lambda inputs, *_: np.repeat(inputs.input_ids.T, 3, 1)
        )
    asker = Asker(*fastvlm, monkeypatch)
    with pytest.raises(AssertionError):  # noqa: PT012
        asker("Is it red?", picture(1))
        asker("What is it?", picture(1))
        asker("What is it?", picture(2))
