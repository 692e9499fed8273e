"""What will not fit is refused before it is read or fetched, with a setting that does."""

import re
from dataclasses import replace

import mlx.core as mx
import pytest
from PIL import Image

from mlx_vlm_edge.cli import Parser, flags, main, serve
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.hub.models import obtain
from mlx_vlm_edge.loading import fitting, memory
from mlx_vlm_edge.loading.load import LoadOptions

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


def test_nothing_is_promised_where_nothing_fits():
    with pytest.raises(UsageError) as refused:
        fitting.check_fits("fastvlm-7b", AS_IT_IS, 10**9, 256)
    assert "--bits" not in str(refused.value)


def test_an_answer_that_is_too_long_is_told_how_long_it_may_be():
    config = fitting._config("fastvlm-0.5b", AS_IT_IS)
    cost = memory.needed(config, dtype="bfloat16")
    fixed = sum(memory.by_use(cost, 0).values())
    limit = fixed + (cost.prompt_tokens + 100) * cost.cached
    fitting.check_fits("fastvlm-0.5b", AS_IT_IS, limit, 100)
    with pytest.raises(UsageError, match=r"--max-tokens 100 fits$"):
        fitting.check_fits("fastvlm-0.5b", AS_IT_IS, limit, 101)


def test_adapters_that_requests_name_count(monkeypatch):
    config = fitting._config("fastvlm-0.5b", AS_IT_IS)
    cost = memory.needed(config, dtype="bfloat16")
    limit = sum(memory.by_use(cost, cost.prompt_tokens + 100).values())
    fitting.check_fits("fastvlm-0.5b", AS_IT_IS, limit + 10**8, 100, 10**8)
    with pytest.raises(UsageError, match=r"100 MB adapters.*; --bits 8 takes"):
        fitting.check_fits("fastvlm-0.5b", AS_IT_IS, limit, 100, 10**8)
    monkeypatch.setattr(fitting, "_total", lambda: 10**9)
    with pytest.raises(UsageError, match="900 MB adapters"):
        fitting.check_fits("demo", AS_IT_IS, None, 100, 9 * 10**8)


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
        flags.load_model(args, "demo")


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
