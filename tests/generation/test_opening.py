"""The text before the first picture, taken over from earlier prompts: less work, same answers."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_edge import PrefixCache, UsageError, generate, load, stream_generate
from mlx_vlm_edge.cli import main
from mlx_vlm_edge.generation import loop, opening
from mlx_vlm_edge.text import prompt

from ..demo import IMAGES
from ..language.test_cost import Waits, nodes
from ..reference import moe_llava as theirs
from .test_prefix import FAMILIES, family, models  # noqa: F401  (fixtures)

PICTURES = [
    np.random.default_rng(seed).integers(0, 256, (70, 90, 3), np.uint8) for seed in range(3)
]
IMAGE, TOKENS = {"type": "image"}, 6


class Asker:
    """Asks a model that has no openings at first; of every prompt the logits and their graph."""

    def __init__(self, model, processor, monkeypatch):
        self.model, self.processor = model, processor
        self.positions, self.first = 0, None
        monkeypatch.setattr(model, "openings", None)
        kind = type(model)
        prefilling, run = kind.prefilling, type(model.language_model).__call__

        def watched(this, inputs, *more):
            self.logits = yield from prefilling(this, inputs, *more)
            return self.logits

        def counted(this, embeddings, *more, **options):
            self.positions += embeddings.shape[1]
            return run(this, embeddings, *more, **options)

        monkeypatch.setattr(kind, "prefilling", watched)
        monkeypatch.setattr(type(model.language_model), "__call__", counted)

    def __call__(self, text, *pictures, **options):
        """The last piece and the ids of an answer, and how many positions went in for its first."""
        self.positions = 0
        stream = stream_generate(
            self.model, self.processor, text, [*pictures], max_tokens=TOKENS, **options
        )
        pieces = [next(stream)]
        computed = self.positions - 1  # the second token is under way
        pieces += stream
        return pieces[-1], [piece.token for piece in pieces], computed, self.logits


@pytest.fixture
def ask(family, monkeypatch):  # noqa: F811
    return Asker(*family[1:], monkeypatch)


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture
def ask_demo(demo, monkeypatch):
    return Asker(*demo, monkeypatch)


def before(processor, *arguments):
    """Positions before the first picture."""
    return int(processor(*arguments).visual[0])


def test_prefill_starts_at_the_picture_and_answers_the_same(family, ask):  # noqa: F811
    name, _, processor = family
    length = before(processor, "What is it?", PICTURES[:1])
    assert (length == 0) == (name == "fuyu")
    for index, picture in enumerate(PICTURES):
        last, ids, computed, logits = ask("What is it?", picture)
        _, cold, all_of_it, whole = ask("What is it?", picture, prefix_cache=False)
        assert ids == cold
        assert mx.abs(logits - whole).max().item() < 1e-4 * mx.abs(whole).max().item()
        assert last.reused_tokens == (length if index else 0)
        assert computed == all_of_it - last.reused_tokens


def test_another_question_or_the_same_picture_twice_start_there_too(ask_demo, demo):
    length = before(demo[1], "What is it?", PICTURES[:1])
    ask_demo("What is it?", PICTURES[0])
    assert ask_demo("Is it red, and why?", PICTURES[1])[0].reused_tokens == length
    assert ask_demo("Which?", PICTURES[2], PICTURES[2])[0].reused_tokens == length


def test_of_other_words_before_the_picture_the_beginning_is_taken(ask_demo, demo):
    def asked(words):
        content = [{"type": "text", "text": words}, IMAGE, {"type": "text", "text": "What is it?"}]
        return [{"role": "user", "content": content}]

    ask_demo(asked("Look here. "), PICTURES[0])
    last, ids, *_ = ask_demo(asked("Look there, please. "), PICTURES[0])
    assert 0 < last.reused_tokens < before(demo[1], asked("Look there, please. "), PICTURES[:1])
    assert ids == ask_demo(asked("Look there, please. "), PICTURES[0], prefix_cache=False)[1]


def test_the_first_prompt_pays_nothing(demo, ask_demo, monkeypatch):
    """Nothing waits, as many positions and operations, nothing built or copied before the token."""
    counts = []
    for options in ({"prefix_cache": False}, {}):
        waits = Waits(monkeypatch)
        stream = stream_generate(*demo, "What?", PICTURES[:1], max_tokens=TOKENS, **options)
        next(stream)
        counts.append((waits.blocking, waits.queued, ask_demo.positions))
        assert demo[0].openings is None
        ask_demo.positions = 0
        stream.close()
    assert counts[0] == counts[1]
    assert counts[0][0] == 0


def test_later_prompts_wait_for_nothing_and_save_the_openings_share(demo, ask_demo, monkeypatch):
    *_, whole, _ = ask_demo("What?", PICTURES[0])
    waits = Waits(monkeypatch)
    stream = stream_generate(*demo, "What?", PICTURES[1:2], max_tokens=TOKENS)
    ask_demo.positions = 0
    next(stream)
    assert (waits.blocking, waits.queued) == (0, 2)
    assert ask_demo.positions - 1 == whole - before(demo[1], "What?", PICTURES[:1])


def test_the_graph_is_hardly_larger(demo, ask_demo, tmp_path):
    """Two slices a layer put what is known into a cache, where zeros were written into."""
    model, processor = demo
    ask_demo("What?", PICTURES[0])
    inputs, counts = processor("What?", PICTURES[1:2]), []
    for remembers in (None, opening.Opening(model)):
        cache = model.make_cache()
        run = inputs if remembers is None else remembers.begin(model, processor, inputs, cache)
        steps = loop.prompt_logits(model, run, cache, 2048)
        counts.append(nodes([loop.Timer().run(steps)], tmp_path))
    layers = len(model.language_model.model.layers)
    assert counts[1] - counts[0] <= 4 * layers


def test_exchanged_weights_are_noticed(native_folder, monkeypatch):
    ask = Asker(*load(str(native_folder)), monkeypatch)
    ask("What is it?", PICTURES[0])
    assert ask("What is it?", PICTURES[0])[0].reused_tokens
    layer = ask.model.language_model.model.layers[0].self_attn
    projection = next(part for part in layer.children().values() if "weight" in part)
    projection.weight = -projection.weight
    last, ids, *_ = ask("What is it?", PICTURES[0])
    assert last.reused_tokens == 0
    assert ids == ask("What is it?", PICTURES[0], prefix_cache=False)[1]
    assert ask("What is it?", PICTURES[0])[0].reused_tokens
    ask.model.openings.clear()
    assert not ask("What is it?", PICTURES[0])[0].reused_tokens


def test_a_stream_that_is_closed_after_weights_were_exchanged_leaves_nothing(
    native_folder, monkeypatch
):
    ask = Asker(*load(str(native_folder)), monkeypatch)
    stream = stream_generate(ask.model, ask.processor, "What is it?", PICTURES[:1])
    next(stream)
    embedding = ask.model.language_model.model.embed_tokens
    embedding.weight = -embedding.weight
    stream.close()
    last, ids, *_ = ask("What is it?", PICTURES[0])
    assert last.reused_tokens == 0
    assert ids == ask("What is it?", PICTURES[0], prefix_cache=False)[1]


def test_where_experts_drop_tokens_every_prompt_is_whole(tmp_path, monkeypatch):
    """What they drop hangs on how many tokens go in together."""
    folder = theirs.copied("stablelm", tmp_path / "drop", eval_capacity_factor=0.5)
    ask = Asker(*load(str(folder)), monkeypatch)
    store = PrefixCache()
    for picture in PICTURES[:2]:
        whole = ask("What is it?", picture, prefix_cache=False)[-1]
        for _ in range(2):
            for options in ({}, {"prefix_cache": store}):
                last, *_, logits = ask("What is it?", picture, **options)
                assert last.reused_tokens == 0
                assert mx.array_equal(logits, whole)


def test_memory_is_bounded(ask_demo, monkeypatch):
    monkeypatch.setattr(ask_demo.model, "openings", opening.Openings(max_bytes=10))
    ask_demo("What is it?", PICTURES[0])
    assert ask_demo.model.openings.nbytes == 0
    assert not ask_demo("What is it?", PICTURES[0])[0].reused_tokens
    ask_demo.model.openings = None
    ask_demo("What is it?", PICTURES[0])
    config, heads = ask_demo.model.language_model.config, ask_demo.model.make_cache()
    length = before(ask_demo.processor, "What is it?", PICTURES[:1])
    assert ask_demo.model.openings.nbytes <= 2 * 4 * len(heads) * length * config.hidden_size


@pytest.mark.parametrize(
    ("options", "reuses"),
    [
        ({"max_kv_size": 4096}, False),  # a cache that may forget is filled in another order
        ({"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}, True),
        ({"draft": "prompt-lookup"}, True),
        ({"prefill_step_size": 8}, True),
    ],
    ids=["rotating", "quantised", "drafts", "chunks"],
)
def test_other_caches(models, monkeypatch, options, reuses):  # noqa: F811
    ask = Asker(*models("llava"), monkeypatch)
    ask("What is it?", PICTURES[0])
    last, ids, *_ = ask("What is it?", PICTURES[1], **options)
    assert (last.reused_tokens > 0) == reuses
    assert ids == ask("What is it?", PICTURES[1], prefix_cache=False, **options)[1]


def test_text_alone_and_a_prefix_cache_are_no_concern_of_it(demo, ask_demo):
    generate(*demo, "What is red?", max_tokens=1)
    generate(*demo, "What?", PICTURES[:1], max_tokens=1, prefix_cache=PrefixCache())
    assert demo[0].openings is None


def test_threads_share_it(demo, ask_demo):
    def answer(picture):
        return generate(*demo, "What is it?", [picture], max_tokens=TOKENS)

    want = [answer(picture) for picture in PICTURES] * 2
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(answer, PICTURES * 2)) == want


def test_a_planted_fault_is_caught(models, monkeypatch):  # noqa: F811
    """The keys and values of other words."""
    ask = Asker(*models("fastvlm"), monkeypatch)
    ask("What is it?", PICTURES[0])
    keys = opening._keys
    monkeypatch.setattr(opening, "_keys", lambda ids: keys(np.zeros(len(ids), int)))
    monkeypatch.setattr(ask.model, "openings", None)
    system = [{"role": "system", "content": "Answer in numbers."}]
    question = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What is it?"}]}]
    ask(system + question, PICTURES[0])
    logits = ask("What is it?", PICTURES[0])[-1]
    whole = ask("What is it?", PICTURES[0], prefix_cache=False)[-1]
    assert mx.abs(logits - whole).max().item() > 1e-2 * mx.abs(whole).max().item()


@pytest.fixture
def idle(monkeypatch):
    """As on a GPU with time to spare while a picture is read, for a model of any size."""
    monkeypatch.setattr(opening, "idle_meanwhile", lambda: True)
    monkeypatch.setattr(opening, "WORTH", 0)


def test_on_a_gpu_it_is_under_way_before_the_picture_is_read(family, ask, idle, monkeypatch):  # noqa: F811
    name, model, processor = family
    told, opened, run = [], prompt.open_picture, type(model.language_model).__call__

    def counted(this, embeddings, *more, **options):
        told.append(embeddings.shape[1])
        return run(this, embeddings, *more, **options)

    monkeypatch.setattr(prompt, "open_picture", lambda *what: told.append("read") or opened(*what))
    monkeypatch.setattr(type(model.language_model), "__call__", counted)
    whole = processor("What is it?", PICTURES[:1]).input_ids.shape[1]
    told.clear()
    last, ids, _, logits = ask("What is it?", PICTURES[0])
    begun = told[: told.index("read")]
    assert bool(begun) == (name != "fuyu")
    assert told[told.index("read") + 1] == whole - sum(begun)
    assert last.reused_tokens == 0  # this prompt has computed all of it
    _, cold, _, all_of_it = ask("What is it?", PICTURES[0], prefix_cache=False)
    assert ids == cold
    assert mx.abs(logits - all_of_it).max().item() < 1e-4 * mx.abs(all_of_it).max().item()
    told.clear()
    assert ask("What is it?", PICTURES[1])[0].reused_tokens == before(
        processor, "What is it?", PICTURES[:1]
    )
    assert told[0] == "read"


def test_on_a_gpu_nothing_waits_either(demo, ask_demo, idle, monkeypatch):
    waits = Waits(monkeypatch)
    next(stream_generate(*demo, "What?", PICTURES[:1], max_tokens=TOKENS))
    assert (waits.blocking, waits.queued) == (0, 3)


def test_what_is_begun_ahead_has_an_embedding(demo, ask_demo, idle, monkeypatch):
    """MLX would read other memory."""
    begun = []
    monkeypatch.setattr(opening.Opening, "set_out", lambda self, ids: begun.append(ids))
    monkeypatch.setattr(type(demo[1]), "opening", lambda self, segments: [1 << 20])
    with pytest.raises(UsageError, match="the prompt has token 1048576"):
        generate(*demo, "What?", PICTURES[:1])
    assert not begun


def test_nothing_is_begun_ahead_for_a_cache_that_may_forget(demo, ask_demo, idle, monkeypatch):
    begun = []
    monkeypatch.setattr(opening.Opening, "set_out", lambda self, ids: begun.append(ids))
    generate(*demo, "What?", PICTURES[:1], max_tokens=1, max_kv_size=4096)
    assert not begun
    generate(*demo, "What?", PICTURES[:1], max_tokens=1)
    assert begun


def test_it_is_begun_ahead_only_where_the_device_gains_more_than_the_graph_costs(monkeypatch):
    def model(width, unread=None):
        config = SimpleNamespace(hidden_size=width)
        language = SimpleNamespace(config=config, splits=lambda length: True)
        return SimpleNamespace(unread=unread, language_model=language)

    assert not opening.worth_ahead(model(4096), 35)  # on a CPU
    monkeypatch.setattr(opening, "idle_meanwhile", lambda: True)
    assert opening.worth_ahead(model(4096), 35)  # LLaVA-1.5-7B
    assert not opening.worth_ahead(model(896), 14)  # FastVLM-0.5B
    assert not opening.worth_ahead(model(4096, unread=lambda: None), 35)
    assert not opening.worth_ahead(model(4096), 2049)  # which is prefilled in chunks
    assert not opening.worth_ahead(model(4096), 35, step=34)


def test_nothing_is_begun_ahead_that_is_longer_than_a_step_of_the_prefill(
    demo, idle, monkeypatch, capsys
):
    steps, picture = [], str(IMAGES / "shapes.png")
    monkeypatch.setattr(opening, "worth_ahead", lambda model, length, step: steps.append(step))
    generate(*demo, "What?", [picture], max_tokens=1, prefill_step_size=8)
    asked = ["generate", "--model", "demo", "--image", picture, "-p", "What?"]
    assert main([*asked, "--max-tokens", "1", "--prefill-step-size", "8"]) == 0
    assert steps == [8, 8]
