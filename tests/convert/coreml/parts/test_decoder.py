"""The decoder: both forms against MLX, planted faults, the runner, and models answering whole."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_vlm_edge_convert.coreml import manifest
from mlx_vlm_edge_convert.coreml.check.interpreter import Package
from mlx_vlm_edge_convert.coreml.emit import matrices, transformer
from mlx_vlm_edge_convert.coreml.emit.matrices import original
from mlx_vlm_edge_convert.coreml.export import export
from mlx_vlm_edge_convert.coreml.parity import distance
from mlx_vlm_edge_convert.coreml.part import Options
from mlx_vlm_edge_convert.coreml.parts import decoder, decoder_check
from mlx_vlm_edge_convert.coreml.parts.decoder import CHUNK, DecoderPart
from mlx_vlm_edge_convert.coreml.parts.decoder_reference import loaded_products, pairs
from mlx_vlm_edge_convert.coreml.run import host
from mlx_vlm_edge_convert.coreml.run.host import DecoderHost, Geometry

from mlx_vlm_edge import load, stream_generate
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.language.llama import LanguageModel, TextConfig
from mlx_vlm_edge.models import fastvlm

from ....demo import IMAGES, KNOWN
from .. import schema

QWEN2 = TextConfig(
    hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=96, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e6,
    max_position_embeddings=64, tie_word_embeddings=True, qkv_bias=True,
)  # fmt: skip
LLAMA = TextConfig(
    hidden_size=160, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
    num_key_value_heads=1, vocab_size=70, head_dim=80, rms_norm_eps=1e-5, rope_theta=1e4,
    max_position_embeddings=64, tie_word_embeddings=False, o_bias=True, mlp_bias=True,
    rope_scaling={"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16},
)  # fmt: skip
MODEL, WEIGHT = (
    f"Data/com.apple.CoreML/{name}" for name in ("model.mlmodel", "weights/weight.bin")
)
FORMS = {"stateful": "cpu-gpu", "readonly": "cpu-ne"}


def random_model(config, seed=0):
    """Weights under which no layer's part dies out, so that a fault anywhere shows."""
    mx.random.seed(seed)
    model = LanguageModel(config)

    def drawn(array):
        scale = 1 / math.sqrt(array.shape[-1]) if array.ndim == 2 else 0.3
        noise = mx.random.normal(array.shape) * scale * 1.4
        return noise if array.ndim == 2 else noise + 0.9

    model.update(tree_map(drawn, model.parameters()))
    model.model.embed_tokens.weight = mx.random.normal(model.model.embed_tokens.weight.shape)
    return model


def make(model, form="stateful", precision="fp32", bits=None):
    options = Options(compute=FORMS[form], precision=precision, bits=bits, context=32)
    return DecoderPart(model, options, chunk=8)


@pytest.fixture(scope="module")
def qwen2():
    return random_model(QWEN2)


@pytest.fixture(scope="module")
def llama():
    model = random_model(LLAMA)
    model.fuse()
    return model


@pytest.fixture(scope="module", params=FORMS)
def saved(request, tools, qwen2, tmp_path_factory):
    """A float32 package of each form, and the part that it is of."""
    path = tmp_path_factory.mktemp(request.param) / "decoder.mlpackage"
    made, found = make(qwen2, request.param).verified(path)
    assert all(parity.passed for parity in found.parity)
    return made, path


def worst(made, path):
    """What the graph's comparison finds, relative to what it may find."""
    comparisons = decoder_check.check(made, path).parity
    return max(parity.error / parity.limit for parity in comparisons)


@pytest.mark.parametrize(("name", "form"), [("qwen2", "stateful"), ("llama", "readonly")])
def test_float16_is_near_and_its_graph_exact(request, tools, tmp_path, name, form):
    made = make(request.getfixturevalue(name), form, "fp16")
    _, found = made.verified(tmp_path / "decoder.mlpackage")
    assert [parity.inputs for parity in found.parity] == [
        "the embeddings", "the weights", "norms and biases", "prefill + 8 steps (graph)",
        "prefill + 8 steps", "prefill + 8 steps, the model as it was loaded",
    ]  # fmt: skip
    assert all(parity.passed for parity in found.parity)
    assert found.parity[-1].error > 1e-5  # it did round
    assert found.ranges["layer_1"] < 1000


