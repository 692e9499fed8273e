"""Pictures that are encoded while the next one is read: the same answer, in another order."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_edge import generate, load, stream_generate
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.generation import loop
from mlx_vlm_edge.generation.ahead import Ahead
from mlx_vlm_edge.text import prompt

PICTURES = [np.full((90, 70, 3), level, np.uint8) for level in (20, 120, 220)]


@pytest.fixture(scope="module")
def loaded():
    return load("demo")


def test_answers_are_those_of_pictures_encoded_after_all_were_read(loaded, monkeypatch):
    ahead = [piece.token for piece in stream_generate(*loaded, "What?", PICTURES, max_tokens=6)]
    monkeypatch.setattr(Ahead, "begin", lambda self, pixels: None)
    after = [piece.token for piece in stream_generate(*loaded, "What?", PICTURES, max_tokens=6)]
    assert ahead == after


def test_each_picture_is_under_way_before_the_next_is_read_and_nothing_waits(loaded, monkeypatch):
    model, processor = loaded
    told, opened, encode = [], prompt.open_picture, type(model).encode
    monkeypatch.setattr(prompt, "open_picture", lambda *what: told.append("read") or opened(*what))
    monkeypatch.setattr(type(model), "encode", lambda *what: told.append("encode") or encode(*what))
    monkeypatch.setattr(mx, "eval", lambda *arrays: told.append("wait"))
    stream_generate(model, processor, "What?", PICTURES)
    assert told == ["read", "encode"] * 3
    told.clear()
    stream_generate(model, processor, "What?", PICTURES[:1])
    assert told == ["read"]  # the only one is encoded with what follows, when that is asked for


def test_pictures_that_no_context_holds_are_not_all_computed(loaded, monkeypatch):
    model, processor = loaded
    begun, encode = [], type(model).encode
    monkeypatch.setattr(type(model), "encode", lambda *what: begun.append(what[1]) or encode(*what))
    tokens = processor.visual_tokens(processor("?", PICTURES[:1]).pixels[0])
    monkeypatch.setattr(model, "config", replace(model.config, context=2 * tokens + 1))
    with pytest.raises(UsageError, match="more than the context"):
        generate(model, processor, "What?", PICTURES)
    assert len(begun) == 2


def test_measured_and_remembered_prompts_go_step_by_step(loaded, monkeypatch):
    monkeypatch.setattr(loop, "Ahead", lambda *what: pytest.fail("ahead"))
    from mlx_vlm_edge import PrefixCache

    said = generate(*loaded, "What?", PICTURES[:2], max_tokens=2, verbose=True, full=True)
    assert "vision" in said.stages
    generate(*loaded, "What?", PICTURES[:2], max_tokens=2, prefix_cache=PrefixCache())
