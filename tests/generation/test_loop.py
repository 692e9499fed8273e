"""The generation loop, on a model that says what a script tells it to."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import cycle
from types import SimpleNamespace
from typing import get_type_hints

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_edge import Options, generate, stream_generate
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.generation.answer import Answer
from mlx_vlm_edge.generation.keywords import OptionKeywords
from mlx_vlm_edge.generation.loop import make_cache
from mlx_vlm_edge.language.cache import KVCache, RotatingKVCache
from mlx_vlm_edge.picture.image import Pixels
from mlx_vlm_edge.text.prompt import Inputs
from mlx_vlm_edge.text.tokenizer import Tokenizer
from mlx_vlm_edge.timings import Timer

from ..reference import tokenizer as tiny

WIDTH = 64


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save(folder)
    return Tokenizer.from_folder(folder)


class Scripted:
    """Gives the logits that make greedy sampling say `script`, and counts its steps.

    Its cache is fed as a real model's would be, one position per token.
    """

    unread = openings = None

    def __init__(self, script, context=100, near=None):
        self.script, self.near = list(script), near or {}
        self.config = SimpleNamespace(context=context)
        config = SimpleNamespace(head_dim=WIDTH)
        self.language_model = SimpleNamespace(config=config, splits=lambda length: True)
        self.steps, self.told, self.cache, self.cached = 0, [], None, []

    def make_cache(self):
        return [KVCache()]

    def logits(self):
        row = np.zeros(tiny.VOCAB, np.float32)
        row[self.script[self.steps]] = 10
        for token, value in self.near.items():
            row[token] = value
        self.steps += 1
        return mx.array(row)[None]

    def feed(self, cache, length):
        self.cache = cache
        self.cached.append((type(cache[0]).__name__, cache[0].offset))
        keys = mx.ones((1, 1, length, WIDTH))
        cache[0].update_and_fetch(keys, keys)

    def encode(self, images):
        yield from ()
        return []

    def prefilling(self, inputs, cache, step_size):
        self.feed(cache, inputs.input_ids.shape[1])
        yield "prefill", None
        return self.logits()

    def step(self, token, cache):
        self.told.append(int(token.item()))
        self.feed(cache, 1)
        return self.logits()


@dataclass
class Prepared:
    """A processor whose prompt is ready: `length` ids, of which `visual` are visual tokens."""

    tokenizer: Tokenizer
    length: int = 10
    visual: int = 4
    eos_ids: frozenset = frozenset({tiny.STOP, tiny.END})
    rows: int = tiny.VOCAB

    def steps(self, prompt, images, *, raw=False, budget=None):
        self.asked = prompt, list(images), raw
        yield from ()
        ids = np.arange(self.length, dtype=np.int32)[None]
        return Inputs(
            input_ids=ids, visual=np.arange(2, 2 + self.visual, dtype=np.int32), pixels=[]
        )


@pytest.fixture
def run(tokenizer):
    """Stream a text (or ids) that the model is told to say; returns (pieces, model)."""

    def go(script, length=10, context=100, near=None, **options):
        ids = tokenizer.encode(script) if isinstance(script, str) else list(script)
        model = Scripted([*ids, tiny.STOP, *[65] * 100], context, near)
        prepared = Prepared(tokenizer, length)
        return list(stream_generate(model, prepared, "Hi", **options)), model

    return go


def text(pieces):
    return "".join(piece.text for piece in pieces)


def test_the_answer_streams_and_ends_at_the_stop_token(run):
    pieces, _ = run("This is a thing.")
    assert text(pieces) == "This is a thing."
    assert len([p for p in pieces if p.text]) > 5
    assert [p.finish_reason for p in pieces][-1] == "stop"
    assert all(p.finish_reason is None for p in pieces[:-1])
    assert tiny.STOP not in [p.token for p in pieces if p.text]


def test_counts(run):
    last = run("abc")[0][-1]
    assert (last.prompt_tokens, last.visual_tokens) == (10, 4)
    assert last.generation_tokens == 4  # three letters and the stop token
    assert last.ttft_e2e > 0
    assert last.peak_memory >= 0


def test_max_tokens(run):
    pieces, model = run("abcdefgh", max_tokens=3)
    assert text(pieces) == "abc"
    assert pieces[-1].finish_reason == "length"
    assert pieces[-1].generation_tokens == 3
    assert model.steps == 3, "nothing is computed beyond the last token"


def test_every_token_is_told_to_the_model_once_and_in_order(run, tokenizer):
    _, model = run("abcdef", max_tokens=6)
    assert model.told == tokenizer.encode("abcdef")[:5]
    assert model.cache[0].offset == 10 + 5


@pytest.mark.parametrize("word", ["naïve", "日本語", "a 🙂 b", "👩‍👩‍👧"])
def test_no_half_characters(run, word):
    pieces, _ = run(word)
    assert text(pieces) == word
    assert "�" not in text(pieces)
    assert all("�" not in p.text for p in pieces)


def test_a_character_cut_off_by_the_limit_is_not_lost_silently(run):
    pieces, _ = run("ab日", max_tokens=3)
    assert text(pieces).startswith("ab")
    assert pieces[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("stop", "want"),
    [(["hing"], "This is a t"), ([" is", "x"], "This"), (["T"], ""), (["zzz"], "This is a thing.")],
)
def test_stop_strings(run, stop, want):
    pieces, _ = run("This is a thing.", stop=stop)
    assert text(pieces) == want
    assert pieces[-1].finish_reason == "stop"


def test_special_tokens_of_an_answer_may_be_shown_and_stopped_at(run, tokenizer):
    """Docling's models answer in them: case 05 of the replayed reports."""
    script = [*tokenizer.encode("a"), tiny.IMAGE, *tokenizer.encode("b"), tiny.STOP]
    assert text(run(script)[0]) == "ab"
    shown = run(script, skip_special_tokens=False)[0]
    assert text(shown) == "a<image>b"
    for skip in (True, False):
        pieces, _ = run(script, stop=["<image>"], skip_special_tokens=skip)
        assert text(pieces) == "a"
        assert pieces[-1].finish_reason == "stop"
        assert pieces[-1].generation_tokens == 2
    assert text(run(script, stop=["e>b"], skip_special_tokens=False)[0]) == "a<imag"