def test_prefill_and_decode_share_their_weights(saved):
    made, path = saved
    assert {*Package(path).functions} == {"prefill", "prefill_32", "decode"}
    parameters = sum(matrix.weight.weight.size for matrix in _matrices(made.decoder))
    assert (path / WEIGHT).stat().st_size < 1.2 * 4 * parameters


def _matrices(decoder):
    for layer in decoder.layers:
        yield from (*layer.qkv, layer.out, *layer.gate_up, layer.down)
    yield decoder.head


@pytest.mark.parametrize("bits", [4, 8, "palette4"])
def test_compressed_weights(tools, monkeypatch, qwen2, tmp_path, bits):
    """And the head in parts, of which the Neural Engine's form has as many as it needs."""
    monkeypatch.setattr("mlx_vlm_edge_convert.coreml.emit.transformer.HEAD", 48)
    path = tmp_path / "decoder.mlpackage"
    form = "readonly" if bits == "palette4" else "stateful"
    made = make(qwen2, form, "fp16", bits)
    _, found = made.verified(path)
    assert all(parity.passed for parity in found.parity)
    kind = "palettes of 16 for 16 rows" if bits == "palette4" else f"{bits} bits in groups of"
    assert all(each.startswith(kind) for each in made.describe()["weights"])
    logits = [name for name in _block(path, "decode").outputs if "logits" in name]
    assert logits == (["logits"] if form == "stateful" else ["logits_0", "logits_1"])


@pytest.mark.parametrize("bits", [4, 8])
def test_embeddings_in_groups_are_mlx_s(tools, qwen2, tmp_path, bits):
    options = Options(precision="fp16", context=32, embedding_bits=bits)
    made = DecoderPart(qwen2, options, chunk=8)
    _, found = made.verified(tmp_path / "decoder.mlpackage")
    assert all(parity.passed for parity in found.parity), found.parity
    assert made.table.dtype == np.float16
    made.write_files(tmp_path)
    entry = {**made.describe(), "package": "decoder.mlpackage"}
    run = DecoderHost.open(tmp_path, entry, Package(tmp_path / "decoder.mlpackage"))
    assert np.array_equal(run.embeddings, made.table)
    embed = nn.Embedding(1, 1)
    embed.weight = qwen2.model.embed_tokens.weight
    own = np.array(embed.to_quantized(64, bits)(mx.arange(96)))
    assert np.abs(run.embeddings - own).max() < 2e-3 * np.abs(own).max()
    assert made.memory()["embeddings"] == (tmp_path / "embeddings.safetensors").stat().st_size - (
        8 + int.from_bytes((tmp_path / "embeddings.safetensors").read_bytes()[:8], "little")
    )
    assert made.memory()["embeddings"] < 96 * 64 * (bits + 1) / 8


def test_a_quantised_checkpoint_is_exported_as_it_is(tools, tmp_path):
    model = random_model(QWEN2)
    nn.quantize(model, group_size=32, bits=4)
    model.fuse()
    made = make(model)
    _, found = made.verified(tmp_path / "decoder.mlpackage")
    assert all(parity.passed for parity in found.parity)
    assert found.parity[1].error < 1e-6  # the weights, against MLX's
    operations = {op.type for op in _block(tmp_path / "decoder.mlpackage", "decode").operations}
    assert "constexpr_blockwise_shift_scale" in operations


def bfloat16(model):
    model.apply(lambda p: p.astype(mx.bfloat16) if mx.issubdtype(p.dtype, mx.floating) else p)
    return model


