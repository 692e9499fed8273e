"""POST /v1/chat/completions: what is asked is obeyed, or refused with the field's name."""

import json
from types import MappingProxyType

import httpx
import pytest

from mlx_vlm_edge import generate
from mlx_vlm_edge.generation.engine import Engine
from mlx_vlm_edge.server.app import Served
from mlx_vlm_edge.server.limits import Limits
from mlx_vlm_edge.server.openai import make_options

from ..demo import IMAGES, KNOWN, VISUAL
from .conftest import data_url, question, running

SHORT = {"max_tokens": 4}


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def text_of(answer):
    return answer.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("row", KNOWN[:6], ids=lambda row: f"{row.picture}-{row.question}")
def test_the_known_answers(client, row):
    messages = [question(row.question, data_url(row.picture))]
    answer = client.post("/v1/chat/completions", json={"model": "demo", "messages": messages})
    assert answer.status_code == 200
    body = answer.json()
    assert text_of(answer) == row.answer
    assert body["object"] == "chat.completion"
    assert body["model"] == "demo"
    assert body["choices"][0]["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["visual_tokens"] == VISUAL


def test_a_stream_says_the_same_in_pieces(ask):
    whole = text_of(ask())
    response = ask(stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert "".join(piece["delta"].get("content", "") for piece in pieces) == whole
    assert [piece["finish_reason"] for piece in pieces if piece["finish_reason"]] == ["stop"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    assert all("usage" not in chunk for chunk in events(ask(stream=True)))


def test_the_second_question_about_a_picture_encodes_nothing(client):
    url = data_url("count.png")
    first = client.post("/v1/chat/completions", json={"messages": [question("How many?", url)]})
    answer = {"role": "assistant", "content": text_of(first)}
    follow = {"role": "user", "content": "What color are they?"}
    second = client.post(
        "/v1/chat/completions", json={"messages": [question("How many?", url), answer, follow]}
    ).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 20
    assert "vision_ms" not in second["timings"]
    first = first.json()
    assert first["timings"]["vision_ms"] > 0
    for key in ("image_decode_ms", "preprocess_ms", "prefill_ms", "ttft_ms", "decode_ms"):
        assert first["timings"][key] >= 0


def test_pictures_in_any_turn_of_the_user(client):
    messages = [
        {"role": "system", "content": "Be brief."},
        question("What does it say?", data_url("text.png")),
        {"role": "assistant", "content": [{"type": "text", "text": "K7QX"}]},
        question("And these two?", data_url("hello.png"), data_url("shapes.png")),
    ]
    body = client.post("/v1/chat/completions", json={"messages": messages, **SHORT}).json()
    assert body["usage"]["prompt_tokens_details"]["visual_tokens"] == 3 * VISUAL


@pytest.mark.parametrize("stop", [" background", ["never said", " on"]])
def test_stop_texts_end_the_answer_and_are_left_out(ask, stop):
    whole = text_of(ask())
    words = [stop] if isinstance(stop, str) else stop
    cut = min(whole.index(word) for word in words if word in whole)
    answer = ask(stop=stop)
    assert text_of(answer) == whole[:cut]
    assert answer.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_token_limits_are_obeyed(ask, field):
    answer = ask(**{field: 3}).json()
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_n_answers_with_counted_up_seeds(ask, demo):
    answer = ask(n=3, temperature=2.0, seed=5, **SHORT).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    want = [
        generate(*demo, "Describe the image.", [IMAGES / "shapes.png"], temperature=2.0, seed=5 + i,
                 max_tokens=4)
        for i in range(3)
    ]  # fmt: skip
    assert texts == want
    assert 3 < answer["usage"]["completion_tokens"] <= 12
    pieces = [c for chunk in events(ask(n=2, stream=True, **SHORT)) for c in chunk["choices"]]
    assert {piece["index"] for piece in pieces} == {0, 1}
    assert sum(piece["finish_reason"] is not None for piece in pieces) == 2


def test_a_seed_repeats_an_answer(ask):
    settings = {"temperature": 2.0, "seed": -3, "top_k": 50, "top_p": 0.99, "min_p": 0.001}
    assert text_of(ask(**settings)) == text_of(ask(**settings))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 5}, "top_p"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stop": [1]}, "stop.0"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"seed": 0.5}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages.0.content.0"),
        (
            {"messages": [{"role": "user", "content": "x", "images": ["a.png"]}]},
            "messages.0.images",
        ),
        ({"messages": [{"role": "assistant", "content": "x"}]}, None),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, None),
        ({"colour": "blue"}, "colour"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_obeyed_is_refused_by_name(client, fields, param):
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    response = client.post(
        "/v1/chat/completions", content=json.dumps(body),
        headers={"content-type": "application/json"},
    )  # fmt: skip
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert "\n" not in error["message"]


def test_nulls_and_fields_that_ask_for_nothing_are_taken(ask):
    answer = ask(temperature=None, tools=[], tool_choice="none", logit_bias={}, stop=None, n=1)
    assert answer.status_code == 200


def test_numbers_are_json_s(ask):
    """2.0 is 2, and 0 is not false."""
    assert ask(max_tokens=2.0, top_k=1.0).json()["usage"]["completion_tokens"] == 2
    assert ask(max_tokens=2.5).status_code == 400
    assert ask(store=0).json()["error"]["param"] == "store"


def test_an_image_in_a_system_message_is_refused(client):
    picture = {"type": "image_url", "image_url": {"url": data_url()}}
    messages = [{"role": "system", "content": [picture]}, {"role": "user", "content": "x"}]
    response = client.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages.0.content.0"


def test_an_unknown_model_is_404_and_the_loaded_one_stays(ask):
    response = ask(model="gpt-4o")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert ask(model="demo", **SHORT).status_code == 200


def test_a_prompt_beyond_the_context_is_refused(client):
    messages = [{"role": "user", "content": "word " * 5000}]
    response = client.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"a":' * 100_000])
def test_a_body_that_is_no_json_object(client, content):
    response = client.post(
        "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_another_type_of_body_is_refused(client):
    assert client.post("/v1/chat/completions", data={"a": "b"}).status_code == 415


def test_completions_take_a_text_as_it_stands(client):
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    body = {"prompt": prompt, "max_tokens": 5, "model": "demo"}
    answer = client.post("/v1/completions", json=body).json()
    assert answer["object"] == "text_completion"
    assert answer["usage"]["completion_tokens"] <= 5
    response = client.post("/v1/completions", json=body | {"stream": True})
    pieces = [choice for chunk in events(response) for choice in chunk["choices"]]
    assert "".join(piece["text"] for piece in pieces) == answer["choices"][0]["text"]
    assert client.post("/v1/completions", json={"prompt": "<image>\nHi"}).status_code == 400


def test_models_health_and_what_is_not_there(client):
    (entry,) = client.get("/v1/models").json()["data"]
    assert entry["id"] == "demo"
    assert entry["loaded"]
    assert client.get("/v1/models/demo").json() == entry
    assert client.get("/v1/models/other/one").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}
    for response in (client.get("/v1/nothing"), client.get("/v1/chat/completions")):
        assert response.status_code in (404, 405)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_metrics_count_what_was_answered(client, ask):
    def value(name):
        lines = client.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)

    name = 'mlx_vlm_edge_tokens_total{kind="generated"}'
    before = value(name)
    ask(max_tokens=3)
    ask(max_tokens=2, stream=True)
    assert value(name) == before + 5
    refused = value('mlx_vlm_edge_requests_total{status="400"}')
    ask(temperature=-1)
    assert value('mlx_vlm_edge_requests_total{status="400"}') == refused + 1
    assert client.get("/metrics").status_code == httpx.codes.OK


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


