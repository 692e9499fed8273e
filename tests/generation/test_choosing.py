"""Tokens chosen one after the other: penalties, grammars and log-probabilities."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_edge import generate, load, stream_generate
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.generation.choosing import TokenSampler
from mlx_vlm_edge.generation.grammar import Grammar, Matcher
from mlx_vlm_edge.generation.sampling import Sampling, penalize_counted

from ..demo import IMAGES

LOGITS = [[2.0, 1.9, 1.8, 0.0]]
SHAPES = IMAGES / "shapes.png"
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["colour", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def demo():
    return load("demo")


def chosen(sampling, count, prompt=(3,)):
    sample = TokenSampler(sampling, mx.array(prompt))
    return [sample(mx.array(LOGITS)).item() for _ in range(count)]


def test_greedy_without_anything_else():
    assert chosen(Sampling(), 3) == [0, 0, 0]


def test_rows_that_are_no_tokens_are_not_chosen():
    sample = TokenSampler(Sampling(repetition_penalty=1.5), mx.array([1]), logprobs=4, rows=3)
    logits = mx.array([[1.0, 0.9, 0.8, 9.0]])
    assert [sample(logits).item() for _ in range(3)] == [0, 2, 0]
    told = sample.told()
    assert [id for id, _ in told.top] == [0, 1, 2]
    assert told.logprob < -8  # by the model, whatever may be chosen


def test_a_repetition_penalty_looks_at_the_last_tokens_of_prompt_and_answer():
    assert chosen(Sampling(repetition_penalty=2.0, repetition_context_size=2), 5, (1, 0)) == [
        2, 1, 0, 2, 1,
    ]  # fmt: skip


def test_presence_and_frequency_count_the_answer_s_own_tokens():
    assert chosen(Sampling(presence_penalty=0.5), 4) == [0, 1, 2, 0]
    assert chosen(Sampling(frequency_penalty=0.15), 5) == [0, 1, 0, 2, 1]
    got = penalize_counted(mx.array([0.0, 1, 3, 0]), mx.array(LOGITS), 0.5, 0.25)
    assert np.allclose(np.array(got), [[2.0, 1.15, 0.55, 0.0]])


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_penalties_have_limits(name):
    with pytest.raises(UsageError, match=name):
        Sampling(**{name: 2.5})


def test_log_probabilities_are_the_model_s(demo):
    model, processor = demo
    pieces = list(stream_generate(
        model, processor, "Describe the image.", [SHAPES], logprobs=3, max_tokens=4,
        repetition_penalty=1.3,
    ))  # fmt: skip
    inputs = processor("Describe the image.", [SHAPES])
    logits = model(inputs)[0, -1].astype(mx.float32)
    every = np.array(logits - mx.logsumexp(logits))
    told = pieces[0].logprobs
    assert told.logprob == pytest.approx(every[pieces[0].token], abs=1e-4)
    assert [id for id, _ in told.top] == np.argsort(-every)[:3].tolist()
    assert [value for _, value in told.top] == pytest.approx(np.sort(every)[::-1][:3], abs=1e-4)
    assert all(len(piece.logprobs.top) == 3 for piece in pieces if piece.token is not None)


def test_nothing_is_told_unless_asked_for(demo):
    pieces = list(stream_generate(*demo, "Describe the image.", [SHAPES], max_tokens=2))
    assert all(piece.logprobs is None for piece in pieces)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_an_answer_follows_its_schema(demo, temperature):
    options = {"schema": SCHEMA, "temperature": temperature, "seed": 1, "max_tokens": 200}
    answer = json.loads(generate(*demo, "Describe the image.", [SHAPES], **options))
    assert answer["colour"] in ("red", "blue")
    assert isinstance(answer["count"], int)


def test_a_schema_that_is_not_finished_ends_with_length(demo):
    answer = generate(
        *demo, "Describe the image.", [SHAPES], schema=json.dumps(SCHEMA), max_tokens=3, full=True
    )
    assert answer.finish_reason == "length"


def test_an_answer_is_one_of_the_choices(demo):
    choices = ["yellow triangle", "seven", "red"]
    for seed in range(4):
        answer = generate(
            *demo, "What colour?", [SHAPES], choices=choices, temperature=2.0, seed=seed
        )
        assert answer in choices


@pytest.mark.parametrize(("options", "said"), [
    ({"schema": "{"}, "not valid JSON"), ({"schema": [1]}, "must be an object"),
    ({"schema": {"type": "nope"}}, "cannot be enforced"),
    ({"schema": {"$ref": "#/nowhere"}}, "cannot be enforced"),
    ({"choices": []}, "choices"), ({"choices": [""]}, "choices"), ({"choices": "red"}, "choices"),
    ({"schema": {}, "choices": ["a"]}, "set one of them"), ({"logprobs": 21}, "logprobs"),
])  # fmt: skip
def test_what_cannot_be_followed_is_refused_before_anything_runs(options, said):
    with pytest.raises(UsageError, match=said) as error:
        generate(None, None, "x", **options)
    assert "\n" not in str(error.value)


def test_a_tokenizer_is_prepared_once_for_all_answers(demo, monkeypatch):
    import llguidance

    model, processor = demo
    made = []
    real = llguidance.LLTokenizer
    monkeypatch.setattr(
        llguidance, "LLTokenizer", lambda *a, **k: (made.append(1), real(*a, **k))[1]
    )
    size = model.language_model.config.vocab_size
    for _ in range(3):
        Matcher(Grammar.choices(["a"]), processor.tokenizer, [1, 2, 3], size)
    assert len(made) == 1


def test_an_end_that_is_no_token_is_no_end_of_a_schema(demo):
    """As a config may name one among rows that only pad a vocabulary."""
    model, processor = demo
    size = model.language_model.config.vocab_size
    ends = [*processor.eos_ids, size + 9]
    matcher = Matcher(Grammar.choices(["a"]), processor.tokenizer, ends, size)
    (allowed,) = mx.isfinite(matcher.allow(mx.zeros((1, size)))).tolist()
    words = [id for id, may in enumerate(allowed) if may]
    assert [processor.tokenizer.backend.id_to_token(id) for id in words] == ["a"]


def test_several_answers_with_schemas_at_once(demo):
    from mlx_vlm_edge import Options
    from mlx_vlm_edge.generation.engine import Engine, pieces

    model, processor = demo
    inputs = processor("Describe the image.", [SHAPES])
    options = [Options(schema=SCHEMA, max_tokens=200), Options(choices=["blue"]), Options()]
    want = [
        generate(model, processor, "Describe the image.", [SHAPES], schema=SCHEMA, max_tokens=200),
        "blue", generate(model, processor, "Describe the image.", [SHAPES]),
    ]  # fmt: skip
    engine = Engine(model, processor)
    try:
        streams = [pieces(lambda deliver, o=o: engine.submit(inputs, o, deliver)) for o in options]
        assert ["".join(piece.text for piece in stream) for stream in streams] == want
    finally:
        engine.close()