def test_text_held_back_for_a_stop_string_comes_out_at_the_end(run):
    pieces, _ = run("one two", stop=["two three"], max_tokens=100)
    assert text(pieces) == "one two"


def test_generate_gives_the_string_or_the_whole_result(tokenizer):
    script = [*tokenizer.encode("Yes."), tiny.STOP, 1]
    assert generate(Scripted(script), Prepared(tokenizer), "Hi") == "Yes."
    result = generate(Scripted(script), Prepared(tokenizer), "Hi", full=True)
    assert (result.text, result.finish_reason) == ("Yes.", "stop")


@pytest.mark.parametrize("given", [{"images": ["a.png"]}, {"image": "a.png"}, {"image": ["a.png"]}])
def test_image_and_images_are_the_same(tokenizer, given):
    prepared = Prepared(tokenizer)
    generate(Scripted([tiny.STOP, 1]), prepared, "Hi", **given)
    assert prepared.asked == ("Hi", ["a.png"], False)


def test_a_single_image_may_be_given_as_images(tokenizer):
    prepared = Prepared(tokenizer)
    generate(Scripted([tiny.STOP, 1]), prepared, "Hi", "a.png", raw=True)
    assert prepared.asked == ("Hi", ["a.png"], True)


def test_a_prompt_longer_than_the_context_is_refused_before_anything_runs(run):
    with pytest.raises(UsageError, match=r"120 positions \(4 of them visual\), 21 more"):
        run("abc", length=120, context=100)


def test_generation_ends_with_the_context(run):
    pieces, model = run([65] * 50, length=90, context=100)
    assert pieces[-1].finish_reason == "length"
    assert pieces[-1].generation_tokens == 10
    assert model.cache[0].offset <= 100


