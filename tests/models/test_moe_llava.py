"""MoE-LLaVA against the golden numbers of its original code, from pixels to greedy ids."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_vlm_edge_convert import convert

from mlx_vlm_edge import kernels, load, stream_generate
from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.language import llama, mixture
from mlx_vlm_edge.language import moe_llava as decoders
from mlx_vlm_edge.language.mixture import Mixture, MixtureConfig
from mlx_vlm_edge.loading import cost
from mlx_vlm_edge.models import moe_llava
from mlx_vlm_edge.picture.image import Pixels
from mlx_vlm_edge.picture.preprocessing import Preprocessing
from mlx_vlm_edge.picture.token_budget import OF_TOKENS, TokenBudget

from ..parity import FLOAT32, clip_pixels, distance
from ..reference import moe_llava as theirs
from ..reference.moe_llava import BASES

PICTURED = ("land", "port", "two")  # 150 x 90, 61 x 133, 112 x 112 and 40 x 9 pixels
CASES = (*PICTURED, "text")
VISUAL = 64


@pytest.fixture(scope="module")
def models():
    """Per base, on demand: (model, processor, the original's numbers)."""
    loaded = {}

    def get(base):
        if base not in loaded:
            folder = theirs.folder_of(base)
            loaded[base] = (*load(str(folder)), np.load(folder / "ref.npz"))
        return loaded[base]

    return get


@pytest.fixture(params=BASES)
def base(request, models):
    return models(request.param)


@pytest.fixture
def stablelm(models):
    return models("stablelm")


def asked(reference, name):
    """A case's prompt, raw, and its pictures."""
    keys = (f"{name}/image0", f"{name}/image1")
    return str(reference[f"{name}/prompt"]), [reference[key] for key in keys if key in reference]


def ready(processor, reference, name):
    prompt, images = asked(reference, name)
    return processor(prompt, images=images, raw=True)


def parameters(model):
    return dict(tree_flatten(model.parameters()))


def mixtures(model):
    return [layer.mlp for layer in model.language_model.model.layers if "gate" in layer.mlp]


@pytest.mark.parametrize("name", PICTURED)
def test_pixels_features_and_visual_tokens_are_the_originals(base, name):
    model, processor, reference = base
    pixels = ready(processor, reference, name).pixels
    data = np.stack([one.data for one in pixels])
    x = np.array(clip_pixels(data)).transpose(0, 3, 1, 2)
    assert np.abs(x - reference[f"{name}/pixels"]).max() < 1e-6
    assert distance(model.features(data), reference[f"{name}/tower"]) < FLOAT32
    tokens = mx.concatenate([model.encode_image(one) for one in pixels])
    assert distance(tokens, reference[f"{name}/features"]) < FLOAT32


@pytest.mark.parametrize("name", CASES)
def test_ids_gates_logits_and_greedy_ids_are_the_originals(base, name, monkeypatch):
    model, processor, reference = base
    inputs = ready(processor, reference, name)
    counts = {-200: VISUAL}
    ids = [id for id in reference[f"{name}/input_ids"].tolist() for _ in range(counts.get(id, 1))]
    assert inputs.input_ids[0].tolist() == ids
    assert inputs.visual.tolist() == [at for at, id in enumerate(ids) if id == -200]
    seen, real = [], Mixture.logits
    monkeypatch.setattr(Mixture, "logits", lambda *a: seen.append(real(*a)) or seen[-1])
    logits = model(inputs)
    assert distance(logits[0], reference[f"{name}/logits"]) < FLOAT32
    assert distance(mx.concatenate(seen), reference[f"{name}/gate_logits"]) < FLOAT32
    prompt, images = asked(reference, name)
    monkeypatch.setattr(processor, "eos_ids", frozenset())
    pieces = list(stream_generate(model, processor, prompt, images, raw=True, max_tokens=12))
    assert [piece.token for piece in pieces[:12]] == reference[f"{name}/greedy"].tolist()


@pytest.mark.parametrize("name", PICTURED)
def test_a_chat_is_written_as_the_original_writes_it(base, name):
    _, processor, reference = base
    prompt, images = asked(reference, name)
    question = prompt.partition("USER: ")[2].replace("<image>\n", "").removesuffix(" ASSISTANT:")
    written = processor(question, images=images)
    assert written.input_ids.tolist() == ready(processor, reference, name).input_ids.tolist()


def test_answers_end_with_endoftext_and_so_do_those_of_a_chat(base):
    _, processor, _ = base
    end = processor.tokenizer.token_id("<|endoftext|>")
    assert processor.eos_ids == {end}
    turns = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user")]
    text = processor.render([processor._guarded(turn) for turn in _parts(turns)])
    assert text.partition("USER: ")[2] == ("Hi ASSISTANT: Hi<|endoftext|>USER: Hi ASSISTANT:")
    assert processor(turns).input_ids[0].tolist().count(end) == 1


def _parts(turns):
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


# The gate.


def test_tokens_beyond_an_experts_capacity_are_dropped_as_in_the_original(tmp_path, stablelm):
    _, _, reference = stablelm
    factor = float(reference["land/drop_eval_capacity_factor"])
    folder = theirs.copied("stablelm", tmp_path / "drop", eval_capacity_factor=factor)
    model, processor = load(str(folder))
    inputs = ready(processor, reference, "land")
    assert distance(model(inputs)[0], reference["land/logits_drop"]) < FLOAT32
    with kernels.plain():
        assert distance(model(inputs)[0], reference["land/logits_drop"]) < FLOAT32
    for step_size in (2048, 16):  # no parts: which tokens are dropped hangs on the whole prompt
        last = model.prefill(inputs, model.make_cache(), step_size)
        assert distance(last[0], reference["land/logits_drop"][-1]) < FLOAT32
    assert distance(reference["land/logits"], reference["land/logits_drop"]) > 0.1


@pytest.mark.parametrize(
    ("chosen", "places"),
    [
        ([[0, 1], [0, 2], [1, 0]], [[0, 1], [1, 0], [0, 2]]),
        ([[2, 0], [2, 1]], [[0, 0], [1, 0]]),
        ([[1, 0], [0, 1], [1, 0], [1, 0]], [[0, 1], [0, 3], [1, 2], [2, 3]]),
    ],
)
def test_first_choices_queue_before_second_ones(chosen, places):
    assert mixture._places(mx.array([chosen]), 3)[0].tolist() == places


@pytest.mark.parametrize(
    ("factor", "least", "tokens", "experts", "room"),
    [(2.0, 0, 10, 4, 10), (1.0, 0, 10, 4, 5), (0.6, 0, 173, 4, 52), (0.1, 4, 10, 4, 4)],
)
def test_how_many_tokens_an_expert_takes(factor, least, tokens, experts, room):
    assert MixtureConfig((4,), factor, least).capacity(tokens, experts) == room


def gated(experts=4, factor=2.0):
    """A mixture of tiny Llama MLPs with random weights."""
    mx.random.seed(1)
    config = llama.TextConfig.from_dict(
        {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128,
         "num_attention_heads": 2, "vocab_size": 8}, "llama",
    )  # fmt: skip
    mlps = [llama.MLP(config) for _ in range(experts)]
    mixed = Mixture(MixtureConfig((experts,), factor, 0), 64, mlps)
    mixed.gate = mx.random.normal(mixed.gate.shape)
    return mixed


def test_weights_of_a_token_add_up_to_one_unless_it_is_dropped():
    x = mx.random.normal((2, 50, 64), key=mx.random.key(3))
    chosen, weights = gated().route(x)
    assert mx.allclose(weights.sum(axis=-1), mx.ones((2, 50)))
    assert (chosen[..., 0] != chosen[..., 1]).all()
    _, few = gated(factor=0.2).route(x)
    sums = np.unique(np.round(np.array(few.sum(axis=-1)), 5))
    assert sums.tolist() == [0.0, 1.0]


def test_a_sequence_is_dropped_from_as_if_it_were_alone():
    x = mx.random.normal((3, 40, 64), key=mx.random.key(4))
    mixed = gated(factor=0.5)
    together = mixed(x)
    for row in range(3):
        assert distance(together[row : row + 1], mixed(x[row : row + 1])) < FLOAT32


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 1, 64), (2, 70, 64)])
def test_the_devices_forms_agree(bits, shape):
    x = mx.random.normal(shape, key=mx.random.key(5))
    mixed = gated()
    if bits:
        nn.quantize(mixed, 64, bits)
    one_by_one = mixed(x)
    with kernels.plain():
        gathered = mixed(x)
        mixed.fuse()
    assert not mixed.experts
    assert mixed.stacks.keys() == {"gate_up_proj", "down_proj"}
    assert distance(gathered, one_by_one) < FLOAT32
    assert distance(mixed(x), one_by_one) < FLOAT32