@pytest.mark.parametrize(
    ("bits", "form", "precision"),
    [
        (None, "stateful", "fp16"), (None, "readonly", "fp32"), (4, "stateful", "fp16"),
        (4, "stateful", "fp32"), (8, "stateful", "fp16"), (8, "stateful", "mixed"),
        ("palette4", "readonly", "mixed"), ("palette4", "stateful", "fp32"),
    ],
)  # fmt: skip
def test_a_bfloat16_model_takes_every_option(tools, tmp_path, bits, form, precision):
    made = make(bfloat16(random_model(QWEN2)), form, precision, bits)
    _, found = made.verified(tmp_path / "decoder.mlpackage")
    assert all(parity.passed for parity in found.parity), found.parity
    assert found.parity[1].error < (0.2 if bits == "palette4" else 4e-4)
    assert made.warnings() == []
    assert made.describe()["matrices_with_float_offsets"] == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoint_quantised_in_bfloat16_says_what_is_lost(tools, tmp_path, bits):
    """Of 4 bits its offsets are integers again; of 8 bits they cannot be known."""
    model = bfloat16(random_model(QWEN2))
    nn.quantize(model, group_size=32, bits=bits)
    made = make(model, "stateful", "fp16")
    _, found = made.verified(tmp_path / "decoder.mlpackage")
    assert all(parity.passed for parity in found.parity), found.parity
    matrices = 15
    (line,) = made.warnings()
    if bits == 4:
        assert f"of {matrices} of {matrices} matrices are integers again" in line
        assert 1e-3 < found.parity[1].error < 6e-3 < found.parity[1].limit
        assert made.describe()["matrices_with_float_offsets"] == 0
    else:
        assert f"of {matrices} of {matrices} matrices are no integers" in line
        assert found.parity[1].limit == decoder_check.WEIGHTS


@pytest.mark.parametrize(("bits", "says"), [(4, "--bits 4"), (8, "--bits 8"), (None, "the model")])
def test_weights_in_groups_are_refused_on_the_neural_engine(bits, says):
    model = random_model(QWEN2)
    if bits is None:
        nn.quantize(model, group_size=32, bits=4)
    with pytest.raises(UsageError, match=rf"^{says}.* with --compute cpu-ne: .*palette4"):
        make(model, "readonly", "fp16", bits)
    make(model, "stateful", "fp16", bits)


@pytest.mark.parametrize("form", FORMS)
def test_a_head_of_64_values_beside_layers_of_16(tools, qwen2, tmp_path, form):
    options = Options(
        compute=FORMS[form], precision="fp16", bits="palette4", head_bits=6, context=32
    )
    made, found = DecoderPart(qwen2, options, chunk=8).verified(tmp_path / "decoder.mlpackage")
    assert all(parity.passed for parity in found.parity), found.parity
    assert len(made.describe()["weights"]) == 2
    *layers, head = (
        distance(matrix.weight.dense(), original(layer, None)) for layer, matrix in pairs(made)
    )
    assert head < min(layers) / 2


@pytest.mark.parametrize(
    ("form", "bits"), [("readonly", None), ("readonly", "palette4"), ("stateful", 8)]
)
def test_rows_that_pad_the_vocabulary_have_no_logits(tools, qwen2, tmp_path, form, bits):
    """So that none of them is chosen; the embeddings stay as they are."""
    options = Options(compute=FORMS[form], precision="fp16", bits=bits, context=32)
    made = DecoderPart(qwen2, options, chunk=8, tokens=91)
    made, found = made.verified(tmp_path / "decoder.mlpackage")
    assert all(parity.passed for parity in found.parity), found.parity
    run = DecoderHost(Package(tmp_path / "decoder.mlpackage"), made.geometry, made.table)
    assert run.prefill(run.embed([95, 3])).shape == (91,)
    assert len(made.table) == 96


