"""Drafts from what was said before: the same answers in fewer passes, or no drafts at all."""

from dataclasses import make_dataclass
from types import MappingProxyType, SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_vlm_edge import Options, PrefixCache, generate, load, stream_generate
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.generation import drafting
from mlx_vlm_edge.generation.batch import Run
from mlx_vlm_edge.generation.drafting import PromptLookup, room
from mlx_vlm_edge.generation.engine import Engine, pieces
from mlx_vlm_edge.language.cache import KVCache, QuantizingCaches
from mlx_vlm_edge.language.mixture import Mixture, MixtureConfig
from mlx_vlm_edge.language.rows import RowCaches
from mlx_vlm_edge.loading.load import LoadOptions
from mlx_vlm_edge.text.prompt import Inputs

from ..demo import IMAGES
from ..reference import tokenizer as tiny
from .test_loop import Prepared, tokenizer  # noqa: F401  (a fixture)

FREE = MappingProxyType({2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0})  # a GPU's passes, about
DEAR = {}  # passes that cost as many plain steps as they have positions
LINE = [65, 66, 67, 68, 69, 70]  # what a document repeats


def lookup(words, visual=(), ends=(), costs=FREE):
    ids = np.array([words], np.int32)
    inputs = Inputs(ids, np.array(visual, np.int32), [])
    drafts = PromptLookup(inputs, frozenset(ends), lambda: costs)
    drafts._right = 0.9  # believes in them
    return drafts


def test_a_draft_is_what_followed_the_last_time():
    drafts = lookup([1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 1, 2, 3])
    assert drafts.propose(3) == [6, 7, 8]
    assert drafts.propose(2) == [6, 7]


def test_nothing_is_drafted_of_what_is_new_or_stood_together_less_long():
    assert lookup([1, 2, 3, 4, 5, 6]).propose(4) == []
    assert lookup([9, 2, 3, 4, 8, 2, 3]).propose(4) == []


def test_what_repeats_goes_on_in_the_draft_itself():
    assert lookup([1, 2, 1, 2, 1]).propose(8) == [2, 1, 2, 1, 2, 1, 2, 1]


def test_visual_tokens_are_no_words():
    assert lookup([7, 7, 7, 7, 7, 1], visual=[0, 1, 2, 3, 4]).propose(4) == []
    words = [1, 2, 3, 4, 9, 9, 1, 2, 3]
    assert lookup(words, visual=[4, 5]).propose(4) == [4]
    assert lookup(words).propose(4) == [4, 9, 9, 1]


def test_a_draft_stops_before_what_ends_an_answer():
    assert lookup([1, 2, 3, 4, 5, 6, 1, 2, 3], ends=[5]).propose(4) == [4]


def test_a_draft_may_follow_the_token_under_way_once_the_first_is_out():
    drafts = lookup([1, 2, 3, 4, 9, 1])
    assert not drafts.likely()
    drafts.said(2)
    assert drafts.likely(), "1 2 may be followed by 3"
    drafts.said(8)
    assert not drafts.likely()


def test_what_passes_cost_is_not_asked_before_the_first_token():
    asked = []
    drafts = PromptLookup(
        Inputs(np.array([LINE * 2], np.int32), np.array([], np.int32), []), frozenset(),
        lambda: asked.append(1) or FREE,
    )  # fmt: skip
    drafts.likely()
    assert not asked
    drafts.said(LINE[0])
    drafts.said(LINE[1])
    assert drafts.likely()
    assert asked


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 3)), st.floats(1, 3), st.floats(0.01, 1))
def test_drafts_that_are_wrong_cost_little(outcomes, base, each):
    """Whatever comes true, by the costs that are known an answer loses less than 3 % and a step."""
    costs = {size: base + each * size for size in drafting.LENGTHS}
    drafts = lookup(LINE * 3, costs=costs)
    lost = said = 0
    for right in outcomes * 20:
        drafts.said(LINE[0])
        said += 1
        draft = drafts.propose(16) if drafts._length(16) else []
        right = min(right, len(draft))
        if draft:
            lost += next(c for size, c in costs.items() if size >= len(draft)) - 1 - right
        drafts.verified(draft, right)
        said += right
        assert lost <= 0.5 + 0.03 * said


def test_passes_that_cannot_pay_are_not_made():
    assert lookup(LINE * 3, costs=DEAR).propose(8) == []
    assert lookup(LINE * 3, costs={2: 3.0}).propose(8) == []


