"""What a model will take, against what there is, before it is read."""

import mlx.core as mx
import pytest

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.kernels import on_cpu
from mlx_vlm_edge.loading import memory
from mlx_vlm_edge.loading.cost import blueprint, nbytes
from mlx_vlm_edge.picture.preprocessing import Preprocessing


@pytest.fixture(scope="module")
def small():
    return memory.needed(configs.read("fastvlm-0.5b"), dtype="bfloat16")


def test_weights_are_as_load_holds_them_on_this_device():
    config = configs.read("llava-1.5-7b") | {"torch_dtype": "float16"}
    plan = blueprint(config, dtype=None)
    held = mx.float32 if on_cpu() else mx.float16
    assert plan.dtype == held
    assert {p.dtype for p in plan.model.tower.layers[0].fc1.parameters().values()} == {mx.float32}
    assert memory.needed(config).parameters == plan.nbytes
    packed = memory.needed(config, dtype="bfloat16", quantize=4)
    own = {"quantization": {"bits": 4, "group_size": 64}}
    assert packed.parameters == memory.needed(config | own, dtype="bfloat16").parameters
    assert packed.parameters < memory.needed(config, dtype="bfloat16").parameters / 3
    assert nbytes(plan.model) == plan.nbytes


def test_a_larger_picture_needs_more():
    config = configs.read("fastvlm-0.5b")
    small, large = (
        memory.by_use(memory.needed(config, asked=Preprocessing(resolution=side)), 300)
        for side in (256, 1024)
    )
    name = "activations (estimated)"
    assert large[name] > 8 * small[name]
    with pytest.raises(UsageError, match="multiples of 64"):
        memory.needed(config, asked=Preprocessing(resolution=100))


def test_what_will_not_fit_is_refused_with_the_figures():
    cost = memory.needed(configs.read("fastvlm-7b"), dtype="bfloat16")
    parts = memory.by_use(cost, 1000)
    assert parts["weights"] == pytest.approx(15.52e9, rel=0.01)
    assert parts["KV cache"] == 57_344_000
    with pytest.raises(UsageError) as refused:
        memory.fit("fastvlm-7b", cost, 8_000_000_000)
    assert "fastvlm-7b would take 16.3" in str(refused.value)
    assert "(15.52 GB weights + 18 MB KV cache + " in str(refused.value)
    assert "8.00 GB are there" in str(refused.value)
    memory.refuse_too_large("fastvlm-7b", parts, 18_000_000_000)
    memory.refuse_too_large("fastvlm-7b", parts, None)


def test_a_cache_that_does_not_fit_is_shorter(small):
    """Not below the prompt: that is refused."""
    usual = small.prompt_tokens + memory.ANSWER
    assert memory.fit("x", small, None) == memory.fit("x", small, 10**10) == usual
    assert memory.fit("x", small, 10**10, 5000) == 5000
    fixed = sum(memory.by_use(small, 0).values())
    assert memory.fit("x", small, fixed + 400 * small.cached) == 400
    assert memory.fit("x", small, fixed + (small.prompt_tokens + 1) * small.cached) == (
        small.prompt_tokens + 1
    )
    with pytest.raises(UsageError, match="x would take"):
        memory.fit("x", small, fixed + small.prompt_tokens * small.cached)


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6 * 10**9), ("512 mb", 512 * 10**6), ("4.5g", 4.5e9), ("1000", 1000), ("2T", 2e12)],
)
def test_sizes(text, size):
    assert memory.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "6 apples", "0", "nan", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="is no size of memory"):
        memory.parse_size(text)


def test_what_is_usable_is_free_and_what_metal_recommends(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 9000)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 7000})
    assert memory.usable() == 7000
    monkeypatch.setattr(mx, "device_info", dict)
    assert memory.usable() == 9000
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    assert memory.usable() is None
