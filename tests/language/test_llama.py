"""The decoder against transformers' Qwen2 and Llama, whole, in chunks and token by token."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.language import llama
from mlx_vlm_edge.language.cache import KVCache, QuantizedKVCache, RotatingKVCache
from mlx_vlm_edge.language.llama import LanguageModel, TextConfig

from ..parity import FLOAT32, distance

KINDS = [
    "qwen2",
    "qwen2 tied",
    "qwen2 one kv head",
    "llama",
    "llama biases",
    "llama wide head",
    "llama llama3",
    "llama linear",
]
IDS = np.random.default_rng(5).integers(0, 128, 70)


@pytest.fixture(scope="module")
def references():
    from ..reference import decoder

    built = {}

    def get(kind, width=64):
        if (kind, width) not in built:
            built[kind, width] = decoder.build(kind, width)
        return built[kind, width]

    return get


def build(reference, *, fused=True, dtype=mx.float32):
    model = LanguageModel(TextConfig.from_dict(reference.config, reference.model_type))
    weights = {name: mx.array(array) for name, array in reference.weights.items()}
    expected = {name for name, _ in tree_flatten(model.parameters())}
    assert set(weights) == expected
    model.update(tree_unflatten(list(weights.items())))
    model.update(tree_map(lambda p: p.astype(dtype), model.parameters()))
    if fused:
        model.fuse()
    return model


def run(model, ids, cache=None, **options):
    return model(model.embed(mx.array(ids)[None]), cache, **options)[0].astype(mx.float32)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits(references, kind, fused):
    reference = references(kind)
    assert distance(run(build(reference, fused=fused), IDS), reference.logits(IDS)) < FLOAT32


@pytest.mark.parametrize("kind", ["qwen2", "llama biases"])
def test_logits_in_bfloat16_as_near_as_the_original(references, kind):
    import torch

    from ..reference import decoder

    want = references(kind).logits(IDS)
    theirs = decoder.build(kind)
    theirs.model.to(torch.bfloat16)
    allowed = 1.4 * distance(theirs.logits(IDS), want)
    got = run(build(references(kind), dtype=mx.bfloat16), IDS)
    assert distance(got, want) < allowed < 0.1


def test_last_only_is_the_last_row(references):
    model = build(references("qwen2"))
    assert mx.allclose(run(model, IDS, last_only=True), run(model, IDS)[-1:], atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "llama llama3"])
@pytest.mark.parametrize("chunks", [[70], [69, 1], [1] * 70, [32, 32, 6], [40] + [1] * 30])
def test_chunks_and_single_tokens_give_the_full_forward(references, kind, chunks):
    reference = references(kind)
    model, rows, start = build(reference), [], 0
    cache = model.make_cache()
    for length in chunks:
        rows.append(run(model, IDS[start : start + length], cache))
        start += length
    assert [layer.offset for layer in cache] == [70] * 3
    assert distance(mx.concatenate(rows), reference.logits(IDS)) < FLOAT32


def test_a_trimmed_cache_forgets(references):
    model = build(references("qwen2"))
    cache = model.make_cache()
    run(model, IDS[:50], cache)
    for layer in cache:
        assert layer.trim(20) == 20
    rows = run(model, IDS[30:], cache)
    assert distance(rows, references("qwen2").logits(IDS)[30:]) < FLOAT32


def test_a_rotating_cache_with_room_changes_nothing(references):
    reference = references("qwen2")
    model = build(reference)
    cache = [RotatingKVCache(100, keep=4) for _ in range(3)]
    rows = [
        run(model, IDS[:40], cache),
        *(run(model, IDS[i : i + 1], cache) for i in range(40, 70)),
    ]
    assert distance(mx.concatenate(rows), reference.logits(IDS)) < FLOAT32


def test_a_full_rotating_cache_sees_what_it_keeps(references):
    """One layer deep, the last row equals a full forward with the evicted positions masked."""
    model = build(references("qwen2"))
    model.model.layers = model.model.layers[:1]
    cache = [RotatingKVCache(24, keep=8)]
    run(model, IDS[:20], cache)
    for i in range(20, 70):
        last = run(model, IDS[i : i + 1], cache)
    visible = np.zeros((70, 70), bool)
    visible[69, :8] = visible[69, 54:] = True
    visible[np.arange(69), np.arange(69)] = True
    x = model.embed(mx.array(IDS)[None])
    x = model.model.layers[0](x, mx.array(visible), None)
    want = model.lm_head(model.model.norm(x[:, -1]))
    assert distance(last, want) < FLOAT32


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.02), (4, 0.3)])
def test_a_quantised_cache_is_near(references, bits, limit):
    reference = references("qwen2", 256)
    model = build(reference)
    cache = [QuantizedKVCache(64, bits) for _ in range(3)]
    rows = [
        run(model, IDS[:40], cache),
        *(run(model, IDS[i : i + 1], cache) for i in range(40, 70)),
    ]
    assert distance(mx.concatenate(rows), reference.logits(IDS)) < limit


def test_a_cache_quantised_on_the_way_is_near(references):
    reference = references("qwen2", 256)
    model = build(reference)
    cache = model.make_cache()
    run(model, IDS[:40], cache)
    cache = [layer.to_quantized(64, 8) for layer in cache]
    assert distance(run(model, IDS[40:], cache), reference.logits(IDS)[40:]) < 0.02


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize(("bits", "limit"), [(8, 0.05), (4, 0.6)])
def test_quantised_weights(references, bits, limit, fused):
    """Near the original, and as exact as float32 to the network with the rounded weights."""
    reference = references("qwen2", 128)
    model = build(reference, fused=False)
    nn.quantize(model, group_size=64, bits=bits)
    rounded = build(reference, fused=False)
    nn.quantize(rounded, group_size=64, bits=bits)
    dequantise(rounded)
    if fused:
        model.fuse()
        assert "qkv_proj" in model.model.layers[0].self_attn
        assert "gate_up_proj" in model.model.layers[0].mlp
    got = run(model, IDS)
    assert distance(got, run(rounded, IDS)) < FLOAT32
    assert FLOAT32 < distance(got, reference.logits(IDS)) < limit


def dequantise(model):
    """Put plain layers with the rounded weights in the place of quantised ones."""
    plain = []
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
            continue
        weight = mx.dequantize(
            layer.weight, layer.scales, layer.biases, group_size=layer.group_size, bits=layer.bits
        )
        if isinstance(layer, nn.QuantizedEmbedding):
            new = nn.Embedding(*weight.shape)
        else:
            new = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in layer)
            if "bias" in layer:
                new.bias = layer.bias
        new.weight = weight
        plain.append((name, new))
    model.update_modules(tree_unflatten(plain))


def test_layers_of_different_bits_stay_apart(references):
    reference = references("qwen2", 128)
    model, mixed = build(reference, fused=False), build(reference, fused=False)
    for each in (model, mixed):
        nn.quantize(
            each,
            class_predicate=lambda path, m: (
                hasattr(m, "to_quantized")
                and {"group_size": 64, "bits": 8 if "v_proj" in path or "up_proj" in path else 4}
            ),
        )
    mixed.fuse()
    assert "qkv_proj" not in mixed.model.layers[0].self_attn
    assert mx.array_equal(run(mixed, IDS), run(model, IDS))


def test_fusing_holds_one_copy_of_every_weight(references):
    apart, fused = build(references("qwen2"), fused=False), build(references("qwen2"))
    sizes = [sum(p.nbytes for _, p in tree_flatten(m.parameters())) for m in (apart, fused)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    "fault",
    [
        ("Attention._rope", lambda self, x, offset: x),
        ("rope_periods", lambda config: None),
        ("Block.__call__", lambda self, x, mask, cache, last_only=False: x + self.mlp(x)),
        ("swiglu", lambda gate, up: nn.gelu(gate) * up),
    ],
    ids=["no rope", "no rope scaling", "missing attention", "gelu for silu"],
)
def test_a_fault_is_caught(references, monkeypatch, fault):
    reference = references("llama llama3")
    monkeypatch.setattr(f"{llama.__name__}.{fault[0]}", fault[1])
    assert distance(run(build(reference), IDS), reference.logits(IDS)) > 50 * FLOAT32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"num_attention_heads": 0}, "size"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "last 8 "),
        (
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"]},
            "use_sliding_window",
        ),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(references, change, message):
    config = references("qwen2").config | change
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(UsageError, match=message):
        LanguageModel(TextConfig.from_dict(config, "qwen2"))


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 8},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 28},
        {"use_sliding_window": True, "sliding_window": 1 << 20, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 2},
    ],
)
def test_a_window_that_no_layer_has_or_that_takes_all_in_changes_nothing(references, change):
    config = references("qwen2").config
    assert TextConfig.from_dict(config | change, "qwen2") == TextConfig.from_dict(config, "qwen2")


def test_caches_are_plain_by_default(references):
    assert all(type(layer) is KVCache for layer in build(references("qwen2")).make_cache())
