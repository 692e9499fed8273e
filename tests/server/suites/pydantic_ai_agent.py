"""Round trips of a pydantic-ai agent: whole, as a stream, with a picture, with typed output."""

import os
from pathlib import Path

from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

IMAGES = Path(__file__).parents[3] / "examples" / "images"
PICTURE = BinaryContent((IMAGES / "shapes.png").read_bytes(), media_type="image/png")
MODEL = OpenAIChatModel(
    "demo", provider=OpenAIProvider(base_url=os.environ["SERVED"] + "/v1", api_key="none")
)
ASK = ["Describe the image.", PICTURE]


class Seen(BaseModel):
    shape: str
    count: int


def test_whole():
    result = Agent(MODEL).run_sync(ASK)
    assert "circles" in result.output
    assert result.usage.output_tokens > 0


def test_stream():
    with_events = Agent(MODEL).run_stream_sync(ASK)
    assert "circles" in "".join(with_events.stream_text(delta=True))


def test_typed_output():
    assert isinstance(Agent(MODEL, output_type=NativeOutput(Seen)).run_sync(ASK).output, Seen)


def test_a_second_turn():
    agent = Agent(MODEL)
    first = agent.run_sync(ASK)
    second = agent.run_sync("What color are they?", message_history=first.all_messages())
    assert second.output