def test_answers_follow_a_json_schema(ask):
    wanted = {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA}}
    assert json.loads(text_of(ask(response_format=wanted)))["colour"] in ("red", "blue")
    cut = ask(response_format=wanted, max_tokens=2).json()["choices"][0]
    assert cut["finish_reason"] == "length"
    assert text_of(ask(response_format={"type": "text"})) == text_of(ask())
    assert text_of(ask(response_format={"type": "json_object"}, max_tokens=50)).startswith("{")


def test_a_schema_that_cannot_be_enforced_is_refused(ask):
    wanted = {"type": "json_schema", "json_schema": {"schema": {"type": "sesame"}}}
    response = ask(response_format=wanted)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "response_format"


def test_log_probabilities(ask, client):
    choice = ask(logprobs=True, top_logprobs=2, max_tokens=3).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert len(entries) == 3
    assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
    for entry in entries:
        assert entry["logprob"] <= 0
        assert entry["top_logprobs"][0]["token"] == entry["token"]  # greedy
        assert len(entry["top_logprobs"]) == 2
        assert bytes(entry["bytes"]).decode() == entry["token"]
    streamed = events(ask(logprobs=True, top_logprobs=2, max_tokens=3, stream=True))
    told = [c["logprobs"] for chunk in streamed for c in chunk["choices"] if c["logprobs"]]
    assert [entry for part in told for entry in part["content"]] == entries
    plain = client.post("/v1/completions", json={"prompt": "x", "logprobs": 1, "max_tokens": 2})
    assert len(plain.json()["choices"][0]["logprobs"]["token_logprobs"]) == 2


