"""Answers of every API as they were given, sent back as the history of the next question."""

import pytest

from ..demo import known

DESCRIBE = known("shapes.png", "Describe the image.")
HELLO = [{"role": "user", "content": "Hi"}]
MORE = {"role": "user", "content": "And the colour?"}
SCHEMA = {"type": "object", "properties": {"colour": {"enum": ["red"]}}, "required": ["colour"],
          "additionalProperties": False}  # fmt: skip
NAMED = {"name": "colour", "schema": SCHEMA}


def taken(response):
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("more", [
    {}, {"max_tokens": 1}, {"n": 2, "temperature": 1.0}, {"logprobs": True, "top_logprobs": 2},
    {"response_format": {"type": "json_schema", "json_schema": NAMED}}, {"stop": list("ACDITY")},
], ids=lambda more: " ".join(more) or "plain")  # fmt: skip
def test_chat_answers(client, more):
    def asked(messages, **more):
        body = {"messages": messages, "max_tokens": 20, **more}
        return taken(client.post("/v1/chat/completions", json=body))

    for choice in asked(HELLO, **more)["choices"]:
        turns = [*HELLO, choice["message"], MORE]
        plain = [*HELLO, {"role": "assistant", "content": choice["message"]["content"]}, MORE]
        assert (
            asked(turns, max_tokens=4)["choices"][0]["message"]
            == (asked(plain, max_tokens=4)["choices"][0]["message"])
        )


@pytest.mark.parametrize("more", [
    {}, {"max_output_tokens": 1}, {"text": {"format": {"type": "json_schema", **NAMED}}},
], ids=lambda more: " ".join(more) or "plain")  # fmt: skip
def test_answers_of_responses(client, more):
    def asked(turns, **more):
        body = {"input": turns, "max_output_tokens": 20, **more}
        return taken(client.post("/v1/responses", json=body))

    assert asked([*HELLO, *asked(HELLO, **more)["output"], MORE], max_output_tokens=2)["output"]


@pytest.mark.parametrize("more", [
    {}, {"max_tokens": 1}, {"stop_sequences": list("ACDITY")},
], ids=lambda more: " ".join(more) or "plain")  # fmt: skip
def test_answers_of_messages(client, more):
    def asked(messages, **more):
        body = {"messages": messages, "max_tokens": 20, **more}
        return taken(client.post("/v1/messages", json=body))

    said = asked(HELLO, **more)
    turns = [*HELLO, {"role": said["role"], "content": said["content"]}, MORE]
    assert asked(turns, max_tokens=2)["content"]
    counted = client.post("/v1/messages/count_tokens", json={"messages": turns})
    assert taken(counted)["input_tokens"] > 0


def test_an_answer_that_says_nothing(client):
    for path, field in (("/v1/chat/completions", "messages"), ("/v1/messages", "messages"),
                        ("/v1/responses", "input")):  # fmt: skip
        turns = [*HELLO, {"role": "assistant", "content": ""}, MORE]
        limit = "max_output_tokens" if field == "input" else "max_tokens"
        taken(client.post(path, json={field: turns, limit: 2}))