def test_experts_of_several_kinds_are_not_stacked():
    mixed = gated()
    nn.quantize(mixed.experts[2], 64, 4)
    x = mx.random.normal((1, 5, 64), key=mx.random.key(6))
    with kernels.plain():
        before = mixed(x)
        mixed.fuse()
    assert len(mixed.experts) == 4
    assert distance(mixed(x), before) < FLOAT32


# Layouts, configs.


@pytest.mark.parametrize("kind", BASES)
def test_bin_shards_are_read_and_converted(kind, models, tmp_path):
    folder = theirs.as_bin(kind, tmp_path / "bin")
    native = convert(folder, tmp_path / "native", verify=True)
    want = parameters(models(kind)[0])
    for path in (folder, native):
        got = parameters(load(str(path))[0])
        assert got.keys() == want.keys()
        assert all(mx.array_equal(got[name], want[name]) for name in want)
    names = set(mx.load(str(native / "model.safetensors")))
    experts = [name for name in names if ".deepspeed_experts.3." in name]
    assert len(experts) == 2 * {"stablelm": 3, "qwen": 3, "phi": 4}[kind]
    assert sum(name.endswith(".deepspeed_moe.gate.wg") for name in names) == 2
    written = json.loads((native / "config.json").read_text())
    assert written["model_type"] == f"moe_llava_{kind}"
    sizes = json.loads((native / "preprocessor_config.json").read_text())
    assert sizes["crop_size"] == {"height": 112, "width": 112}


