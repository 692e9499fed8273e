"""What a prompt and a token cost, counted rather than timed: waits, graph nodes, rows, copies."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_vlm_edge import kernels, load
from mlx_vlm_edge.generation import loop as generation
from mlx_vlm_edge.generation.sampling import Sampling, make_sampler
from mlx_vlm_edge.kernels import cpu, gpu, quantized
from mlx_vlm_edge.language.llama import LanguageModel, TextConfig

CONFIG = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "tie_word_embeddings": True,
}
LENGTH = 40


def build(layers, quantise=False):
    model = LanguageModel(TextConfig.from_dict({**CONFIG, "num_hidden_layers": layers}, "qwen2"))
    if quantise:
        nn.quantize(model, 32, 4)
    model.fuse()
    mx.eval(model.parameters())
    return model


def nodes(array, tmp_path):
    """How many operations compute an array that nothing has evaluated yet."""
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), array)
    return path.read_text().count("shape=rectangle")


@pytest.fixture(params=[cpu, gpu], ids=["cpu", "gpu"])
def form(request, monkeypatch):
    monkeypatch.setattr(kernels, "forms", lambda: request.param)
    return request.param.__name__.rpartition(".")[2]


def per_layer(length, tmp_path):
    counts = []
    for layers in (2, 3):
        model = build(layers)
        cache = model.make_cache()
        mx.eval(model(mx.ones((1, 8, 64)), cache, last_only=True))
        logits = model(mx.ones((1, length, 64)), cache, last_only=True)
        counts.append(nodes(logits, tmp_path))
    return counts[1] - counts[0]


# mlx-vlm 0.7.10, counted the same way: 138 in a decode step, 148 in a prompt. On a CPU stream the
# graph holds what `mx.fast` falls back to, and every constant's broadcast.
MOST = {(1, "gpu"): 96, (LENGTH, "gpu"): 106, (1, "cpu"): 172, (LENGTH, "cpu"): 184}


@pytest.mark.skipif(not kernels.on_cpu(), reason="the bounds are those of graphs on a CPU stream")
@pytest.mark.parametrize("length", [1, LENGTH], ids=["decode", "prompt"])
def test_operations_per_layer(form, tmp_path, length):
    """The CPU's exponentials are a dozen small operations each."""
    assert 10 < per_layer(length, tmp_path) <= MOST[length, form]


@pytest.fixture(scope="module")
def demo():
    return load("demo")


class Waits:
    """Counts what blocks (`mx.eval`) and what does not (`mx.async_eval`)."""

    def __init__(self, monkeypatch):
        self.blocking = self.queued = 0
        blocking, queued = mx.eval, mx.async_eval

        def count_eval(*arrays):
            self.blocking += 1
            blocking(*arrays)

        def count_queued(*arrays):
            self.queued += 1
            queued(*arrays)

        monkeypatch.setattr(mx, "eval", count_eval)
        monkeypatch.setattr(mx, "async_eval", count_queued)


def tokens(demo, count, **options):
    model, processor = demo
    image = np.zeros((64, 64, 3), np.uint8)
    inputs = processor("What is this?", [image])
    chosen = generation.Options(max_tokens=count, **options)
    cache = generation.make_cache(model, inputs, chosen)
    sample = generation.token_sampler(model, processor, inputs, chosen)
    logits = model.prefill(inputs, cache, chosen.prefill_step_size)
    return generation.decode(model, logits, cache, count, sample)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9}])
def test_nothing_waits_but_for_each_token(demo, monkeypatch, options):
    """No evaluation blocks before the first token; then each step is queued once, one ahead."""
    waits = Waits(monkeypatch)
    stream = tokens(demo, 5, **options)
    assert waits.queued == 0
    for index, _ in enumerate(stream):
        assert waits.queued == min(index + 2, 5)
    assert waits.blocking == 0


def test_a_prompt_in_chunks_waits_once_for_each_full_one(demo, monkeypatch):
    _, processor = demo
    length = processor("What is this?", [np.zeros((64, 64, 3), np.uint8)]).input_ids.shape[1]
    waits = Waits(monkeypatch)
    next(tokens(demo, 1, prefill_step_size=16))
    assert waits.blocking == (length - 1) // 16


def test_of_a_prompt_in_chunks_each_computes_the_logits_of_one_position(demo, monkeypatch):
    model, _ = demo
    kind, shapes = type(model.language_model), []
    whole = kind.__call__

    def counted(self, *arguments, **options):
        logits = whole(self, *arguments, **options)
        shapes.append(logits.shape[1])
        return logits

    monkeypatch.setattr(kind, "__call__", counted)
    next(tokens(demo, 1, prefill_step_size=16))
    assert len(shapes) > 1
    assert {*shapes} == {1}


def test_no_more_steps_than_tokens(demo, monkeypatch):
    model, _ = demo
    steps = []
    step = type(model).step
    monkeypatch.setattr(type(model), "step", lambda *a: steps.append(1) or step(*a))
    assert len(list(tokens(demo, 4))) == 4
    assert len(steps) == 3


def test_greedy_computes_no_probabilities(tmp_path):
    logits = mx.ones((1, 9)) + 1
    sample = make_sampler(Sampling())
    assert nodes(sample(logits), tmp_path) - nodes(logits, tmp_path) <= 2  # argmax, its shape


@pytest.mark.parametrize("quantise", [False, True])
def test_a_prompt_computes_only_what_is_read(monkeypatch, quantise):
    """All positions in every layer's keys and values; one in the last MLP and in the head."""
    model = build(3, quantise)
    if quantise:
        quantized.for_cpu(model)
    rows = {"mlp": [], "o_proj": [], "head": []}
    last = model.model.layers[-1]
    for key, part in (
        ("mlp", type(last.mlp)),
        ("o_proj", type(last.self_attn.o_proj)),
        ("head", type(model.model.norm)),
    ):
        inner = part.__call__

        def counted(self, x, inner=inner, key=key):
            rows[key].append((self, x.shape[1]))
            return inner(self, x)

        monkeypatch.setattr(part, "__call__", counted)
    cache = model.make_cache()
    logits = model(mx.ones((1, LENGTH, 64)), cache, last_only=True)
    assert logits.shape == (1, 1, 128)
    assert [length for _, length in rows["mlp"]] == [LENGTH, LENGTH, 1]
    assert [n for part, n in rows["o_proj"] if part is last.self_attn.o_proj] == [1]
    assert [n for part, n in rows["head"] if part is model.model.norm] == [1]
    assert all(layer.offset == LENGTH for layer in cache)


def test_no_float_copy_of_quantised_weights_survives_a_prompt():
    model = build(2, quantise=True)
    quantized.for_cpu(model)
    model.eval()
    held = sum(p.nbytes for _, p in tree_flatten(model.parameters()))
    mx.eval(model(mx.ones((1, LENGTH, 64)), last_only=True))
    assert sum(p.nbytes for _, p in tree_flatten(model.parameters())) == held
    active = mx.get_active_memory()
    mx.eval(model(mx.ones((1, LENGTH, 64)), last_only=True))
    assert mx.get_active_memory() <= active
