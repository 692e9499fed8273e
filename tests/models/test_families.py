"""What every family offers: one function says which it is, and its parts go by the same names."""

from contextlib import nullcontext
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_vlm_edge import kernels
from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.hub.models import ALIASES
from mlx_vlm_edge.loading import cost
from mlx_vlm_edge.loading.counting import Counter, counting
from mlx_vlm_edge.models import FAMILIES, family, family_name
from mlx_vlm_edge.models.contract import Family
from mlx_vlm_edge.picture.image import Pixels
from mlx_vlm_edge.picture.preprocessing import Preprocessing
from mlx_vlm_edge.text.prompt import Processor
from mlx_vlm_edge.timings import result


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_goes_by_the_model_type(kind):
    assert isinstance(family({"model_type": kind}), Family)
    assert family_name({"model_type": kind}) == FAMILIES[kind]


@pytest.mark.parametrize(
    ("config", "name"),
    [  # as published
        ({"model_type": "llava", "architectures": ["LlavaQwenForCausalLM"]}, "llava_onevision"),
        ({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}, "llava"),
        ({"model_type": "llava_qwen2", "architectures": ["LlavaQwen2ForCausalLM"]}, "fastvlm"),
        ({"model_type": "mobilevlm", "architectures": "MobileLlamaForCausalLM"}, "mobilevlm"),
    ],
)
def test_architectures_decide_between_those_that_share_a_model_type(config, name):
    assert family_name(config) == name


@pytest.mark.parametrize("kind", ["bert", None, 3, ["llava"]])
def test_another_model_is_refused(kind):
    with pytest.raises(UsageError, match="is not supported"):
        family({"model_type": kind})


@pytest.mark.parametrize("alias", ALIASES)
def test_tower_and_connector_go_by_one_name(alias):
    config = configs.read(alias)
    kind = family(config)
    model = kind.Model(kind.Config.from_dict(config))
    parts = {"tower": model.tower, "connector": model.connector}
    named = {name: part for name, part in parts.items() if part is not None}
    counted = sum(
        p.size for part in (*named.values(), model.language_model)
        for _, p in tree_flatten(part.parameters())
    )  # fmt: skip
    newline = model.image_newline.size if "image_newline" in model else 0
    assert counted + newline == sum(p.size for _, p in tree_flatten(model.parameters()))
    assert ("connector" in named) == (family_name(config) not in ("fuyu", "eve2"))


@pytest.mark.parametrize("alias", ALIASES)
def test_every_family_refuses_by_name_what_it_does_not_understand(alias):
    config = configs.read(alias)
    parsed = family(config).Config.from_dict(config)
    assert parsed.adapted(Preprocessing()) == parsed
    with pytest.raises(UsageError, match="strategy"):
        parsed.adapted(Preprocessing(strategy="squash"))
    with pytest.raises(UsageError, match="image size -1"):
        parsed.adapted(Preprocessing(resolution=-1))
    with pytest.raises(UsageError, match="tile"):
        parsed.adapted(Preprocessing(max_tiles=0))


class Seen(Exception):  # noqa: N818
    """What a tower was called with."""


class Spy:
    def __init__(self, tower):
        self.tower = tower

    def __getattr__(self, name):
        return getattr(self.tower, name)

    def __call__(self, x, *rest):
        raise Seen(x)


CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIGLIP = (0.5,) * 3, (0.5,) * 3
NORMALISED = {
    "fastvlm": ((0.0,) * 3, (1.0,) * 3),
    "llava_onevision": SIGLIP,
    "cambrian": SIGLIP,  # its first tower
    "idefics2": SIGLIP,
    "idefics3": SIGLIP,
    "fuyu": SIGLIP,
}  # the others as CLIP does
FIRST = {FAMILIES[configs.read(alias)["model_type"]]: alias for alias in reversed(ALIASES)}


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_pixels_are_rounded_once_after_they_are_scaled(name, dtype):
    """In bfloat16, 1/255 itself is 0.39 % too large, and so was every pixel of FastVLM's."""
    config = configs.read(FIRST[name])
    kind = family(config)
    model = kind.Model(kind.Config.from_dict(config))
    model.apply(lambda parameter: parameter.astype(dtype))
    side = getattr(getattr(model.config, "vision", None), "image_size", 960)
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    model[model.tower_name] = Spy(model.tower)
    data = picture[None] if name in ("idefics3", "llava_onevision") else picture
    with pytest.raises(Seen) as seen:
        model.encode_image(Pixels(data, (side, side)))
    (x,) = seen.value.args
    assert x.dtype == dtype
    mean, std = NORMALISED.get(name, CLIP)
    wanted = np.sort(((picture / 255 - mean) / std).ravel())  # Fuyu's are in patches
    got = np.sort(np.array(x.astype(mx.float32)).ravel())
    nearest = np.array(mx.array(wanted.astype(np.float32)).astype(dtype).astype(mx.float32))
    assert np.abs(got - nearest).mean() < 1e-6


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("size", [(700, 333), (90, 412)])
def test_pixels_made_on_the_device_are_the_host_s(name, size):
    """Every family's, in every byte, with what else it knows of a picture."""
    plan = cost.blueprint(configs.read(FIRST[name]))
    picture = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    made = []
    for place in (nullcontext, kernels.plain):
        with place():
            processor = plan.processor
            made.append(result(processor.read(picture, processor.preprocessor(1))))
    host, there = made
    assert isinstance(there.data, mx.array)
    assert np.array_equal(np.array(there.data), host.data)
    assert replace(there, data=None).__dict__ == replace(host, data=None).__dict__


