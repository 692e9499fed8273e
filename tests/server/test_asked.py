"""What each API asks of the engine, and what it tells of the answers: functions, no server."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest

from mlx_vlm_edge import Options
from mlx_vlm_edge.generation.answer import GenerationResult
from mlx_vlm_edge.picture.token_budget import METHODS, TokenBudget
from mlx_vlm_edge.server import messages_api, openai, requests, responses_api
from mlx_vlm_edge.server.answering import Choice
from mlx_vlm_edge.server.errors import ApiError
from mlx_vlm_edge.server.limits import Limits
from mlx_vlm_edge.server.metrics import Metrics
from mlx_vlm_edge.server.requests import ChatRequest, CompletionRequest, Method, parse

from ..demo import ROOT

TURNS = [{"role": "user", "content": "x"}]
SAMPLED = {
    "temperature": 1.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2,
    "presence_penalty": 0.5, "frequency_penalty": -0.5, "seed": 7,
}  # fmt: skip
FEWER = {"visual_tokens": 4, "token_method": "pool"}
SCHEMA = {"type": "object", "properties": {}}
LAST = GenerationResult(
    text="", token=1, prompt_tokens=200, visual_tokens=60, prompt_tps=1.0, generation_tokens=5,
    generation_tps=8.0, ttft_e2e=0.25, peak_memory=1.0, reused_tokens=120, drafted_tokens=9,
    accepted_tokens=2,
)  # fmt: skip
TWO = [Choice("", [LAST]), Choice("", [replace(LAST, generation_tokens=7, drafted_tokens=3)])]


@pytest.mark.parametrize(
    ("asked", "kind", "body", "options", "field"),
    [
        (
            openai.chat_asked, ChatRequest,
            {"messages": TURNS, "max_tokens": 9, "stop": "s", "logprobs": True, "top_logprobs": 2,
             "user": "me", **FEWER, **SAMPLED},
            Options(max_tokens=9, stop=("s",), logprobs=2, **SAMPLED), "messages",
        ),
        (
            openai.chat_asked, ChatRequest,
            {"messages": TURNS, "max_completion_tokens": 9, "user": "me", **FEWER,
             "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            Options(max_tokens=9, schema=SCHEMA), "messages",
        ),
        (
            openai.completion_asked, CompletionRequest,
            {"prompt": "x", "max_tokens": 9, "stop": ["s"], "logprobs": 2, "user": "me", **SAMPLED},
            Options(max_tokens=9, stop=("s",), logprobs=2, **SAMPLED), "prompt",
        ),
        (
            responses_api.asked, responses_api.ResponsesRequest,
            {"input": "x", "max_output_tokens": 9, "temperature": 1.5, "top_p": 0.5, "user": "me",
             "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}, **FEWER},
            Options(max_tokens=9, temperature=1.5, top_p=0.5, schema=SCHEMA), "input",
        ),
        (
            messages_api.asked, messages_api.MessagesRequest,
            {"messages": TURNS, "max_tokens": 9, "stop_sequences": ["s"], "temperature": 0.5,
             "top_p": 0.5, "top_k": 3, "metadata": {"user_id": "me"}, **FEWER},
            Options(max_tokens=9, stop=("s",), temperature=0.5, top_p=0.5, top_k=3), "messages",
        ),
    ],
    ids=["chat", "chat with a schema", "completions", "responses", "messages"],
)  # fmt: skip
def test_all_that_a_request_says_is_asked(asked, kind, body, options, field):
    said = asked(parse(kind, body), Limits())
    assert said.options == [options]
    assert (said.client, said.field) == ("me", field)
    fewer = None if kind is CompletionRequest else TokenBudget(4, "pool")
    assert said.budget == fewer
    assert said.raw == (kind is CompletionRequest)


def test_counted_tokens_are_those_of_fewer_visual_ones():
    body = {"messages": TURNS, **FEWER}
    said = messages_api.asked(parse(messages_api.CountRequest, body), Limits())
    assert (said.options, said.budget) == ((), TokenBudget(4, "pool"))


def test_no_request_has_more_tokens_than_the_server_gives():
    limits = Limits(tokens=5)
    given = [openai.make_options(limits, asked).max_tokens for asked in (None, 3, 5, 9)]
    assert given == [5, 3, 5, 5]


def test_the_method_of_a_request_is_one_that_there_is():
    assert get_args(Method) == METHODS


@pytest.mark.parametrize(
    ("kind", "field"), [(ChatRequest, "messages"), (CompletionRequest, "prompt")]
)
def test_as_many_log_probabilities_are_told_as_are_taken(kind, field):
    body = {field: TURNS if kind is ChatRequest else "x"}
    for count in range(1, 30):
        more = (
            {"logprobs": True, "top_logprobs": count}
            if kind is ChatRequest
            else {"logprobs": count}
        )
        try:
            request = parse(kind, body | more)
        except ApiError:
            break
        openai.sampling_options(request, None, Limits(), logprobs=count)
    assert count == (21 if kind is ChatRequest else 6)


def test_tokens_of_several_answers_count_and_their_prompt_once():
    assert openai.usage(TWO) == {
        "prompt_tokens": 200,
        "completion_tokens": 12,
        "total_tokens": 212,
        "prompt_tokens_details": {"cached_tokens": 120, "visual_tokens": 60},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 4, "rejected_prediction_tokens": 8,
        },
    }  # fmt: skip


def test_the_metrics_count_the_same():
    metrics = Metrics()
    metrics.answered(TWO)
    lines = metrics.page(None)[0].decode().splitlines()
    for kind, count in {"prompt": 200, "cached": 120, "visual": 60, "generated": 12}.items():
        assert f'mlx_vlm_edge_tokens_total{{kind="{kind}"}} {count:.1f}' in lines
    assert "mlx_vlm_edge_ttft_seconds_sum 0.25" in lines


def test_usage_in_the_words_of_the_other_apis():
    said = messages_api._usage(LAST)
    assert {key: value for key, value in said.items() if value is not None} == {
        "input_tokens": 80, "cache_read_input_tokens": 120, "cache_creation_input_tokens": 0,
        "output_tokens": 5,
    }  # fmt: skip
    (_, data) = messages_api.Reply("m")._start(LAST).decode().strip().split("\n")
    begun = json.loads(data.removeprefix("data: "))["message"]
    assert begun["usage"] == {**said, "output_tokens": 0}
    reply = responses_api.Reply(parse(responses_api.ResponsesRequest, {"input": "x"}), "m")
    reply.choices = [Choice("", [replace(LAST, finish_reason="stop")])]
    assert reply._finished()["usage"] == {
        "input_tokens": 200, "input_tokens_details": {"cached_tokens": 120}, "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 205,
    }  # fmt: skip


def test_times_are_milliseconds_and_the_first_token_is_not_decoded():
    took = openai.timings(replace(LAST, stages={"vision": 0.1, "loading": 9.0}))
    assert took == {
        "vision_ms": 100.0, "ttft_ms": 250.0, "decode_ms": 500.0, "decode_tokens_per_second": 8.0,
    }  # fmt: skip
    assert openai.timings(replace(LAST, generation_tps=0.0))["decode_ms"] == 0


def test_a_token_that_cannot_come_has_a_number_that_json_has():
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special: "é")
    reply = openai.Reply(parse(ChatRequest, {"messages": TURNS}), "m", tokenizer)
    told = reply._token(5, float("-inf"))
    assert told == {"token": "é", "logprob": -9999.0, "bytes": [0xC3, 0xA9]}
    assert reply._token(5, -2.5)["logprob"] == -2.5


@pytest.mark.parametrize(("status", "kind"), [
    (400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error"),
    (404, "not_found_error"), (405, "invalid_request_error"), (413, "request_too_large"),
    (429, "rate_limit_error"), (500, "api_error"), (503, "api_error"),
])  # fmt: skip
def test_errors_have_the_published_types(status, kind):
    error = ApiError(status, "told")
    assert error.form("/v1/chat/completions")["error"]["type"] == kind
    assert error.form("/v1/messages") == {
        "type": "error", "error": {"type": kind, "message": "told"},
    }  # fmt: skip


def test_the_limits_of_a_server_are_documented_as_they_are():
    text = (ROOT / "docs" / "server.md").read_text()
    told = re.findall(r"^\| `--max-([\w-]+)` \| ([\d,]+)( MiB)?", text, re.MULTILINE)
    assert len(told) == 7
    for name, number, mebi in told:
        figure = int(number.replace(",", "")) * (2**20 if mebi else 1)
        assert getattr(Limits(), name.replace("-", "_")) == figure, name
    assert f"{requests.MAX_VALUES:,} commas" in text
    assert f"{requests.MAX_NESTING} levels" in text