@pytest.mark.parametrize("tokens", [64, 70])
def test_a_part_of_the_head_without_tokens_is_left_out(tools, qwen2, tmp_path, monkeypatch, tokens):
    """Of 96 rows in parts of 32 that begin with tokens."""
    monkeypatch.setattr(transformer, "HEAD", 32)
    options = Options(compute="cpu-ne", precision="fp16", context=32)
    made = DecoderPart(qwen2, options, chunk=8, tokens=tokens)
    made, found = made.verified(tmp_path / "decoder.mlpackage")
    assert all(parity.passed for parity in found.parity), found.parity
    outputs = _block(tmp_path / "decoder.mlpackage", "decode").outputs
    assert sum(name.startswith("logits") for name in outputs) == -(-tokens // 32)


def test_a_bundle_s_logits_are_those_of_tokens(tools, tmp_path, monkeypatch):
    monkeypatch.setattr(fastvlm.Processor, "rows", 500)
    options = Options(context=64, compute="cpu-ne")
    out = export("demo", tmp_path / "out", parts=("decoder",), options=options, verify=False)
    entry = json.loads((out / "manifest.json").read_text())["parts"]["decoder"]
    run = DecoderHost.open(out, entry, Package(out / "decoder.mlpackage"))
    assert run.prefill(run.embed([511])).shape == (500,)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_head_of_its_own_goes_with_palettes(qwen2, bits):
    with pytest.raises(UsageError, match=r"^--head-bits 6 .* use it with --bits palette4$"):
        DecoderPart(qwen2, Options(bits=bits, head_bits=6, context=32))


@pytest.mark.parametrize("bits", [None, 4, 8, "palette4"])
def test_a_program_that_devices_may_not_load_is_told_of(tools, qwen2, tmp_path, monkeypatch, bits):
    made = make(qwen2, "stateful", "fp16", bits)
    assert made.warnings() == []
    made.verified(tmp_path / "decoder.mlpackage")
    nbytes = (tmp_path / "decoder.mlpackage" / WEIGHT).stat().st_size
    monkeypatch.setattr(decoder, "PROGRAM_BYTES", nbytes // 2)
    (line,) = made.warnings()
    assert "in one program, which devices are reported not to load beyond" in line


def test_mlx_is_let_go_before_the_package_is_run(tools, qwen2, tmp_path, monkeypatch):
    order, run = [], Package.run
    monkeypatch.setattr(Package, "run", lambda *args: order.append("run") or run(*args))
    made = replace(make(qwen2), forget=lambda: order.append("forget"))
    made.verified(tmp_path / "decoder.mlpackage")
    assert order[0] == "forget"
    assert order.count("forget") == 1


def _block(path, name, spec=None):
    function = (spec or Package(path).spec).mlProgram.functions[name]
    return function.block_specializations[function.opset]


def test_every_value_has_at_most_rank_4_in_the_neural_engine_s_form(saved):
    made, path = saved
    if made.options.compute == "cpu-ne":
        for name in ("prefill", "decode"):
            ranks = [
                len(output.type.tensorType.dimensions)
                for op in _block(path, name).operations
                for output in op.outputs
            ]
            assert max(ranks) == 4


# Faults of the host: the runner writes, masks, turns or remembers wrongly.


def cache_off_by_one(monkeypatch):
    run = Package.run

    def shifted(self, function, inputs, state=None):
        if function == "decode":
            inputs = {n: x - 1 if n == "position" else x for n, x in inputs.items()}
        outputs = run(self, function, inputs, state)
        moved = {n: np.roll(x, 1, -1) if n.startswith("new_") else x for n, x in outputs.items()}
        return outputs if function == "decode" else moved

    monkeypatch.setattr(Package, "run", shifted)


def position_plus_one(monkeypatch):
    turns = DecoderHost._turns

    def shifted(self, size):
        self.offset += size == 1
        found = turns(self, size)
        self.offset -= size == 1
        return found

    monkeypatch.setattr(DecoderHost, "_turns", shifted)


def lost_cache(monkeypatch):
    step = DecoderHost.step

    def forgetting(self, token):
        offset = self.offset
        self.start()
        self.offset = offset
        return step(self, token)

    monkeypatch.setattr(DecoderHost, "step", forgetting)


def mask_off_by_one(monkeypatch):
    mask = host.mask
    monkeypatch.setattr(host, "mask", lambda offset, *rest: mask(max(offset - 1, 0), *rest))


def mask_of_nothing(monkeypatch):
    mask = host.mask
    monkeypatch.setattr(host, "mask", lambda *arguments: mask(*arguments) * 0)


@pytest.mark.parametrize(
    "fault", [cache_off_by_one, position_plus_one, lost_cache, mask_off_by_one, mask_of_nothing]
)
def test_a_fault_of_the_host_is_found(saved, monkeypatch, fault):
    made, path = saved
    assert worst(made, path) <= 1
    fault(monkeypatch)
    assert worst(made, path) > 100


# Faults of the package: one function, one operation, or the bytes of one constant.


def another_activation(spec, name):
    first = next(op for op in _block(None, name, spec).operations if op.type == "sigmoid")
    first.type = "tanh"


def turned_the_other_way(spec, name):
    """The last rotation takes the cosines for sines."""
    bindings = [
        binding
        for op in _block(None, name, spec).operations
        for argument in op.inputs.values()
        for binding in argument.arguments
    ]
    next(b for b in reversed(bindings) if b.name == "sin").name = "cos"


def unmasked(spec, name):
    """The last layer has no mask, or adds its scores to themselves instead of one."""
    operations = _block(None, name, spec).operations
    fused = [op for op in operations if op.type == "scaled_dot_product_attention"]
    if fused:
        del fused[-1].inputs["attn_mask"]
        return
    added = [op for op in operations if op.outputs and op.outputs[0].name.endswith("_scores")][-1]
    added.inputs["y"].arguments[0].name = added.inputs["x"].arguments[0].name


@pytest.mark.parametrize("fault", [another_activation, turned_the_other_way, unmasked])
@pytest.mark.parametrize("function", ["prefill", "prefill_32", "decode"])
def test_a_fault_of_one_operation_is_found(saved, tmp_path, fault, function):
    made, path = saved
    copy = shutil.copytree(path, tmp_path / "decoder.mlpackage")
    spec = Package(copy).spec
    fault(spec, function)
    (copy / MODEL).write_bytes(spec.SerializeToString())
    assert worst(made, copy) > 100


def another_layer_s_cache(spec, name):
    """The last layer reads the first one's keys."""
    operations = _block(None, name, spec).operations
    split = next(op for op in operations if op.type == "split")
    first, last = split.outputs[0].name, split.outputs[-1].name
    for op in operations:
        for argument in op.inputs.values():
            for binding in argument.arguments:
                binding.name = first if binding.name == last else binding.name


@pytest.mark.parametrize("function", ["prefill", "decode"])
def test_another_layer_s_cache_is_found(tools, qwen2, tmp_path, function):
    path = tmp_path / "decoder.mlpackage"
    made, _ = make(qwen2, "readonly").verified(path)
    spec = Package(path).spec
    another_layer_s_cache(spec, function)
    (path / MODEL).write_bytes(spec.SerializeToString())
    assert worst(made, path) > 100


def test_a_token_that_does_not_lead_is_found(saved, monkeypatch):
    """What the package says of its logits, where it says it."""
    made, path = saved
    run = Package.run

    def off_by_one(self, *arguments):
        outputs = run(self, *arguments)
        return {name: x + 1 if name == "token" else x for name, x in outputs.items()}

    monkeypatch.setattr(Package, "run", off_by_one)
    assert math.isinf(worst(made, path)) is (made.form == "stateful")


def test_a_bias_of_zeros_is_found(saved, tmp_path):
    made, path = saved
    copy = shutil.copytree(path, tmp_path / "decoder.mlpackage")
    wanted = made.decoder.layers[1].qkv[2].bias.astype(np.float32).tobytes()
    content = (copy / WEIGHT).read_bytes()
    assert content.count(wanted) == 1  # shared by both functions
    (copy / WEIGHT).write_bytes(content.replace(wanted, bytes(len(wanted))))
    assert worst(made, copy) > 100


@pytest.fixture(scope="module")
def packed4(tools, qwen2, tmp_path_factory):
    """A float32 package of 4 bits, and its part."""
    path = tmp_path_factory.mktemp("packed") / "decoder.mlpackage"
    made, _ = make(qwen2, "stateful", "fp32", 4).verified(path)
    return made, path


def weights_error(part):
    """The largest relative error of a matrix that is exported, against MLX's own."""
    products = loaded_products(part)
    for product in products:
        for _ in product.weights():
            pass
    return max(product.error for product in products)


def test_weights_that_are_packed_the_other_way_round_are_found(packed4, tmp_path):
    """The high half of a byte before the low one, in the file of the package."""
    made, path = packed4
    copy = shutil.copytree(path, tmp_path / "decoder.mlpackage")
    content = (copy / WEIGHT).read_bytes()
    data = made.decoder.layers[1].down.weight.data
    low_first = (data[:, ::2] | data[:, 1::2] << 4).tobytes()
    high_first = (data[:, ::2] << 4 | data[:, 1::2]).tobytes()
    assert content.count(low_first) == 1
    (copy / WEIGHT).write_bytes(content.replace(low_first, high_first))
    assert worst(made, copy) > 100


def test_weights_that_are_unpacked_the_other_way_round_are_found(packed4, monkeypatch):
    """When MLX's own are read."""
    made, _ = packed4
    right = matrices.unpacked
    monkeypatch.setattr(
        matrices, "unpacked", lambda *of: right(*of).reshape(-1, 2)[:, ::-1].reshape(len(of[0]), -1)
    )
    assert weights_error(replace(made)) > 0.5


# Numbers in their right form that are not the model's.


def swapped_norms(monkeypatch):
    layer = DecoderPart._layer

    def swapped(self, module):
        sound = layer(self, module)
        return replace(sound, norms=sound.norms[::-1])

    monkeypatch.setattr(DecoderPart, "_layer", swapped)


def final_norm_of_ones(monkeypatch):
    vector = DecoderPart._vector

    def ones(self, array):
        sound = vector(self, array)
        return np.ones_like(sound) if array is self.language_model.model.norm.weight else sound

    monkeypatch.setattr(DecoderPart, "_vector", ones)


def biases_of_zeros(monkeypatch):
    matrix = DecoderPart._matrix

    def unbiased(self, layer):
        sound = matrix(self, layer)
        return sound if sound.bias is None else replace(sound, bias=0 * sound.bias)

    monkeypatch.setattr(DecoderPart, "_matrix", unbiased)


@pytest.mark.parametrize("fault", [swapped_norms, final_norm_of_ones, biases_of_zeros])
def test_numbers_that_are_not_the_model_s_are_found(tools, qwen2, tmp_path, monkeypatch, fault):
    """By the vectors and by the prompt's logits; the graph, of the very same numbers, is right."""
    fault(monkeypatch)
    _, found = make(qwen2).verified(tmp_path / "decoder.mlpackage")
    passed = {parity.inputs: parity.passed for parity in found.parity}
    assert passed == {
        "the embeddings": True, "the weights": True, "norms and biases": False,
        "prefill + 8 steps (graph)": True, "prefill + 8 steps": True,
        "prefill + 8 steps, the model as it was loaded": False,
    }  # fmt: skip


def test_weights_that_are_not_mlx_s_are_found(saved):
    made, _ = saved
    other = replace(made, language_model=random_model(QWEN2, seed=1))
    other.__dict__["decoder"] = made.decoder
    assert weights_error(other) > 0.5


def test_a_truncated_weight_file_is_found(saved, tmp_path):
    made, path = saved
    copy = shutil.copytree(path, tmp_path / "decoder.mlpackage")
    (copy / WEIGHT).write_bytes((path / WEIGHT).read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"weight.bin is cut off"):
        decoder_check.check(made, copy)


def test_activations_beyond_float16_are_one_clear_line(tools, tmp_path):
    model = random_model(QWEN2)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight = layer.mlp.down_proj.weight * 3e4
    with pytest.raises(UsageError, match=r"leave float16 \(the first is .*use --precision fp32"):
        make(model, precision="fp16").verified(tmp_path / "decoder.mlpackage")


def test_large_activations_are_normed_in_float16(tools, tmp_path):
    """Values whose squares leave float16: as real decoders' residual streams have."""
    model = random_model(QWEN2)
    model.model.embed_tokens.weight = model.model.embed_tokens.weight * 2000
    untied = LanguageModel(replace(QWEN2, tie_word_embeddings=False))
    untied.model = model.model
    untied.lm_head.weight = mx.random.normal(untied.lm_head.weight.shape) / 8
    _, found = make(untied, "readonly", "fp16").verified(tmp_path / "decoder.mlpackage")
    assert all(parity.passed for parity in found.parity)
    assert found.ranges["layer_0"] > 2000


# The host.


def run_of(saved):
    made, path = saved
    return DecoderHost(Package(path), made.geometry, made.table), made


def test_chunks_and_single_steps_agree(saved):
    whole, _ = run_of(saved)
    single, _ = run_of(saved)
    ids = np.random.default_rng(5).integers(0, 96, 21).tolist()
    logits = whole.prefill(whole.embed(ids))
    for token in ids:
        last = single.step(token)
    assert np.abs(last - logits).max() < 2e-3 * np.abs(logits).max()  # states are float16
    assert whole.offset == single.offset == 21


def test_the_context_s_end(saved):
    run, _ = run_of(saved)
    with pytest.raises(UsageError, match="the prompt takes 33 positions, the package's context"):
        run.prefill(run.embed([1] * 33))
    run.prefill(run.embed([1] * 27))  # 3 chunks and 3 positions
    run.prefill(run.embed([2] * 4))  # a chunk would reach beyond the end
    assert run.offset == 31
    run.step(3)
    with pytest.raises(UsageError, match="context of 32 is full"):
        run.step(3)
    run.start()
    assert len(list(run.generate(run.embed([1] * 30), 9))) == 3


def test_a_stop_token_ends_an_answer(saved):
    run, _ = run_of(saved)
    tokens = list(run.generate(run.embed([5, 6, 7]), 6))
    run.start()
    assert len(tokens) == 6
    assert list(run.generate(run.embed([5, 6, 7]), 6, stops=tokens[:1])) == tokens[:1]


def test_masks_are_the_worked_examples():
    seen = [(host.mask(1, 2, 3, stateful)[0, 0] == 0).astype(int) for stateful in (True, False)]
    assert seen[0].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert seen[1].tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(
    ("remaining", "room", "size"),
    [(300, 999, 256), (129, 999, 256), (128, 999, 64), (1, 999, 64), (300, 255, 64), (9, 63, 1)],
)
def test_a_pass_is_the_largest_of_which_more_than_half_is_used(remaining, room, size):
    chunks = {"prefill": 64, "prefill_256": 256}
    geometry = Geometry("stateful", 1, 1, 2, 999, 64, chunks, [1.0], "float16")
    assert geometry.size(remaining, room) == size


def test_a_manifest_without_geometry_is_one_clear_line(saved):
    made, _ = saved
    entry = json.loads(json.dumps(made.describe()))
    assert Geometry.from_manifest(entry) == made.geometry
    del entry["geometry"]["chunk"]
    with pytest.raises(UsageError, match=r"manifest.json: the decoder's geometry is wrong"):
        Geometry.from_manifest(entry)


@pytest.mark.parametrize(
    ("context", "says"),
    [
        (48, f"--context 48 is no multiple of {CHUNK}, .*: use {CHUNK}"),
        (100, f"--context 100 is no multiple of {CHUNK}, .*: use {CHUNK}"),
        (512, "--context 512: this model's is 1 to 128"),
        (0, "--context 0: this model's is 1 to 128"),
    ],
)
def test_contexts_that_cannot_be(context, says):
    model = LanguageModel(replace(QWEN2, max_position_embeddings=128))
    with pytest.raises(UsageError, match=says):
        DecoderPart(model, Options(context=context))


def test_other_language_models_are_refused():
    with pytest.raises(UsageError, match="covers Llama and Qwen2"):
        DecoderPart(nn.Linear(2, 2), Options())


# Whole models, against MLX's own greedy ids.


def answer(run, inputs, visual_tokens, eos, count):
    ids = inputs.input_ids[0].copy()
    ids[inputs.visual] = 0
    embeddings = run.embed(ids)
    embeddings[inputs.visual] = visual_tokens
    run.start()
    return list(run.generate(embeddings, count, eos))


@pytest.mark.parametrize(
    ("folder", "form"), [("mobilevlm_v2", "stateful"), ("fastvlm_tiny", "readonly")]
)
def test_the_tiny_models_decoders_give_mlx_s_tokens(
    tools, golden, native_folder, tmp_path, folder, form
):
    name = native_folder if folder == "fastvlm_tiny" else golden.parent / folder
    model, processor = load(str(name))
    picture = golden.parent / "mobilevlm_v1" / "landscape.png"
    inputs = processor("What is this?", images=[str(picture)])
    whole = model.embed(inputs)
    context = -(-(whole.shape[1] + 16) // 32) * 32
    options = Options(compute=FORMS[form], precision="fp32", context=context)
    made = DecoderPart(model.language_model, options, chunk=32)
    _, found = made.verified(tmp_path / "decoder.mlpackage")
    assert all(parity.passed for parity in found.parity)
    run = DecoderHost(Package(tmp_path / "decoder.mlpackage", "fp32"), made.geometry, made.table)
    tokens = np.array(whole[0, mx.array(inputs.visual)])
    found = answer(run, inputs, tokens, (), 12)
    cache, expected = model.make_cache(), []
    for _ in range(12):
        logits = model.language_model(whole, cache, last_only=True)
        expected.append(int(logits[0, -1].argmax()))
        whole = model.language_model.embed(mx.array([expected[-1:]]))
    assert found == expected


def greedy(model, processor, question, picture, count):
    pieces = stream_generate(model, processor, question, images=[picture], max_tokens=count)
    return [piece.token for piece in pieces if piece.token is not None]


@pytest.fixture(scope="module")
def bundle(tools, tmp_path_factory) -> Path:
    """The demo model, exported whole in float16 with the connector fused."""
    return export("demo", tmp_path_factory.mktemp("bundle") / "demo")


def test_the_demo_s_bundle_answers_its_questions_with_mlx_s_tokens(bundle):
    model, processor = load("demo")
    content = manifest.read(bundle)
    assert schema.faults(content) == []
    vision = Package(bundle / content["parts"]["vision"]["package"])
    decoder = content["parts"]["decoder"]
    run = DecoderHost.open(bundle, decoder, Package(bundle / decoder["package"]))
    for name, question, known, _ in KNOWN[::3]:
        picture = str(IMAGES / name)
        inputs = processor(question, images=[picture])
        image = inputs.pixels[0].data.transpose(2, 0, 1)[None].astype(np.float32)
        (tokens,) = vision.run("main", {"image": image}).values()
        found = answer(run, inputs, tokens[0], processor.eos_ids, 32)
        assert found == greedy(model, processor, question, picture, 32)
        assert processor.tokenizer.decode(found).strip() == known
        begun = run.begin(inputs.input_ids[0].tolist())
        assert begun == int(inputs.visual[0]) == len(content["prompt"]["before_image"]) > 9
        behind = run.embed(inputs.input_ids[0].clip(0)).copy()
        behind[inputs.visual] = tokens[0]
        assert list(run.generate(behind[begun:], 32, processor.eos_ids)) == found
