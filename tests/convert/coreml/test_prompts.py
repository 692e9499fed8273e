"""What the manifest says of prompts is what our processors write, or nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.prompts import prompt_entry
from PIL import Image

from mlx_vlm_edge.models import family
from mlx_vlm_edge.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]
DEMO, GOLDEN = ROOT / "mlx_vlm_edge" / "demo", ROOT / "tests" / "golden"


@pytest.fixture(scope="module", params=[DEMO, GOLDEN / "mobilevlm_v2"], ids=lambda path: path.name)
def processor(request):
    config = json.loads((request.param / "config.json").read_text())
    kind = family(config)
    return kind.Processor(kind.Config.from_dict(config), Tokenizer.from_folder(request.param))


def picture(words, count=1):
    images = [{"type": "image", "image": Image.new("RGB", (30, 20))}] * count
    return {"role": "user", "content": [*images, {"type": "text", "text": words}]}


def written(processor, chat, system, turns):
    """A chat's ids by the manifest; turns: pictures, question and the answer's text, if any."""
    encode, ids = processor.tokenizer.encode, list(chat["bos"])
    text = chat["start"] if system is None else system.join(chat["system"])
    for pictures, question, answer in turns:
        for _ in range(pictures):
            ids += encode(text, special=True)
            text = chat["after_picture"]
        text += question + chat["after_question"]
        if answer is not None:
            text += answer + chat["after_answer"]
    return ids + encode(text, special=True)


def test_a_fine_tunes_own_words_are_the_apps_too():
    config = json.loads((DEMO / "config.json").read_text())
    kind, tokenizer = family(config), Tokenizer.from_folder(DEMO)
    tokenizer.chat_template = tokenizer.chat_template.replace("a helpful assistant", "French")
    chat = prompt_entry(kind.Processor(kind.Config.from_dict(config), tokenizer))["chat"]
    assert "You are French." in chat["start"]


@pytest.mark.parametrize("system", [None, "Answer in one word."])
def test_a_chat_by_the_manifest_is_the_processors(processor, system):
    chat = prompt_entry(processor)["chat"]
    messages = [
        picture("What is it?", 2),
        {"role": "assistant", "content": "A cat."},
        picture("And 12 of these, caf\u00e9?"),
    ]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    inputs = processor(messages)
    space = " " if processor.tokenizer.token_id("\u2581A") is not None else ""
    turns = [(2, "What is it?", f"{space}A cat."), (1, "And 12 of these, caf\u00e9?", None)]
    textual = np.delete(inputs.input_ids[0], inputs.visual).tolist()
    assert written(processor, chat, system, turns) == textual


def test_a_family_that_takes_no_second_turn_has_no_chat(processor, monkeypatch):
    render = type(processor).render

    def once(self, messages):
        return render(self, messages[-1:])

    monkeypatch.setattr(type(processor), "render", once)
    assert prompt_entry(processor)["chat"] is None