def test_abandoning_the_stream_stops_the_model(tokenizer):
    model = Scripted([65] * 90, context=1000)
    stream = stream_generate(model, Prepared(tokenizer), "Hi", max_tokens=80)
    next(stream)
    stream.close()
    assert model.steps <= 2


def test_the_next_token_is_under_way_while_one_is_shown(tokenizer):
    model = Scripted([65] * 90, context=1000)
    stream = stream_generate(model, Prepared(tokenizer), "Hi", max_tokens=80)
    next(stream)
    assert model.steps == 2


def test_seeds(run):
    near = {66: 9.5, 67: 9.5, 68: 9.5}
    options = {"near": near, "temperature": 2.0, "max_tokens": 30}
    first, again, other = (
        [p.token for p in run([65] * 60, seed=seed, **options)[0]] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_temperature_zero_ignores_the_seed(run):
    assert text(run("abc", seed=1)[0]) == text(run("abc", seed=2)[0]) == "abc"


def test_repetition_penalty_sees_the_prompt_and_what_was_said(run):
    """65 wins until it was said; 66 is next; 5 would win but stands in the prompt."""
    pieces, _ = run([65] * 20, near={66: 9.0, 5: 9.5}, repetition_penalty=2.0, max_tokens=2)
    assert [p.token for p in pieces][:2] == [65, 66]


def test_a_repetition_penalty_costs_the_same_for_every_token(run, monkeypatch):
    joined = []
    concatenate = mx.concatenate
    monkeypatch.setattr(
        mx,
        "concatenate",
        lambda arrays, *rest, **more: (
            joined.append(sum(array.shape[0] for array in arrays))
            or concatenate(arrays, *rest, **more)
        ),
    )
    run([65] * 60, repetition_penalty=1.1, repetition_context_size=5, max_tokens=40)
    assert joined == [6] * 39


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3}, {"logprobs": 2}])
def test_pieces_may_be_taken_by_different_threads(run, tokenizer, options):
    """As a web server does with a generator."""
    near = {66: 9.5, 67: 9.5, 68: 9.5}
    options = {"max_tokens": 12, "repetition_penalty": 1.1, **options}
    want = [piece.token for piece in run([65] * 60, near=near, **options)[0]]
    model = Scripted([65] * 60, near=near)
    stream = stream_generate(model, Prepared(tokenizer), "Hi", **options)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        pieces = [pool.submit(next, stream).result() for pool, _ in zip(cycle((one, two)), want)]
    assert [piece.token for piece in pieces] == want


def test_the_figures_of_an_answer(tokenizer, monkeypatch):
    """Ten tokens in 2 s to the first one, then two more in 1 s; pictures of 40 x 30."""
    now = [10.0]
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 2_500_000_000)
    shapes = (30, 40, 3), (2, 30, 40, 3)  # the second in tiles
    pixels = [Pixels(np.zeros(shape, np.uint8), (80, 60)) for shape in shapes]
    inputs = Inputs(np.zeros((1, 10), np.int32), np.arange(2, 6, dtype=np.int32), pixels)
    answer = Answer(Prepared(tokenizer), inputs, (), Timer(clock=lambda: now[0]), 8.0, reused=3)
    first = answer.add(65)
    now[0] = 11.0
    answer.add(66)
    last = answer.add(67)
    for piece in (first, last):
        assert (piece.ttft_e2e, piece.prompt_tps) == (2.0, 5.0)
        assert (piece.prompt_tokens, piece.visual_tokens, piece.reused_tokens) == (10, 4, 3)
        assert piece.peak_memory == 2.5
        assert piece.picture_sizes == ((40, 30), (40, 30))
    assert (first.generation_tokens, first.generation_tps) == (1, 0.0)
    assert (last.generation_tokens, last.generation_tps) == (3, 2.0)


