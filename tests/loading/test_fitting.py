"""What will not fit is refused before it is read or fetched, with a setting that does."""

import json
import re
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from PIL import Image

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.checkpoint.files import read_whole
from mlx_vlm_edge.cli import Parser, batch, flags, main, serve
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.hub.models import ALIASES, PYTORCH, obtain
from mlx_vlm_edge.language.cache import QuantizedKVCache
from mlx_vlm_edge.loading import cost, fitting, memory
from mlx_vlm_edge.loading.load import LoadOptions, read_checkpoint

from ..memory import Peak

AS_IT_IS = LoadOptions(dtype="bfloat16")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty Hub cache, and MLX's limits as they were."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    limits = mx.set_cache_limit(0), mx.get_memory_limit()
    mx.set_cache_limit(limits[0])
    yield
    mx.set_cache_limit(limits[0])
    mx.set_memory_limit(limits[1])


def test_a_model_that_is_not_here_is_refused_by_its_shipped_config():
    with pytest.raises(UsageError) as refused:
        fitting.check_fits("fastvlm-7b", AS_IT_IS, 10**10, 256)
    line = str(refused.value)
    assert "fastvlm-7b would take 16.3" in line
    assert re.search(r"; --bits 8 takes 9\.\d+ GB$", line)
    fitting.check_fits("fastvlm-7b", LoadOptions(dtype="bfloat16", bits=8), 10**10, 256)