class Reader:
    """Says `script` whatever it hears, and keeps what it heard as the keys of its cache.

    Every position's logits go by its place alone, as if the model looked at nothing else.
    """

    unread, identity = None, None

    def __init__(self, prompt, script, costs=FREE):
        self.prompt, self.script, self.pass_costs = prompt, script, costs
        self.config = SimpleNamespace(context=1000)
        config = SimpleNamespace(head_dim=64)
        self.language_model = SimpleNamespace(config=config, splits=lambda length: True)
        self.passes, self.cache = [], None

    def make_cache(self):
        return [KVCache()]

    def encode(self, images):
        yield from ()
        return []

    def _heard(self, tokens, cache):
        self.cache = cache
        first = cache[0].offset + 1 - len(self.prompt)
        keys = tokens[:, None, :, None].astype(mx.float32)
        cache[0].update_and_fetch(keys, keys)
        rows = np.zeros((tokens.shape[1], tiny.VOCAB), np.float32)
        for index, row in enumerate(rows):
            row[self.script[min(first + index, len(self.script) - 1)]] = 9
            row[LINE] += 4
        return mx.array(rows)[None]

    def prefilling(self, inputs, cache, step_size):
        yield "prefill", None
        return self._heard(mx.array(inputs.input_ids), cache)[:, -1]

    def step(self, token, cache):
        one = [layer.rows[0] if isinstance(layer, RowCaches) else layer for layer in cache]
        return self.follow(token[:, None], one)[:, -1]

    def follow(self, tokens, cache):
        self.passes.append(tokens.shape[1])
        return self._heard(tokens, cache)


def script(*parts, more=200):
    flat = [token for part in parts for token in (part if isinstance(part, list) else [part])]
    return [*flat, tiny.STOP, *[65] * more]


@pytest.fixture
def read(tokenizer):  # noqa: F811
    """The pieces of a Reader's answer to a prompt, and the Reader."""

    def go(prompt, said, costs=FREE, **options):
        model = Reader(prompt, said, costs)
        prepared = Prepared(tokenizer, len(prompt), 0)
        ids = np.array([prompt], np.int32)

        def steps(*_, **__):
            yield from ()
            return Inputs(ids, np.array([], np.int32), [])

        prepared.steps = steps
        return list(stream_generate(model, prepared, "Hi", **options)), model

    return go


def tokens(answer):
    return [piece.token for piece in answer if piece.token is not None]


REPEATING = script(LINE * 6)
CHANGING = script(LINE * 2, 71, LINE, 72, 73, LINE * 2, [66, 65], LINE)


@pytest.mark.parametrize("said", [REPEATING, CHANGING, script(list(range(74, 120)))])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"max_tokens": 1}, {"max_tokens": 2}, {"max_tokens": 3}, {"max_tokens": 17},
        {"stop": "DEF"}, {"logprobs": 2}, {"repetition_penalty": 1.4}, {"frequency_penalty": 1.0},
        {"temperature": 1.5, "seed": 3}, {"temperature": 2.0, "top_p": 0.9, "seed": 4},
    ],
    ids=str,
)  # fmt: skip
def test_answers_are_the_same_with_drafts(read, said, options):
    want, plain = read(LINE, said, **options)
    got, drafted = read(LINE, said, draft="prompt-lookup", **options)
    for name in ("token", "text", "finish_reason", "logprobs", "generation_tokens", "stop_text"):
        assert [getattr(p, name) for p in got] == [getattr(p, name) for p in want], name
    assert len(drafted.passes) <= len(plain.passes)


def test_what_repeats_takes_few_passes(read):
    got, model = read(LINE, REPEATING, draft="prompt-lookup")
    assert len(tokens(got)) == 37
    assert len(model.passes) < 37 / 2.5
    last = got[-1]
    assert last.accepted_tokens <= last.drafted_tokens == sum(model.passes) - len(model.passes)
    assert last.accepted_tokens >= 37 - 1 - len(model.passes) - 1


def test_nothing_is_drafted_where_nothing_repeats(read):
    got, model = read(LINE, script(list(range(74, 120))), draft="prompt-lookup")
    assert set(model.passes) == {1}
    assert got[-1].drafted_tokens == 0