def test_stages_are_measured_only_when_asked_for(run):
    assert run("abc")[0][-1].stages is None
    assert "first sample" in run("abc", verbose=True)[0][-1].stages


def test_a_rotating_cache_keeps_the_visual_tokens(run):
    _, model = run([65] * 40, max_kv_size=16, max_tokens=40)
    cache = model.cache[0]
    assert isinstance(cache, RotatingKVCache)
    assert cache.keep == 6  # two ids, then four visual tokens
    assert cache.keys.shape[2] == 16


def test_a_rotating_cache_keeps_four_positions_of_a_text_as_mlx_lm():
    inputs = Inputs(np.zeros((1, 10), np.int32), np.array([], np.int32), [])
    (cache,) = make_cache(Scripted([]), inputs, Options(max_kv_size=16))
    assert cache.keep == 4


def test_a_rotating_cache_too_small_for_the_visual_tokens_is_refused(run):
    with pytest.raises(UsageError, match="max-kv-size 5"):
        run("abc", max_kv_size=5)


def test_a_quantised_cache(run):
    _, model = run("abcdef", kv_bits=8, quantized_kv_start=12)
    assert type(model.cache[0]).__name__ == "QuantizedKVCache"
    assert type(run("abc", kv_bits=8, quantized_kv_start=50)[1].cache[0]) is KVCache


def test_a_cache_is_quantised_once_it_holds_the_start(run):
    """As in mlx-lm: after the pass that fills it so far, the start itself included."""
    _, model = run("abcdef", kv_bits=8, quantized_kv_start=12)
    assert model.cached[:3] == [("KVCache", 0), ("KVCache", 10), ("KVCache", 11)]
    assert {kind for kind, _ in model.cached[3:]} == {"QuantizedKVCache"}
    assert Options().quantized_kv_start == 5000


@pytest.mark.parametrize(
    ("width", "remedy"), [(80, "leave --kv-bits out"), (96, "set --kv-group-size to 32")]
)
def test_heads_that_groups_do_not_divide_are_refused_before_anything_runs(tokenizer, width, remedy):
    model = Scripted([tiny.STOP, 1])
    model.language_model.config.head_dim = width
    with pytest.raises(UsageError, match=f"heads of {width} values.* groups of 64: .*{remedy}"):
        generate(model, Prepared(tokenizer), "Hi", kv_bits=4, quantized_kv_start=0)
    assert model.steps == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -1.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("max_tokens", 0),
        ("prefill_step_size", 0),
        ("kv_bits", 7),
    ],
)
def test_values_out_of_range_are_refused(run, option, value):
    with pytest.raises(UsageError, match=option.split("_")[0]):
        run("abc", **{option: value})


def test_keywords_are_the_fields_of_the_options():
    assert get_type_hints(OptionKeywords).keys() == {field.name for field in fields(Options)}


def test_an_empty_stop_text_is_told_with_the_options():
    with pytest.raises(UsageError, match="stop string must not be empty"):
        Options(stop=["a", ""])


def test_an_unknown_option_is_a_programmer_s_mistake(run):
    with pytest.raises(TypeError, match="temprature"):
        run("abc", temprature=1.0)


def test_a_stop_string_in_the_bytes_of_the_last_token_is_a_stop(tokenizer):
    """Half a character is text once no more comes."""
    from mlx_vlm_edge.generation.answer import Answer
    from mlx_vlm_edge.timings import Timer

    half = tokenizer.encode("é")[0]
    for end in (None, tiny.STOP, tiny.TURN):
        stop = ["a\ufffd", "<|im_start|>"]
        inputs = Inputs(np.zeros((1, 3), np.int32), np.zeros(0, np.int32), [])
        answer = Answer(Prepared(tokenizer), inputs, stop, Timer(), 0.0)
        said = [answer.add(token) for token in (*tokenizer.encode("xa"), half)]
        said.append(answer.cut() if end is None else answer.add(end))
        assert text(said) == "x"
        assert (said[-1].finish_reason, said[-1].stop_text) == ("stop", "a\ufffd")