def test_it_is_refused_by_its_repository_before_it_is_fetched(monkeypatch):
    monkeypatch.setattr(fitting, "obtain", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(UsageError, match="apple/FastVLM-7B would take"):
        fitting.check_fits("apple/FastVLM-7B", AS_IT_IS, 4 * 10**9, 256)


def test_a_folder_goes_before_an_alias_of_its_name(tmp_path, monkeypatch):
    """As in `obtain`: what is loaded is what is judged."""
    block = {"bits": 4, "group_size": 64}
    folder = tmp_path / "fastvlm-0.5b"
    folder.mkdir()
    config = configs.read("fastvlm-0.5b") | {"quantization": block}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    assert obtain(folder.name).samefile(folder)
    assert cost.config_of(folder.name)["quantization"] == block
    assert fitting._config(folder.name, AS_IT_IS)["quantization"] == block


def limit_of(rows, answer):
    """Bytes in which so many answers of FastVLM-0.5B are under way together, and no more."""
    whole = memory.needed(fitting._config("fastvlm-0.5b", AS_IT_IS), dtype="bfloat16")
    each = (whole.prompt_tokens + answer) * whole.cached
    return sum(memory.by_use(whole, 0).values()) + int((rows + 0.5) * each)


def asked(limit, answer, **more):
    """The flags of a verb that answers."""
    usual = {name: flags.SAMPLING[name][1] for name in flags.CACHE}
    return Namespace(**{"max_memory": str(limit), "max_tokens": answer} | usual | more)


def test_as_many_are_answered_together_as_have_room_for_their_caches(capsys):
    limit = limit_of(3, 1000)
    assert fitting.check_fits("fastvlm-0.5b", AS_IT_IS, limit, 1000, rows=2)[0] == 2
    assert fitting.check_fits("fastvlm-0.5b", AS_IT_IS, limit, 1000, rows=8)[0] == 3
    args = asked(limit, 1000)
    assert flags.fit_into_memory(args, "fastvlm-0.5b", AS_IT_IS, rows=8) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: 3 of 8 are answered together: ")
    assert flags.fit_into_memory(args, "fastvlm-0.5b", AS_IT_IS, rows=3) == 3
    assert not capsys.readouterr().err


def test_no_cache_has_more_positions_than_the_context_or_than_it_may(capsys):
    """MobileVLM's context is 2,048: the default of 4,096 tokens is cut there."""
    four = LoadOptions(dtype="bfloat16", bits=4)
    name, limit = "mobilevlm-v2-1.7b", 5 * 10**9
    assert fitting.check_fits(name, four, limit, 4096, rows=8)[0] == 8
    whole = memory.needed(configs.read(name), dtype="bfloat16")
    assert whole.context == 2048
    fixed = sum(memory.by_use(whole, 0).values())
    limit = fixed + 3 * 2048 * whole.cached
    assert flags.fit_into_memory(asked(limit, 4096), name, AS_IT_IS, rows=8) == 3
    assert f" a picture and {2048 - whole.prompt_tokens:,} tokens each" in capsys.readouterr().err
    rotating = asked(limit, 4096, max_kv_size=1024)
    assert flags.fit_into_memory(rotating, name, AS_IT_IS, rows=8) == 6
    capsys.readouterr()
    none = asked(fixed + 3 * 208 * whole.cached, 4096, max_kv_size=208)
    assert whole.prompt_tokens == 208
    assert flags.fit_into_memory(none, name, AS_IT_IS, rows=8) == 3
    assert "tokens" not in capsys.readouterr().err


def test_quantised_caches_leave_room_for_more():
    name, options = "fastvlm-0.5b", AS_IT_IS
    whole = memory.needed(fitting._config(name, options), dtype="bfloat16")
    positions, limit = whole.prompt_tokens + 1000, limit_of(3, 1000)

    def rows(**caches):
        return fitting.check_fits(name, options, limit, 1000, rows=99, caches=caches)[0]

    assert rows(kv_bits=4, quantized_kv_start=positions) == rows() == 3
    # 4.5 bits of 16, scales and biases of 64 among them, and a prompt that is not quantised yet
    assert rows(kv_bits=4, quantized_kv_start=0) == 12
    assert rows(kv_bits=4, quantized_kv_start=positions // 2) == 7
    long = int(3.4 * positions)
    with pytest.raises(UsageError, match="has room for"):
        fitting.check_fits(name, options, limit_of(1, 1000), long)
    fitting.check_fits(
        name, options, limit_of(1, 1000), long, caches={"kv_bits": 4, "quantized_kv_start": 0}
    )


def test_a_prompt_in_smaller_parts_takes_less():
    """Fuyu has no encoder: of its activations the language model's are the most."""
    name, steps = "fuyu-8b", {"prefill_step_size": 256}
    config = fitting._config(name, AS_IT_IS)
    whole = memory.needed(config, dtype="bfloat16")
    each = (whole.prompt_tokens + 100) * whole.cached
    limit = sum(memory.by_use(whole, whole.prompt_tokens + 100, step=256).values())
    assert fitting.check_fits(name, AS_IT_IS, limit, 100, caches=steps)[0] == 1
    with pytest.raises(UsageError, match="fuyu-8b would take"):
        fitting.check_fits(name, AS_IT_IS, limit, 100)
    more = limit + int(2.1 * each)
    assert fitting.check_fits(name, AS_IT_IS, more, 100, rows=9, caches=steps)[0] == 3
    assert fitting.check_fits(name, AS_IT_IS, more, 100, rows=9)[0] == 2
    assert flags.fit_into_memory(asked(more, 100, **steps), name, AS_IT_IS, rows=9) == 3
    eight = memory.needed(config, dtype="bfloat16", quantize=8)
    least = sum(memory.by_use(eight, eight.prompt_tokens + 1, step=256).values())
    with pytest.raises(UsageError, match="--bits 8 takes"):
        fitting.check_fits(name, AS_IT_IS, least, 100, caches=steps)


def test_a_prompt_of_full_numbers_has_room_before_it_is_quantised():
    """The last one that comes is prefilled in full numbers beside the others."""
    whole = memory.needed(fitting._config("fastvlm-0.5b", AS_IT_IS), dtype="bfloat16")
    caches, prompt = memory.Caches(kv_bits=4, quantized_kv_start=0), whole.prompt_tokens
    fixed, each = sum(memory.by_use(whole, 0).values()), caches.nbytes(whole, prompt + 10)
    full = prompt * whole.cached
    assert full > 3 * each, "of a short answer"

    def rows(spare):
        return memory.rows(whole, fixed + spare, prompt + 10, 99, caches=caches)

    assert rows(full) == rows(full + each - 1) == 1
    assert rows(full + 5 * each) == 6


def test_positions_before_the_first_that_is_quantised_are_full():
    cost = memory.needed(fitting._config("fastvlm-0.5b", AS_IT_IS), dtype="bfloat16")
    caches = memory.Caches(kv_bits=4, quantized_kv_start=1000)
    assert caches.room(cost, 999 * cost.cached) == 999
    assert caches.room(cost, 1000 * cost.cached) == 1000 * cost.cached // caches.each(cost) > 3000
    for positions in (10, 999, 5000):
        assert caches.room(cost, caches.nbytes(cost, positions)) >= positions


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (3, 32), (8, 64)])
def test_a_quantised_position_takes_what_the_cache_has(bits, group):
    cost = memory.needed(fitting._config("fastvlm-0.5b", AS_IT_IS), dtype="bfloat16")
    cache = QuantizedKVCache(group, bits)
    keys = mx.zeros((1, 2, 256, 64), mx.bfloat16)  # of each of the 24 layers
    cache.update_and_fetch(keys, keys)
    held = sum(array.nbytes for part in cache.state[:2] for array in part)
    caches = memory.Caches(kv_bits=bits, kv_group_size=group)
    assert caches.each(cost) * 256 == 24 * held