def test_wrong_drafts_end(read):
    """Each LINE is followed by another token than the last time."""
    said = script(*[[*LINE[:3], 75 + n] for n in range(40)])
    got, model = read(LINE, said, costs={2: 1.6, 4: 2.0}, draft="prompt-lookup")
    assert tokens(got) == said[: len(tokens(got))]
    assert sum(length > 1 for length in model.passes) <= 8


@pytest.mark.parametrize("most", [5, 9, 20, 33])
def test_the_cache_holds_what_was_said_and_no_wrong_draft(read, most):
    got, model = read(LINE, CHANGING, draft="prompt-lookup", max_tokens=most)
    keys = model.cache[0].keys[0, 0, : model.cache[0].offset, 0]
    assert keys.tolist() == [*LINE, *tokens(got)[:-1]]


def test_a_stream_that_is_abandoned_is_remembered_as_far_as_it_was_heard(
    tokenizer,  # noqa: F811
    monkeypatch,
):
    """The prefix cache's keys are the tokens that its arrays were computed from."""
    said = CHANGING
    for taken in range(1, 30):
        model, store, entries = Reader(LINE, said), PrefixCache(), []
        prepared = Prepared(tokenizer, len(LINE), 0)
        monkeypatch.setattr(store, "keep", lambda _, *entry, to=entries: to.append(entry))

        def steps(*_, **__):
            yield from ()
            return Inputs(np.array([LINE], np.int32), np.array([], np.int32), [])

        prepared.steps = steps
        stream = stream_generate(model, prepared, "Hi", draft="prompt-lookup", prefix_cache=store)
        for _ in range(taken):
            next(stream)
        stream.close()
        ((keys, layers, _),) = entries
        assert layers[0][0][0, 0, : len(keys), 0].tolist() == keys[:, 0].tolist(), taken


@pytest.mark.parametrize("beyond", [0, 1, 6, 300])
def test_caches_are_quantised_where_they_are_without_drafts(demo, beyond):
    question = "red red red red red red red red"
    start = generate(*demo, question, full=True, max_tokens=1).prompt_tokens + beyond
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": start, "max_tokens": 40}
    want = generate(*demo, question, full=True, **options)
    got = generate(*demo, question, full=True, draft="prompt-lookup", **options)
    assert (got.text, got.finish_reason) == (want.text, want.finish_reason)


@pytest.mark.parametrize("through", ["generate", "engine"])
@pytest.mark.parametrize("beyond", [2, 7, 12, 23])
def test_a_cache_has_as_many_positions_when_it_is_quantised_as_without_drafts(
    read,
    tokenizer,  # noqa: F811
    monkeypatch,
    through,
    beyond,
):
    held, start = [], len(LINE) + beyond
    monkeypatch.setattr(
        KVCache, "to_quantized", lambda layer, *_: (held.append(layer.offset), layer)[1]
    )
    options = {"kv_bits": 8, "quantized_kv_start": start, "draft": "prompt-lookup"}
    if through == "generate":
        read(LINE, REPEATING, **options)
    else:
        model, prepared = Reader(LINE, REPEATING), Prepared(tokenizer, len(LINE), 0)
        inputs = Inputs(np.array([LINE], np.int32), np.array([], np.int32), [])
        engine = Engine(model, prepared)
        try:
            list(pieces(lambda deliver: engine.submit(inputs, Options(**options), deliver), 60))
        finally:
            engine.close()
    assert held[0] == start


def test_no_pass_goes_beyond_where_a_cache_is_quantised():
    caches = QuantizingCaches([KVCache()], 8, 32, 12)
    caches[0].offset = 5
    assert room(caches) == 7
    caches[0].offset = 12
    assert room(caches) == 1
    assert room([KVCache()]) > 1000


@pytest.fixture(scope="module")
def demo():
    model, processor = load("demo")
    model.pass_costs = FREE
    return model, processor


QUESTIONS = [
    ("What is in the picture?", "shapes.png"),
    ("Describe the picture. Describe the picture. Describe the picture.", "shapes.png"),
]


@pytest.mark.parametrize(("question", "image"), QUESTIONS)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "seed": 5, "min_p": 0.05}, {"presence_penalty": 0.7}],
    ids=str,
)  # fmt: skip
def test_the_demo_model_answers_the_same(demo, question, image, options):
    images = [IMAGES / image]
    want = [p.token for p in stream_generate(*demo, question, images, max_tokens=60, **options)]
    drafted = stream_generate(
        *demo, question, images, max_tokens=60, draft="prompt-lookup", **options
    )
    assert [p.token for p in drafted] == want


