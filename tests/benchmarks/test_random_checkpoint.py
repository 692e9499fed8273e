"""The random checkpoint: the published names and shapes, loadable, and alive."""

import gzip
import json
from pathlib import Path

import numpy as np
import random_checkpoint
from PIL import Image

from mlx_vlm_edge import load, stream_generate
from mlx_vlm_edge.text.tokenizer import Tokenizer

KEYS = Path(__file__).parents[1] / "golden" / "keys" / "fastvlm_0.5b_mlxvlm_keys.json.gz"


def test_names_and_shapes_are_the_published_ones():
    with gzip.open(KEYS, "rt") as file:
        published = {name: tuple(shape) for name, shape in json.load(file).items()}
    layers = random_checkpoint.TEXT["num_hidden_layers"]
    shapes = random_checkpoint.tower_shapes() | random_checkpoint.decoder_shapes(layers)
    assert shapes == published


def test_it_loads_and_the_answer_depends_on_the_image(checkpoint):
    model, processor = load(str(checkpoint), dtype="float32", resolution=128)
    answers = []
    for colour in ((200, 30, 30), (20, 90, 240)):
        image = Image.new("RGB", (90, 60), colour)
        chunks = stream_generate(model, processor, "What is this?", [image], max_tokens=6)
        answers.append([chunk.token for chunk in chunks if chunk.token is not None])
    assert answers[0] != answers[1]
    assert len(set(answers[0])) > 2, "a constant answer proves nothing"


def test_the_tokenizer_is_as_large_as_qwens_and_knows_words(checkpoint):
    assert 10e6 < (checkpoint / "tokenizer.json").stat().st_size < 13e6
    tokenizer = Tokenizer.from_folder(checkpoint)
    assert tokenizer.vocab_size == 151646
    text = "<|im_start|>user\nDescribe the image in detail.<|im_end|>\n"
    ids = tokenizer.encode(text, special=True)
    assert len(ids) == 11
    assert tokenizer.decode(ids, skip_special=False) == text


def test_values_are_the_same_each_time():
    once = random_checkpoint.weight("a.weight", (4, 8))
    assert np.array_equal(once, random_checkpoint.weight("a.weight", (4, 8)))
    assert not np.array_equal(once, random_checkpoint.weight("b.weight", (4, 8)))