@pytest.mark.parametrize("verb", [serve, batch])
def test_the_engine_has_the_rows_that_fit(verb, monkeypatch):
    made = []
    monkeypatch.setattr(
        "mlx_vlm_edge.generation.engine.Engine", lambda *_, **said: made.append(said)
    )
    for module in (flags, batch):
        monkeypatch.setattr(module, "load_whole", lambda *_: (None, None))
    args = asked(limit_of(3, 1000), 1000, rows=8, cache_dir=None, ttft_budget=None)
    if verb is serve:
        limits = Namespace(rows=8, waiting=4)
        serve._engine(args, "fastvlm-0.5b", limits, {}, AS_IT_IS)
    else:
        batch._engine(args, "fastvlm-0.5b", AS_IT_IS)
    assert made[0]["rows"] == 3


def test_nothing_is_promised_where_nothing_fits():
    with pytest.raises(UsageError) as refused:
        fitting.check_fits("fastvlm-7b", AS_IT_IS, 10**9, 256)
    assert "--bits" not in str(refused.value)


def test_an_answer_that_is_too_long_is_told_how_long_it_may_be():
    whole = memory.needed(fitting._config("fastvlm-0.5b", AS_IT_IS), dtype="bfloat16")
    fixed = sum(memory.by_use(whole, 0).values())
    limit = fixed + (whole.prompt_tokens + 100) * whole.cached
    fitting.check_fits("fastvlm-0.5b", AS_IT_IS, limit, 100)
    with pytest.raises(UsageError, match=r"--max-tokens 100 fits$"):
        fitting.check_fits("fastvlm-0.5b", AS_IT_IS, limit, 101)


def test_adapters_that_requests_name_count(monkeypatch):
    whole = memory.needed(fitting._config("fastvlm-0.5b", AS_IT_IS), dtype="bfloat16")
    limit = sum(memory.by_use(whole, whole.prompt_tokens + 100).values())
    fitting.check_fits("fastvlm-0.5b", AS_IT_IS, limit + 10**8, 100, 10**8)
    with pytest.raises(UsageError, match=r"100 MB adapters.*; --bits 8 takes"):
        fitting.check_fits("fastvlm-0.5b", AS_IT_IS, limit, 100, 10**8)
    monkeypatch.setattr(fitting, "_total", lambda: 10**9)
    with pytest.raises(UsageError, match="900 MB adapters"):
        fitting.check_fits("demo", AS_IT_IS, None, 100, 9 * 10**8)


def as_pytorch(folder):
    """A model's weights in a file of PyTorch's."""
    import torch
    from safetensors.torch import load_file

    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return folder


def test_files_that_are_read_whole_count_before_they_are_quantised(tmp_path):
    """The arrays of PyTorch's are there at once, of safetensors none."""
    source = obtain("demo")
    folder = as_pytorch(Path(shutil.copytree(source, tmp_path / "torch")))
    size = read_whole(folder)
    assert size == (folder / "pytorch_model.bin").stat().st_size
    assert read_whole(source) == 0
    taken = {}
    for each in (folder, source):
        peak = Peak()
        arrays = read_checkpoint(each)
        taken[each] = peak.bytes
        del arrays
    assert taken[folder] > 0.95 * size
    assert taken[source] < 0.05 * size
    four = LoadOptions(dtype="bfloat16", bits=4)
    limit = size + memory.PROGRAM
    with pytest.raises(UsageError, match=r"or more while it is read, at any --bits"):
        fitting.check_fits(str(folder), four, limit - 1, 1)