def test_the_server_decides_on_kv_caches(demo):
    """Quantised as `generate` has it with the same options."""
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    row = KNOWN[1]
    want = generate(*demo, row.question, images=[IMAGES / row.picture], **options)
    engine = Engine(*demo)
    try:
        with running(Served("demo", Limits(cache=options), engine=engine)) as address:
            body = {"messages": [question(row.question, data_url(row.picture))]}
            answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
        assert text_of(answer) == want
    finally:
        engine.close()
    other = {"cache": {"max_kv_size": 3}}
    assert make_options(Limits(**other), None).max_kv_size == 3


def test_the_server_decides_on_drafts_and_counts_them(demo):
    demo[0].pass_costs = MappingProxyType({4: 1.0})
    engine = Engine(*demo)
    limits = Limits(cache={"draft": "prompt-lookup"})
    asked = "Describe it. Describe it. Describe it."
    try:
        with running(Served("demo", limits, engine=engine)) as address:
            body = {"messages": [{"role": "user", "content": asked}], "max_tokens": 40}
            answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
        assert text_of(answer) == generate(*demo, asked, max_tokens=40)
        counts = answer.json()["usage"]["completion_tokens_details"]
        assert counts.keys() == {"accepted_prediction_tokens", "rejected_prediction_tokens"}
    finally:
        demo[0].pass_costs = None
        engine.close()


def test_fewer_visual_tokens_of_a_picture(ask, client):
    def counted(**fields):
        return ask(**SHORT, **fields).json()["usage"]["prompt_tokens_details"]["visual_tokens"]

    assert counted() == VISUAL
    assert counted(visual_tokens=2) == counted(visual_tokens=2.0) == 2
    assert (counted(visual_tokens=1), counted(visual_tokens=1.0)) == (1, VISUAL)
    assert counted(visual_tokens=0.25, token_method="random") == VISUAL // 4
    for fields, message in (
        ({"visual_tokens": 0}, "visual_tokens: give a whole number of at least 1"),
        ({"visual_tokens": 1.5}, "visual_tokens: give a whole number of at least 1"),
        ({"visual_tokens": "many"}, "visual_tokens: give a whole number of at least 1"),
        ({"visual_tokens": True}, "visual_tokens: give a whole number of at least 1"),
        ({"visual_tokens": 99}, f"visual tokens 99: the picture has {VISUAL} and no more"),
        ({"token_method": "pool"}, "token_method needs visual_tokens"),
        ({"visual_tokens": 2, "token_method": "visionzip"}, "is not defined for this model"),
    ):
        refused = ask(**SHORT, **fields)
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]
    messages = [{"role": "user", "content": [
        {"type": "image", "source": {"type": "url", "url": data_url()}},
        {"type": "text", "text": "What is it?"},
    ]}]  # fmt: skip
    counts = [
        client.post("/v1/messages/count_tokens", json={"messages": messages, **fields}).json()
        for fields in ({}, {"visual_tokens": 1})
    ]
    assert counts[0]["input_tokens"] - counts[1]["input_tokens"] == VISUAL - 1
