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
from mlx_vlm_edge.text import sentencepiece as spm
from mlx_vlm_edge.text.tokenizer import Tokenizer

from ..demo import IMAGES
from ..reference import tokenizer as tiny
from .test_loop import Prepared, Scripted, text

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


def test_a_whole_answer_has_those_of_all_its_tokens(demo):
    asked = (*demo, "Describe the image.", [SHAPES])
    for length in (3, 64):  # cut off, and ended by the model
        pieces = list(stream_generate(*asked, logprobs=2, max_tokens=length))
        whole = generate(*asked, logprobs=2, max_tokens=length, full=True)
        tokens = [(piece.token, piece.logprobs) for piece in pieces if piece.token is not None]
        assert list(zip(whole.tokens, whole.logprobs, strict=True)) == tokens
        assert len(tokens) == whole.generation_tokens
        assert whole.token is None
        assert generate(*asked, max_tokens=length, full=True).logprobs is None


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


PIECES = ["▁", "▁Yes", "▁No", "▁Y", "Yes", "No", "Y", "N", "e", "s", "o", "▁{", "{", '"', "a", ":",
          "1", "}"]  # fmt: skip
OBJECT = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip


def with_word_marks():
    """A tokenizer as LLaMA's: bytes, and words that begin with a mark."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    kinds = [spm.UNKNOWN, spm.CONTROL, spm.CONTROL, *[spm.BYTE] * 256, *[spm.NORMAL] * len(PIECES)]
    scores = [-float(index) for index in range(len(pieces))]
    return Tokenizer(
        spm._built(spm.Vocabulary(tuple(pieces), tuple(scores), tuple(kinds), True, True)),
        {"eos_token": "</s>"},
    )


def byte_level():
    return Tokenizer(tiny.build(), {"eos_token": "<|im_end|>"})


def held(tokenizer, words, after=":", **options):
    """What comes of an answer that a model wants to be these tokens, after a prompt's last text."""
    ids = [tokenizer.token_id(word) for word in words]
    (end,) = tokenizer.eos_ids
    model = Scripted([*ids, end, *[end] * 20])
    last = tokenizer.special.get(after) or tokenizer.encode(after)[-1]
    prepared = Prepared(tokenizer, last + 1, 0, frozenset({end}))  # ids 0, 1, ... last
    model.config.context = 1000
    return list(stream_generate(model, prepared, "Hi", **options))


CHOICES = {"choices": ["Yes", "No"]}
MARKED = [["▁Yes"], ["▁", "Yes"], ["▁Y", "e", "s"], ["<0x20>", "Yes"], ["Yes"]]
LETTERS = [["Ġ", "Y", "e", "s"], ["Y", "e", "s"]]


@pytest.mark.parametrize("words", MARKED, ids="".join)
def test_an_answer_may_begin_with_a_word_mark(words):
    pieces = held(with_word_marks(), words, logprobs=1, **CHOICES)
    assert text(pieces) == "Yes"
    assert [piece.token for piece in pieces[:-1]] == [with_word_marks().token_id(w) for w in words]
    assert all(piece.logprobs.logprob > -0.1 for piece in pieces)  # what it wanted to say
    words = ["▁{", '"', "a", '"', ":", "▁", "1", "}"]
    assert text(held(with_word_marks(), words, schema=OBJECT)) == '{"a": 1}'


@pytest.mark.parametrize("words", LETTERS, ids="".join)
def test_an_answer_after_a_word_may_begin_with_the_space_between_them(words):
    pieces = held(byte_level(), words, logprobs=1, **CHOICES)
    assert text(pieces) == "Yes"
    assert [piece.token for piece in pieces[:-1]] == [byte_level().token_id(w) for w in words]
    words = ["Ġ", "{", '"', "a", '"', ":", "Ġ", "1", "}"]
    assert text(held(byte_level(), words, schema=OBJECT)) == '{"a": 1}'


@pytest.mark.parametrize("after", ["\n", " ", "<|im_start|>"])
def test_where_no_space_comes_before_a_word_none_is_let_through(after):
    pieces = held(byte_level(), ["Ġ", "e", "s"], after=after, max_tokens=1, **CHOICES)
    assert byte_level().backend.id_to_token(pieces[0].token) in ("Y", "N")


def test_a_choice_s_own_space_is_kept():
    choices = [" Yes", "No"]
    assert text(held(byte_level(), LETTERS[0], choices=choices)) == " Yes"
    assert text(held(byte_level(), ["N", "o"], choices=choices)) == "No"
    assert text(held(with_word_marks(), ["▁", "▁Yes"], choices=choices)) == " Yes"
    assert text(held(with_word_marks(), ["▁No"], choices=choices)) == "No"


def test_text_stops_where_it_would_without_the_space():
    for tokenizer, words in ((with_word_marks(), MARKED[0]), (byte_level(), LETTERS[0])):
        last = held(tokenizer, words, stop=["es"], **CHOICES)[-1]
        assert (last.finish_reason, last.stop_text) == ("stop", "es")
        said = held(tokenizer, words, stop=["es"], **CHOICES)
        assert text(said) == "Y"
        assert text(held(tokenizer, words, stop=[" Y"], **CHOICES)) == "Yes"


def test_without_a_grammar_a_space_stays():
    assert text(held(byte_level(), ["Ġ", "Y"])) == " Y"


def test_the_engine_lets_the_space_through_as_well(demo):
    from mlx_vlm_edge import Options
    from mlx_vlm_edge.generation.engine import Engine, pieces

    prompt, options = "USER: What colour? ASSISTANT:", {"choices": ["red", "blue"]}
    want = generate(*demo, prompt, raw=True, **options)
    engine = Engine(*demo)
    try:
        inputs = demo[1](prompt, raw=True)
        stream = pieces(lambda deliver: engine.submit(inputs, Options(**options), deliver))
        assert "".join(piece.text for piece in stream) == want
        assert want in options["choices"]
    finally:
        engine.close()