def test_a_model_of_pytorchs_files_is_refused_before_it_is_fetched():
    four = LoadOptions(dtype="bfloat16", bits=4)
    with pytest.raises(UsageError, match="while it is read"):
        fitting.check_fits(ALIASES["convllava-7b-768"], four, 10**10, 256)
    with pytest.raises(UsageError, match=r"take 15\.\d+ GB or more while it is read") as refused:
        fitting.check_fits("convllava-7b-768", four, 10**10, 256)
    assert "`mlx-vlm-edge convert convllava-7b-768 -o DIR`" in str(refused.value)
    assert "\n" not in str(refused.value)
    fitting.check_fits("convllava-7b-768", four, 16 * 10**9, 256)
    assert ALIASES.keys() > PYTORCH


def test_what_the_machine_has_is_the_limit_by_default(monkeypatch):
    monkeypatch.setattr(fitting, "_total", lambda: 8 * 10**9)
    with pytest.raises(UsageError, match="would take"):
        fitting.check_fits("fastvlm-7b", AS_IT_IS, None, 256)
    fitting.check_fits("fastvlm-0.5b", AS_IT_IS, None, 256)
    monkeypatch.setattr(fitting, "_total", lambda: None)
    fitting.check_fits("fastvlm-7b", AS_IT_IS, None, 256)


def test_what_plainly_fits_is_not_counted(monkeypatch):
    """The first token waits for it."""
    monkeypatch.setattr(fitting, "_needed", None)
    fitting.check_fits(str(obtain("demo")), LoadOptions(), None, 256)
    fitting.check_fits("demo", LoadOptions(), None, 256)


def test_mlx_keeps_no_more_buffers_than_a_gigabyte():
    mx.set_cache_limit(10 * fitting.BUFFERS)
    fitting.limit_buffers()
    assert mx.set_cache_limit(1000) == fitting.BUFFERS
    fitting.limit_buffers()
    assert mx.set_cache_limit(1000) == 1000, "a smaller limit is not raised"
    fitting.limit_buffers(3 * 10**9)
    assert mx.get_memory_limit() == 3 * 10**9


@pytest.mark.parametrize("verb", ["generate", "chat", "batch"])
def test_the_flag(verb, capsys, monkeypatch, tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    asks = {
        "generate": ["-p", "Hi"],
        "chat": [],
        "batch": [str(picture), "-p", "Hi", "-o", str(tmp_path / "out.jsonl")],
    }
    monkeypatch.setattr("mlx_vlm_edge.cli.chat._piped", lambda: "Hi")
    assert main([verb, *asks[verb], "--model", "demo", "--max-memory", "20MB"]) == 2
    assert "demo would take" in capsys.readouterr().err
    assert main([verb, *asks[verb], "--model", "demo", "--max-memory", "much"]) == 2
    assert "no size of memory" in capsys.readouterr().err


def test_the_flag_of_serve():
    """Whether a model fits is told once the server listens: its loading is what refuses."""
    parser = Parser(prog="serve")
    serve.add_arguments(parser)
    args = parser.parse_args(["--model", "demo", "--max-memory", "20MB"])
    with pytest.raises(UsageError, match="demo would take"):
        flags.fit_into_memory(args, "demo", LoadOptions())


@pytest.mark.parametrize(("largest", "most"), [(None, 256), (512, 64)])
def test_a_picture_may_have_the_tokens_of_the_largest_automatic_size(largest, most):
    """What is in it is seen when it is read."""
    asked = LoadOptions(resolution="auto", max_resolution=largest, visual_tokens=most)
    fitting.check_pictures("fastvlm-0.5b", asked, [(1600, 1200)])
    more = replace(asked, visual_tokens=most + 1)
    with pytest.raises(UsageError, match=f"the picture has {most} and no more"):
        fitting.check_pictures("fastvlm-0.5b", more, [(1600, 1200)])


def test_an_answer_within_the_limit(capsys):
    asked = ["generate", "--model", "demo", "-p", "Hi", "--max-tokens", "2"]
    assert main([*asked, "--max-memory", "1GB"]) == 0
    assert capsys.readouterr().out