@pytest.mark.parametrize("kind", ["stablelm", "qwen"])  # groups of 64 do not divide Phi's 80
def test_quantised_experts_are_near_and_the_gate_is_as_it_was(kind, models, tmp_path):
    wide = theirs.widened(kind, tmp_path / "wide")
    _, _, reference = models(kind)
    want, processor = load(str(wide))
    inputs = ready(processor, reference, "land")
    assert distance(want(inputs)[0], reference["land/logits"]) < FLOAT32
    packed, _ = load(str(convert(wide, tmp_path / "packed", bits=8, verify=True)))
    for model in (packed, load(str(wide), bits=8)[0]):
        assert not any("QuantizedLinear" in type(m).__name__ for m in model.tower.modules())
        for ours, theirs_ in zip(mixtures(model), mixtures(want), strict=True):
            assert mx.array_equal(ours.gate, theirs_.gate)
            assert all(layer.bits == 8 for expert in ours.experts
                       for layer in expert.children().values())  # fmt: skip
        assert distance(model(inputs), want(inputs)) < 0.2


def test_verify_sees_a_wrong_gate_and_a_wrong_expert(models):
    from mlx_vlm_edge_convert.verify import _language_model

    for spoil in (
        lambda mixed: mixed.update({"gate": mx.roll(mixed.gate, 1, axis=0)}),
        lambda mixed: mixed.experts[3].down_proj.update(
            {"weight": 1.01 * mixed.experts[3].down_proj.weight}
        ),
        lambda mixed: None,
    ):
        wrong, right = (load(str(theirs.folder_of("stablelm")))[0] for _ in range(2))
        said = spoil(mixtures(wrong)[1])
        layers, _ = _language_model(wrong.language_model, right.language_model)
        assert (layers.relative > 1e-3) == (said is not None)


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("stablelm", {"top_k_experts": 1}, "moe: top_k_experts 1 is not known"),
        ("stablelm", {"use_residual": True}, "use_residual True"),
        ("stablelm", {"moe_layers_idx": [0, 9]}, r"layers \[0, 9\] of 4"),
        ("stablelm", {"num_experts": [4, 4, 4]}, r"experts \[4, 4, 4\]"),
        ("stablelm", {"num_experts": [1, 4]}, "two or more"),
        ("stablelm", {"num_experts": [4, 10**9]}, "1,000,000,000 experts are more"),
        ("stablelm", {"eval_capacity_factor": "2"}, "eval_capacity_factor cannot be '2'"),
        ("stablelm", {"moe": {}}, "lacks 'moe_layers_idx'"),
        ("stablelm", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("stablelm", {"image_projector_type": "linear"}, "image_projector_type 'linear'"),
        ("stablelm", {"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm True"),
        ("qwen", {"kv_channels": 8}, "kv_channels 8 fits no heads"),
        ("qwen", {"num_hidden_layers": None}, "num_hidden_layers|wrong kind"),
        ("qwen", {"vision_config": {"hidden_size": 64}}, "the weights have 48"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, kind, changes, says):
    folder = theirs.copied(kind, tmp_path / "changed", **changes)
    with pytest.raises(UsageError, match=says) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_lacks_an_expert_says_so(tmp_path):
    folder = theirs.copied("qwen", tmp_path / "less")
    left = {name: array for name, array in theirs.weights(folder).items()
            if ".deepspeed_experts.2.w1." not in name}  # fmt: skip
    mx.save_safetensors(str(folder / "model.safetensors"), left)
    with pytest.raises(UsageError, match=r"lacks language_model.*experts\.2\.up_proj"):
        load(str(folder))


def test_without_a_tower_it_is_refused(tmp_path):
    folder = theirs.copied("stablelm", tmp_path / "less")
    left = {name: array for name, array in theirs.weights(folder).items() if "tower" not in name}
    mx.save_safetensors(str(folder / "model.safetensors"), left)
    with pytest.raises(UsageError, match="no vision tower; take one that was saved whole"):
        load(str(folder))


ALIASES = {
    "stablelm-1.6b": (2_890_321_920, 2_059_849_728, 100352),
    "qwen-1.8b": (3_054_323_712, 2_242_725_888, 151936),
    "phi2-2.7b": (5_296_993_280, 3_618_862_080, 51200),
}


@pytest.mark.parametrize("alias", ALIASES)
def test_held_and_active_parameters_are_the_published_ones(alias):
    """An embedding is held, and one row of it read; what a token reads of the rest is the active
    part. In bfloat16."""
    held, active, vocabulary = ALIASES[alias]
    plan = cost.blueprint(configs.read(f"moe-llava-{alias}"), dtype="bfloat16")
    model = plan.model.language_model
    sizes = {name: array.size for name, array in tree_flatten(model.parameters())}
    assert sum(sizes.values()) == held
    counted = cost.cost(plan, cost.question(plan, (640, 480)))
    rows = vocabulary * plan.config.text.hidden_size
    # Gates, and biases that are added apart, are not counted.
    assert counted.step.weights / 2 == pytest.approx(active - rows, rel=2e-4)
    assert counted.prefill.weights / 2 == pytest.approx(held - rows, rel=2e-4)
    assert counted.visual_tokens == 576


@pytest.mark.parametrize("alias", ["stablelm-1.6b", "phi2-2.7b"])
def test_siglips_first_patch_is_left_out_too(alias):
    plan = cost.blueprint(configs.read(f"moe-llava-{alias}-384"))
    pixels = plan.pixels((640, 480))
    assert pixels.data.shape == (384, 384, 3)
    assert tuple(pixels.data[0, 0]) == (127, 127, 127)
    assert plan.processor.visual_tokens(pixels) == 728
    assert plan.model.features(pixels.data[None]).shape == (1, 728, 1152)
    assert len(plan.model.vision_tower.layers) == 26
    # What no picture of it can be asked for is refused before a weight is read.
    assert plan.processor.methods(plan.config) == OF_TOKENS - {"pool"}
    for method in ("visionzip", "hiprune", "pool"):
        asked = Preprocessing(budget=TokenBudget(0.5, method))
        with pytest.raises(UsageError, match=f"'{method}' is not defined for this model"):
            plan.family.check(plan.config, asked)
        with pytest.raises(UsageError, match=f"'{method}' is not defined for this model"):
            plan.processor.within(pixels, asked.budget)


def test_the_published_config_is_the_shipped_one():
    for alias in (*ALIASES, "stablelm-1.6b-384"):
        shipped = configs.read(f"moe-llava-{alias}")
        flat = {key: value for key, value in shipped.items() if key != "vision_config"}
        read = moe_llava.Config.from_dict
        assert read(cost.native(flat)) == read(shipped)
    with pytest.raises(UsageError, match="'x/y' is not known"):
        cost.native({**flat, "mm_image_tower": "x/y"})


# Faults.


def swapped(model):
    for mixed in mixtures(model):
        mixed.experts[0], mixed.experts[1] = mixed.experts[1], mixed.experts[0]


def wide_rotary(model):
    for layer in model.language_model.model.layers:
        layer.self_attn.rotary_dims = layer.self_attn.head_dim


def first_only(real):
    def route(self, x):
        chosen, weights = real(self, x)
        return chosen, mx.concatenate([mx.ones_like(weights[..., :1]), 0 * weights[..., 1:]], -1)

    return route


def unnormalised(real):
    def route(self, x):
        chosen, _ = real(self, x)
        return chosen, mx.take_along_axis(mx.softmax(self.logits(x), axis=-1), chosen, axis=-1)

    return route


def turned(real):
    def route(self, x):
        chosen, weights = real(self, x)
        return chosen, weights[..., ::-1]

    return route


FAULTS = {
    "experts swapped": swapped,
    "the first expert alone": first_only,
    "weights that do not add up": unnormalised,
    "each other's weight": turned,
    "rotary positions on whole heads": wide_rotary,
    "norms' eps": lambda model: setattr(model.language_model.model.norm, "eps", 1e-2),
    "a gate's rows turned": lambda model: [
        setattr(mixed, "gate", mx.roll(mixed.gate, 1, axis=0)) for mixed in mixtures(model)
    ],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault, stablelm, monkeypatch):
    _, processor, reference = stablelm
    model, _ = load(str(theirs.folder_of("stablelm")))
    if fault in ("the first expert alone", "weights that do not add up", "each other's weight"):
        monkeypatch.setattr(Mixture, "route", FAULTS[fault](Mixture.route))
    else:
        FAULTS[fault](model)
    inputs = ready(processor, reference, "land")
    assert distance(model(inputs)[0], reference["land/logits"]) > 20 * FLOAT32


@pytest.mark.parametrize("fault", ["silu on the other half", "one after the other", "erf GELU"])
def test_a_fault_of_one_base_is_caught(fault, models, monkeypatch):
    kind = "qwen" if fault == "silu on the other half" else "phi"
    model, processor, reference = models(kind)
    if fault == "silu on the other half":
        monkeypatch.setattr(llama, "swiglu", lambda gate, up: kernels.swiglu(up, gate))
    elif fault == "erf GELU":
        monkeypatch.setattr(decoders, "gelu_tanh", kernels.gelu)
    else:
        monkeypatch.setattr(decoders.ParallelBlock, "whole", sequential)
    inputs = ready(processor, reference, "land")
    assert distance(model(inputs)[0], reference["land/logits"]) > 3 * FLOAT32


def sequential(self, x, mask, cache, last_only):
    x = x + self.self_attn(self.input_layernorm(x), mask, cache, last_only)
    return x + self.mlp(self.input_layernorm(x))


def test_a_class_token_among_the_features_is_caught(stablelm):
    model, processor, reference = stablelm
    (pixels,) = ready(processor, reference, "land").pixels
    x = clip_pixels(pixels.data[None])
    shifted = model.connector(model.tower(x)[:, :-1])
    assert distance(shifted[0], reference["land/features"]) > 100 * FLOAT32
    other = Pixels(np.ascontiguousarray(pixels.data[..., ::-1]), pixels.size)
    assert distance(model.encode_image(other), reference["land/features"]) > 100 * FLOAT32


@pytest.mark.parametrize("kind", BASES)
def test_rows_that_pad_the_vocabulary_are_never_said(kind, models, tmp_path, monkeypatch):
    """Published heads have more rows than their tokenizers have tokens; here those always win."""
    monkeypatch.undo()  # the fixture that lets them be chosen
    plain, processor, reference = models(kind)
    folder = theirs.copied(kind, tmp_path / kind, vocab_size=352)
    named = theirs.weights(folder)
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    for name in ("lm_head", "model.embed_tokens", "transformer.wte"):
        if (table := named.get(f"{name}.weight")) is not None:
            more = 352 - table.shape[0]
            named[f"{name}.weight"] = mx.concatenate([table, 10 * table[:more]])
    mx.save_safetensors(str(folder / "model.safetensors"), named)
    model, padded = load(str(folder))
    assert padded.rows == processor.rows == plain.config.text.vocab_size
    prompt, images = asked(reference, "text")
    winners = np.array(model(padded(prompt, images=images, raw=True))[0].argmax(axis=-1))
    assert winners.max() >= padded.rows
    for one in (processor, padded):
        monkeypatch.setattr(one, "eos_ids", frozenset())
    for settings in ({}, {"temperature": 1.0, "seed": 3, "logprobs": 5}):
        said = [
            list(stream_generate(*pair, prompt, images, raw=True, max_tokens=8, **settings))[:8]
            for pair in ((plain, processor), (model, padded))
        ]
        ids = [[piece.token for piece in pieces] for pieces in said]
        assert ids[0] == ids[1]
    told = [id for piece in said[1] for id, _ in piece.logprobs.top]
    assert max(told) < padded.rows