@pytest.mark.parametrize(
    ("alias", "ends"),
    [
        ("fastvlm-0.5b", {"<|im_end|>", "<|endoftext|>"}),
        ("llava-1.5-7b", {"</s>"}),
        ("mobilevlm-1.7b", {"</s>"}),
        ("llava-onevision-0.5b", {"<|im_end|>", "<|endoftext|>"}),
        ("smolvlm-256m", {"<end_of_utterance>"}),
        ("eve-7b", {"</s>"}),
        ("eve-7b-hd-v2", {"<|im_end|>", "<|endoftext|>"}),
        ("fuyu-8b", {"|ENDOFTEXT|"}),
    ],
)
def test_what_ends_an_answer_where_neither_config_nor_tokenizer_says(alias, ends):
    """Those of the family's own that the vocabulary has, beside the ones that are said."""

    class Vocabulary:
        eos_ids = frozenset({7})

        def token_id(self, token):
            return token if token in ends else None  # its own id, to be seen

    kind = family(configs.read(alias))
    config = kind.Config.from_dict(configs.read(alias) | {"eos_token_id": 8})
    processor = kind.Processor.__new__(kind.Processor)
    Processor.__init__(processor, config, Vocabulary())
    assert processor.eos_ids == {7, 8, *ends}
    assert ends == {*kind.Processor.stop_tokens}


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("step_size", [2048, 256])
def test_no_family_hands_the_device_an_empty_array(name, step_size, monkeypatch):
    """A launch of size zero fails on CUDA: EVE v2's first parts of a prompt have no text at all."""
    plan = cost.blueprint(configs.read(FIRST[name]))
    inputs = cost.question(plan, (640, 480))
    empty, add = [], Counter.add

    def looked_at(self, out, x, *weights, **counts):
        empty.extend(
            array.shape for array in (out, x, *weights) if array is not None and 0 in array.shape
        )
        add(self, out, x, *weights, **counts)

    monkeypatch.setattr(Counter, "add", looked_at)
    with counting() as counter:
        cache = plan.model.make_cache()
        plan.model.prefill(inputs, cache, step_size)
        plan.model.step(mx.zeros((1,), mx.int32), cache)
        assert counter.take().macs
    assert not empty


def test_another_back_end_stands_in_for_the_tower():
    config = configs.read("fastvlm-0.5b")
    kind = family(config)
    model = kind.Model(kind.Config.from_dict(config))
    model.encoder = lambda pictures: mx.array(pictures).astype(mx.float32)
    pictures = np.zeros((1, 2, 2, 3), np.uint8)
    assert model.image_features(pictures).shape == (1, 2, 2, 3)
    model.encoder = None
    with pytest.raises(UsageError, match="multiples of 64"):
        model.image_features(pictures)


@pytest.mark.parametrize("name", FIRST)
def test_no_product_of_a_bfloat16_model_is_in_float32(name, monkeypatch):
    """A GPU's matrix units take bfloat16; float32 takes them twice as long, or as TF32.

    The forms for GPUs, each product asked what it was called with, down to the first token.
    """
    products = {}
    for product in ("matmul", "gathered", "convolution", "scaled_attention"):

        def note(self, out, x, *rest, product=product, **named):
            products.setdefault(product, set()).update({out.dtype, x.dtype, rest[0].dtype})

        monkeypatch.setattr(Counter, product, note)
    plan = cost.blueprint(configs.read(FIRST[name]), dtype="bfloat16", fused=True)
    inputs = cost.question(plan, (640, 480))
    with counting():
        tokens = result(plan.model.encode(inputs.pixels))
        plan.model.prefill(replace(inputs, tokens=tokens), plan.model.make_cache(), 2048)
    assert {product: kinds - {mx.bfloat16} for product, kinds in products.items()} == {
        product: set() for product in products
    }
    assert {"matmul", "scaled_attention"} <= set(products)
