"""Round trips of two clients: litellm, and the command line tool llm with a file of models."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import litellm
import pytest

SERVED = os.environ["SERVED"] + "/v1"
IMAGES = Path(__file__).parents[3] / "examples" / "images"
ANSWERS = Path(__file__).parents[2] / "golden" / "demo_answers.json"
QUESTION = "Describe the image."
PICTURE = IMAGES / "shapes.png"
URL = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
CONTENT = [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": QUESTION}]
ASK = {
    "model": "openai/demo", "api_base": SERVED, "api_key": "none", "num_retries": 0,
    "messages": [{"role": "user", "content": CONTENT}],
}  # fmt: skip


def right():
    rows = json.loads(ANSWERS.read_text())
    text = json.dumps(rows)
    return lambda said: bool(said) and said in text


def test_litellm_whole():
    answer = litellm.completion(**ASK)
    assert right()(answer.choices[0].message.content)
    assert answer.usage.completion_tokens > 0


def test_litellm_stream():
    pieces = litellm.completion(**ASK, stream=True)
    assert right()("".join(piece.choices[0].delta.content or "" for piece in pieces))


def test_litellm_tells_what_was_wrong():
    with pytest.raises(litellm.BadRequestError, match="top_p"):
        litellm.completion(**ASK, top_p=7)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_llm_with_a_picture(tmp_path, stream):
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: served\n  model_name: demo\n  api_base: {SERVED}\n  vision: true\n"
    )
    command = [
        sys.executable, "-m", "llm", "-m", "served", QUESTION, "-a", str(PICTURE), "--key", "none",
    ]  # fmt: skip
    done = subprocess.run(
        command + ([] if stream else ["--no-stream"]), capture_output=True, text=True, check=False,
        env=os.environ | {"LLM_USER_PATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert right()(done.stdout.strip())
