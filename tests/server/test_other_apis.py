"""/v1/messages, /v1/responses and the OpenAPI file; the makers' own clients where installed."""

import base64
import json

import pytest

from mlx_vlm_edge.generation.conversation import Conversation, Turn

from ..demo import IMAGES, VISUAL, known
from .conftest import data_url

DESCRIBE = known("shapes.png", "Describe the image.")
PICTURE = base64.b64encode((IMAGES / "shapes.png").read_bytes()).decode()
SOURCE = {"type": "base64", "media_type": "image/png", "data": PICTURE}
BLOCKS = [{"type": "image", "source": SOURCE}, {"type": "text", "text": DESCRIBE.question}]
COUNTED = 26 + VISUAL  # tokens of the question with its picture, as the chat template writes it
CLAUDE = {"model": "demo", "max_tokens": 50, "messages": [{"role": "user", "content": BLOCKS}]}
ITEMS = [{"role": "user", "content": [
    {"type": "input_image", "image_url": data_url()},
    {"type": "input_text", "text": DESCRIBE.question},
]}]  # fmt: skip


def named_events(response):
    blocks = [block.split("\n") for block in response.text.split("\n\n") if block]
    for name, data in blocks:
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    return [json.loads(data.removeprefix("data: ")) for _, data in blocks]


def test_messages(client):
    answer = client.post("/v1/messages", json=CLAUDE).json()
    assert answer["content"] == [{"type": "text", "text": DESCRIBE.answer, "citations": None}]
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "demo")
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    usage = answer["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == COUNTED
    assert usage["output_tokens"] > 5


def test_messages_as_events(client):
    events = named_events(client.post("/v1/messages", json=CLAUDE | {"stream": True}))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(deltas) == DESCRIBE.answer
    assert events[-2]["delta"]["stop_reason"] == "end_turn"
    assert events[0]["message"]["content"] == []


def test_tokens_of_a_message_are_counted_without_an_answer(client):
    asked = {"model": "demo", "messages": CLAUDE["messages"]}
    answer = client.post("/v1/messages/count_tokens", json=asked)
    assert answer.json() == {"input_tokens": COUNTED}
    longer = client.post(
        "/v1/messages/count_tokens", json=asked | {"system": "Be kind and very brief."}
    )
    assert longer.json()["input_tokens"] > COUNTED
    refused = client.post("/v1/messages/count_tokens", json=asked | {"max_tokens": 3})
    assert refused.status_code == 400
    assert refused.json()["type"] == "error"


@pytest.mark.parametrize(("more", "reason", "sequence"), [
    ({"max_tokens": 2}, "max_tokens", None),
    ({"stop_sequences": ["never", " on"]}, "stop_sequence", " on"),
    ({"system": "Be brief.", "temperature": 0.0, "top_k": 5, "metadata": {"user_id": "a"}},
     "end_turn", None),
    ({"system": [{"type": "text", "text": "Be brief."}]}, "end_turn", None),
])  # fmt: skip
def test_messages_say_why_they_end(client, more, reason, sequence):
    answer = client.post("/v1/messages", json=CLAUDE | more).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)


@pytest.mark.parametrize(("more", "status"), [
    ({"max_tokens": None}, 400), ({"messages": []}, 400), ({"temperature": 1.5}, 400),
    ({"tools": [{"name": "x"}]}, 400), ({"model": "claude"}, 404), ({"thinking": {}}, 400),
    ({"messages": [{"role": "system", "content": "x"}]}, 400),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {
        "type": "url", "url": "http://127.0.0.1/x.png"}}]}]}, 400),
])  # fmt: skip
def test_messages_refuse_in_their_own_form(client, more, status):
    response = client.post("/v1/messages", json=CLAUDE | more)
    assert response.status_code == status, response.text
    body = response.json()
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}


def test_responses(client):
    answer = client.post("/v1/responses", json={"model": "demo", "input": ITEMS}).json()
    assert answer["status"] == "completed"
    (item,) = answer["output"]
    assert item["content"][0]["text"] == DESCRIBE.answer
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    plain = client.post("/v1/responses", json={
        "input": "Hi", "instructions": "Be brief.", "max_output_tokens": 2, "store": False,
    }).json()  # fmt: skip
    assert plain["status"] == "incomplete"
    assert plain["incomplete_details"] == {"reason": "max_output_tokens"}


def test_responses_as_events(client):
    events = named_events(client.post("/v1/responses", json={"input": ITEMS, "stream": True}))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events][:4] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added",
    ]  # fmt: skip
    deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    assert "".join(deltas) == DESCRIBE.answer
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == DESCRIBE.answer


def test_responses_follow_a_schema_and_several_turns(client):
    schema = {"type": "object", "properties": {"colour": {"enum": ["red"]}},
              "required": ["colour"], "additionalProperties": False}  # fmt: skip
    wanted = {"format": {"type": "json_schema", "name": "colour", "schema": schema}}
    turns = [*ITEMS, {"role": "assistant", "content": [{"type": "output_text", "text": "x"}]},
             {"role": "user", "content": "And the colour?"}]  # fmt: skip
    answer = client.post("/v1/responses", json={"input": turns, "text": wanted}).json()
    assert json.loads(answer["output"][0]["content"][0]["text"]) == {"colour": "red"}
    assert answer["text"]["format"]["schema"] == schema


