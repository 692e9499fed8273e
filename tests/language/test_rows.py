"""Several sequences in one step: every row's logits are those it has alone."""

import mlx.core as mx
import pytest

from mlx_vlm_edge.language import eve2, llama, moe_llava, persimmon
from mlx_vlm_edge.language.cache import KVCache, QuantizedKVCache, RotatingKVCache
from mlx_vlm_edge.language.rows import rows_of

from ..parity import FLOAT32, distance

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SIZES = {
    "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
MOE = SIZES | {
    "num_key_value_heads": 4,
    "moe": {"moe_layers_idx": [0], "num_experts": [4], "eval_capacity_factor": 0.5},
}
KINDS = {
    "plain": KVCache,
    "quantised": lambda: QuantizedKVCache(32, 8),
    "rotating": lambda: RotatingKVCache(8, 2),
}
# Rows in one matrix product differ in the last bit from one alone, and where that puts a value into
# another of the 255 steps of its group, it is off by one step.
LIMITS = {"plain": FLOAT32, "rotating": FLOAT32, "quantised": 4e-3}
LENGTHS = (11, 3, 6)


def decoder(family: str):
    if family == "persimmon":
        return persimmon.LanguageModel(persimmon.TextConfig.from_dict(SIZES))
    if family.startswith("moe"):
        return moe_llava.LanguageModel(moe_llava.TextConfig.of(MOE, family.split()[1]))
    config = SIZES | ({"rope_scaling": LLAMA3} if family == "llama3" else {})
    module = eve2 if family == "eve2" else llama
    return module.LanguageModel(llama.TextConfig.from_dict(config, "qwen2"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama3", "qwen2", "persimmon", "eve2", "moe phi", "moe qwen"])
def test_a_row_has_the_logits_it_has_alone(family, kind):
    mx.random.seed(0)
    model = decoder(family)
    together = [[KINDS[kind]() for _ in range(2)] for _ in LENGTHS]
    alone = [[KINDS[kind]() for _ in range(2)] for _ in LENGTHS]
    for length, one, other in zip(LENGTHS, together, alone, strict=True):
        prompt = mx.random.normal((1, length, 128))
        model(prompt, one)
        model(prompt, other)
    for _ in range(4):
        tokens = mx.random.randint(0, 64, (3, 1))
        got = model(model.embed(tokens), rows_of(together))
        for row, caches in enumerate(alone):
            want = model(model.embed(tokens[row : row + 1]), caches)
            assert distance(got[row : row + 1], want) < LIMITS[kind]


def test_rows_leave_and_join_between_steps():
    mx.random.seed(0)
    model = decoder("qwen2")
    first, second, third = ([KVCache(), KVCache()] for _ in range(3))
    for length, caches in zip(LENGTHS, (first, second, third), strict=True):
        model(mx.random.normal((1, length, 128)), caches)
    token = mx.array([[5]])
    model(model.embed(mx.array([[5], [5]])), rows_of([first, second]))
    model(model.embed(mx.array([[5], [5]])), rows_of([second, third]))
    assert [caches[0].offset for caches in (first, second, third)] == [12, 5, 7]
    by_two = model(model.embed(mx.array([[5], [5]])), rows_of([third, second]))
    second[0].trim(1), second[1].trim(1)
    assert distance(model(model.embed(token), second), by_two[1:]) < FLOAT32


def test_more_than_one_position_of_each_row_is_refused():
    with pytest.raises(ValueError, match="one position at a time"):
        rows_of([[KVCache()], [KVCache()]])[0].make_mask(2)