def test_answers_that_follow_a_schema_or_choices_are_the_same(demo):
    schema = {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 6, "maxItems": 6}
    for options in ({"schema": schema, "max_tokens": 60}, {"choices": ["red", "green"]}):
        want = generate(*demo, "What colour?", [IMAGES / "shapes.png"], full=True, **options)
        got = generate(
            *demo, "What colour?", [IMAGES / "shapes.png"], full=True, draft="prompt-lookup",
            **options,
        )  # fmt: skip
        assert got.text == want.text
        assert got.finish_reason == want.finish_reason


def test_the_engine_drafts_for_a_prompt_that_is_alone(demo):
    model, processor = demo
    inputs = processor("Describe. Describe. Describe.", [IMAGES / "shapes.png"])
    plain = Options(max_tokens=50, stop=["\n\n\n"])
    engine = Engine(model, processor)
    try:
        answers = []
        for options in (plain, Options(max_tokens=50, stop=["\n\n\n"], draft="prompt-lookup")):
            submit = lambda deliver, o=options: engine.submit(inputs, o, deliver)  # noqa: E731
            answers.append(list(pieces(submit, 60)))
        assert tokens(answers[0]) == tokens(answers[1])
        tickets = [list(pieces(submit, 60)) for _ in range(2)]
        assert tokens(tickets[0]) == tokens(answers[0])
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "eagle"}, "draft must be 'prompt-lookup'"),
        ({"draft": "prompt-lookup", "max_kv_size": 100}, "max_kv_size or draft"),
    ],
)
def test_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Options(**options)


def test_a_batch_goes_on_with_drafts_or_without():
    ids = {Run("m", ["Q"], None, Options(draft=draft)).id for draft in (None, "prompt-lookup")}
    assert len(ids) == 1


@pytest.mark.parametrize("options", [Options, LoadOptions])
def test_a_batch_goes_on_where_a_version_has_more_options(options):
    newer = make_dataclass("Newer", [("more", int, 0)], bases=(options,), frozen=True)

    def id_of(options):
        both = (options, None) if isinstance(options, Options) else (Options(), options)
        return Run("m", ["Q"], None, *both).id

    assert id_of(newer()) == id_of(options())
    assert id_of(newer(more=1)) != id_of(options())
    assert id_of(options(visual_tokens=2)) != id_of(options())


def test_no_draft_is_so_long_that_an_expert_may_drop_one(demo, monkeypatch):
    """A plain step drops nothing: capacities of 6 positions leave drafts of 2 and 4."""
    monkeypatch.setattr(drafting.time, "perf_counter", iter(range(1000)).__next__)
    config = MixtureConfig((8,), eval_capacity_factor=0.1, min_capacity=6)
    language = demo[0].language_model
    layer = language.model.layers[-1]
    monkeypatch.setattr(layer, "mlp", Mixture(config, 64, [layer.mlp] * 8))
    assert drafting._measured(demo[0]).keys() == {2, 4}


def test_a_longer_pass_never_counts_as_free_or_cheaper(demo, monkeypatch):
    """A busy machine's clock may say so; wrong drafts would then go on for ever."""
    lasts = iter([1.0, *[1.0, 2.0] * 3, *[1.0, 1.5] * 3, *[1.0, 0.5] * 6])  # seconds of each pass
    ends = (t for last in lasts for t in (0.0, last))
    monkeypatch.setattr(drafting.time, "perf_counter", lambda: next(ends))
    assert drafting._measured(demo[0]) == {2: 2.0, 4: 2.0, 8: 2.0, 16: 2.0}
    monkeypatch.setattr(drafting.time, "perf_counter", iter(range(1000)).__next__)
    assert drafting._measured(demo[0]) == pytest.approx({2: 1.1, 4: 1.2, 8: 1.4, 16: 1.8})


def test_costs_are_measured_on_the_model_once(demo, monkeypatch):
    model, _ = demo
    model.pass_costs = None
    costs = drafting.pass_costs(model)
    assert all(1 <= cost < size + 1 for size, cost in costs.items())
    monkeypatch.setattr(drafting, "_measured", None)
    assert drafting.pass_costs(model) is costs
    model.pass_costs = FREE