@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_a_system_prompt_is_the_same_prompt_in_every_interface(
    client, served, demo, system, monkeypatch
):
    """An empty one is one, and not the model's own."""
    hi = {"role": "user", "content": "Hi"}
    messages = [hi] if system is None else [{"role": "system", "content": system}, hi]
    want = demo[1](messages, []).input_ids.tolist()
    prompts, submit = [], served.engine.submit
    monkeypatch.setattr(served.engine, "submit", lambda inputs, *rest, **more: (
        prompts.append(inputs.input_ids.tolist()), submit(inputs, *rest, **more))[1])  # fmt: skip
    for path, request in (
        ("chat/completions", {"messages": messages, "max_tokens": 1}),
        ("responses", {"input": "Hi", "instructions": system, "max_output_tokens": 1}),
        ("messages", {"messages": [hi], "system": system, "max_tokens": 1}),
    ):
        answer = client.post(f"/v1/{path}", json=request)
        assert answer.status_code == 200, answer.text
    chat = Conversation(*demo, system=system)
    prompts.append(demo[1](chat._messages([Turn("user", "Hi")]), []).input_ids.tolist())
    assert prompts == [want] * 4
    assert (system is None) == (want == demo[1]("Hi", []).input_ids.tolist())


LONG = "word " * 5000


@pytest.mark.parametrize(("path", "body", "param"), [
    ("/v1/responses", {"input": LONG}, "input"),
    ("/v1/responses", {"input": [{"role": "user", "content": ""}]}, "input"),
    ("/v1/responses", {"input": [{"role": "user", "content": ITEMS[0]["content"][:1] * 17}]},
     "input"),
    ("/v1/completions", {"prompt": LONG}, "prompt"),
    ("/v1/completions", {"prompt": "<image>"}, "prompt"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
])  # fmt: skip
def test_a_prompt_that_cannot_be_answered_is_named_as_its_api_names_it(client, path, body, param):
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("more", [
    {"tools": [{"type": "web_search"}]}, {"previous_response_id": "x"}, {"input": []},
    {"input": [{"type": "function_call"}]}, {"temperature": 3}, {"store": True},
    {"text": {"format": {"type": "json_schema", "schema": {"type": "nope"}}}},
])  # fmt: skip
def test_responses_refuse_what_they_cannot_do(client, more):
    response = client.post("/v1/responses", json={"input": "Hi"} | more)
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_the_openapi_file_names_every_route_and_resolves(client, served):
    from mlx_vlm_edge.server.app import application

    document = client.get("/openapi.json").json()
    routes = {
        route.path.replace(":path", "") for route in application(served).app.routes
        if route.path.startswith(("/v1", "/health", "/metrics"))
    }  # fmt: skip
    assert set(document["paths"]) == routes
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"], name


def test_the_openapi_file_tells_what_is_done_before_a_request_is_checked(client):
    """Nulls are left out whatever they are called, and what asks for nothing is taken."""
    document = client.get("/openapi.json").json()
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["additionalProperties"] == {"type": "null"}
    assert chat["properties"]["tools"]["anyOf"] == [{"const": []}, {"type": "null"}]
    assert {"enum": ["demo"]} in chat["properties"]["model"]["anyOf"]
    refusals = document["paths"]["/v1/messages"]["post"]["responses"]["400"]["content"]
    assert refusals["application/json"]["schema"]["$ref"].endswith("/AnthropicError")


def test_earlier_answers_may_say_which_phase_they_were(client):
    said = {"type": "message", "role": "assistant", "phase": "commentary", "content": "I look."}
    answer = client.post("/v1/responses", json={"input": [said, *ITEMS], "model": "demo"})
    assert answer.json()["status"] == "completed"


def test_openai_s_own_client(address):
    openai = pytest.importorskip("openai", reason="the client is not installed")
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": data_url()}},
        {"type": "text", "text": DESCRIBE.question},
    ]}]  # fmt: skip
    whole = client.chat.completions.create(model="demo", messages=messages)
    assert whole.choices[0].message.content == DESCRIBE.answer
    follow = {"role": "user", "content": "And the colour?"}
    turns = [*messages, whole.choices[0].message, follow]
    assert client.chat.completions.create(model="demo", messages=turns, max_tokens=2).choices
    stream = client.chat.completions.create(
        model="demo", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == DESCRIBE.answer
    assert chunks[-1].usage.completion_tokens > 0
    answer = client.responses.create(model="demo", input=ITEMS)
    assert answer.output_text == DESCRIBE.answer
    turns = [*ITEMS, *answer.output, follow]
    assert client.responses.create(model="demo", input=turns, max_output_tokens=2).output
    with client.responses.stream(model="demo", input=ITEMS) as events:
        assert events.get_final_response().output_text == DESCRIBE.answer
    assert [model.id for model in client.models.list()] == ["demo"]
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="demo", messages=messages, temperature=9)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_anthropic_s_own_client(address):
    anthropic = pytest.importorskip("anthropic", reason="the client is not installed")
    client = anthropic.Anthropic(base_url=address, api_key="none", max_retries=0)
    messages = CLAUDE["messages"]
    whole = client.messages.create(model="demo", max_tokens=50, messages=messages)
    assert whole.content[0].text == DESCRIBE.answer
    turns = [*messages, {"role": whole.role, "content": whole.content},
             {"role": "user", "content": "And the colour?"}]  # fmt: skip
    assert client.messages.create(model="demo", max_tokens=2, messages=turns).content
    with client.messages.stream(model="demo", max_tokens=50, messages=messages) as stream:
        assert "".join(stream.text_stream) == DESCRIBE.answer
        assert stream.get_final_message().stop_reason == "end_turn"
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="demo", max_tokens=0, messages=messages)
