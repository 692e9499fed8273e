"""EVE v2 against a PyTorch model of its description, stage by stage and greedy id for greedy id."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_vlm_edge_convert import convert, pipeline, to_native
from mlx_vlm_edge_convert.families import eve2 as rules
from mlx_vlm_edge_convert.save import save_weights
from PIL import Image

from mlx_vlm_edge import load, stream_generate
from mlx_vlm_edge.checkpoint.config import read_config
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.kernels import gelu_tanh
from mlx_vlm_edge.language import eve2 as decoder
from mlx_vlm_edge.models import eve2
from mlx_vlm_edge.models.build import build
from mlx_vlm_edge.vision import eve as vision

from ..memory import Peak
from ..parity import FLOAT32, distance

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QUESTION = "What is this?"


@pytest.fixture(scope="module")
def reference():
    import torch

    from ..reference import eve2 as theirs

    torch.set_num_threads(1)
    return theirs.build()


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    from ..reference import eve2 as theirs

    return theirs.save(reference, tmp_path_factory.mktemp("eve2") / "published")


@pytest.fixture(scope="module")
def loaded(folder):
    return load(str(folder))


@pytest.fixture(scope="module")
def theirs():
    from ..reference import eve2 as theirs

    return theirs


def picture(seed, width=90, height=70):
    from ..reference.fastvlm import picture

    return picture(seed, width, height)


def ids(text):
    from ..reference import tokenizer

    return tokenizer.build().encode(text, add_special_tokens=False).ids


def prompt(theirs, *images, question=QUESTION):
    """[ids, picture, ids ...] of a question; as many line breaks as pictures."""
    parts = [ids(f"{SYSTEM} USER: ")]
    for number, image in enumerate(images, 1):
        after = "\n" if number < len(images) else f"\n{question} ASSISTANT:"
        parts += [theirs.resized(image), ids(after)]
    return parts if images else [ids(f"{SYSTEM} USER: {question} ASSISTANT:")]


def tokens(pieces):
    return [piece.token for piece in pieces if piece.token is not None]


def greedy(theirs, reference, parts, count=6):
    found, lead = theirs.greedy(reference, parts, count)
    assert lead > 1e-3, "the reference's choice is nearly a tie; take another picture"
    return found


@pytest.mark.parametrize("size", [(90, 70), (70, 90), (64, 64), (200, 12), (7, 300)])
def test_pixels_and_visual_tokens(size, loaded, reference, theirs):
    import torch

    model, processor = loaded
    image = picture(3, *size)
    pixels = processor(QUESTION, images=[image]).pixels[0]
    want = theirs.resized(image)
    assert np.array_equal(pixels.data, want)
    assert processor.visual_tokens(pixels) == 1 + want.shape[0] // 32 * (want.shape[1] // 32 + 1)
    with torch.no_grad():
        expected = reference.encode(want).numpy()
    assert distance(model.encode_image(pixels), expected) < FLOAT32


def test_the_prompt_is_vicunas_without_bos(loaded, theirs):
    processor = loaded[1]
    image = picture(1)
    inputs = processor(QUESTION, images=[image])
    before, resized, after = prompt(theirs, image)
    count = 1 + resized.shape[0] // 32 * (resized.shape[1] // 32 + 1)
    assert inputs.input_ids.tolist() == [before + [-200] * count + after]
    assert inputs.visual.tolist() == list(range(len(before), len(before) + count))
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye<|im_end|>"},
    ]
    text = processor.render([{**m, "content": [{"type": "text", "text": m["content"]}]}
                             for m in messages])  # fmt: skip
    assert text == f"{SYSTEM} USER: Hi ASSISTANT: Hello.<|im_end|>USER: Bye<|im_end|> ASSISTANT:"
    assert processor(messages).input_ids[0].tolist().count(299) == 1  # the user's is only text


CASES = {
    "one": [(90, 70)],
    "two of one size": [(90, 70), (90, 70)],
    "two of mixed sizes": [(90, 70), (30, 200)],
    "text": [],
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_ids(case, loaded, reference, theirs):
    model, processor = loaded
    images = [picture(number, *size) for number, size in enumerate(CASES[case], 1)]
    parts = prompt(theirs, *images)
    want = theirs.logits(reference, parts)
    assert distance(model(processor(QUESTION, images=images))[0], want) < FLOAT32
    pieces = list(stream_generate(*loaded, QUESTION, images=images, max_tokens=6))
    assert tokens(pieces)[:6] == greedy(theirs, reference, parts)


@pytest.mark.parametrize("step_size", [1, 5, 64, 180])
def test_prefill_in_chunks(step_size, loaded, reference, theirs):
    """Chunks of text alone, of visual tokens alone, and of both."""
    image = picture(1)
    options = {"images": [image], "max_tokens": 6, "prefill_step_size": step_size}
    pieces = list(stream_generate(*loaded, QUESTION, **options))
    assert tokens(pieces)[:6] == greedy(theirs, reference, prompt(theirs, image))


def test_a_rotating_cache_keeps_the_picture(loaded):
    image = picture(1)
    whole = tokens(stream_generate(*loaded, QUESTION, images=[image], max_tokens=4))
    options = {"images": [image], "max_tokens": 4, "max_kv_size": 1024}
    assert tokens(stream_generate(*loaded, QUESTION, **options)) == whole


FAULTS = {
    "visual tokens through the text weights": (
        decoder.LanguageModel,
        "__call__",
        lambda original: (
            lambda self, x, cache=None, last_only=False, visual=None: original(
                self, x, cache, last_only
            )
        ),
    ),
    "the kinds swapped back in the wrong order": (
        decoder.Kinds,
        "join",
        lambda _: lambda self, parts: mx.concatenate(list(parts), axis=1),
    ),
    "no split tokens' place": (
        vision,
        "in_rows",
        lambda original: lambda tokens, first, last: original(tokens, last, first),
    ),
    "tanh GELU": (vision, "gelu", lambda _: gelu_tanh),
    "generated tokens through the visual weights": (
        eve2.Model,
        "step",
        lambda _: (
            lambda self, token, cache: self.language_model(
                self.language_model.embed(token[None]), cache, visual=np.array([0])
            )[:, -1]
        ),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, loaded, reference, theirs, monkeypatch):
    owner, name, wrong = FAULTS[fault]
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    model, processor = loaded
    parts, inputs = prompt(theirs, picture(1)), processor(QUESTION, images=[picture(1)])
    cache = model.make_cache()
    first = model.prefill(inputs, cache, 2048)
    second = model.step(mx.array([65]), cache)
    want = theirs.logits(reference, [*parts, [65]])[-2:]
    tokens = reference.encode(parts[1]).detach().numpy()
    off = (
        distance(model.encode_image(inputs.pixels[0]), tokens),
        distance(mx.concatenate([first, second]), want),
    )
    assert max(off) > 5 * FLOAT32, off


@pytest.mark.parametrize(
    "part",
    [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        "input_layernorm", "post_attention_layernorm",
    ],
)  # fmt: skip
def test_every_visual_weight_is_used(part, folder, reference, theirs):
    """A weight of the last layer but one that is text's instead shows in the logits."""
    config, weights = to_native(folder, read_config(folder))
    owner, _, leaf = part.rpartition(".")
    visual = f"moe_{owner}.{leaf}" if owner == "mlp" else f"{owner}.moe_{leaf}".lstrip(".")
    layer = "language_model.model.layers.1."
    weights[f"{layer}{visual}.weight"] = weights[f"{layer}{part}.weight"]
    model = build(eve2, config, weights)
    inputs = load(str(folder))[1](QUESTION, images=[picture(1)])
    want = theirs.logits(reference, prompt(theirs, picture(1)))
    assert distance(model(inputs)[0], want) > 10 * FLOAT32


def test_a_full_size_model_is_mapped_without_allocating(theirs):
    """Qwen2.5-7B's geometry; 57,344 bytes of 16-bit cache per position."""
    import torch

    full = theirs.TINY | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "mm_hidden_size": 1024, "mm_vision_tower": "openai/eve-anyratio-res1600-patch16",
    }  # fmt: skip
    with torch.device("meta"):
        listed = {name: tuple(x.shape) for name, x in theirs.Eve2(full).state_dict().items()}
    peak = Peak()
    source = {name: mx.zeros(shape, dtype=mx.bfloat16) for name, shape in listed.items()}
    native = rules.rename(source)
    assert len(native) == len(listed)
    model = build(eve2, full, native)
    assert peak.bytes < 10_000_000
    text = model.config.text
    assert 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim == 57344
    count = sum(array.size for _, array in tree_flatten(model.parameters()))
    assert count == sum(np.prod(shape, dtype=np.int64) for shape in listed.values())


def sizes(image_size, width, height):
    config = eve2.Config.from_dict({**TINY_SIZES, "max_size": image_size})
    processor = eve2.Processor.__new__(eve2.Processor)
    processor.config = config
    pixels = processor.preprocess(Image.new("RGB", (width, height)))
    return processor.visual_tokens(pixels)


TINY_SIZES = {
    "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1,
    "intermediate_size": 64, "vocab_size": 8, "mm_hidden_size": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "count"),
    [((1000, 1000), 2551), ((100, 100), 2551), ((640, 480), 2597), ((1920, 1080), 2585)],
)
def test_token_counts_hardly_depend_on_the_picture(size, count):
    assert sizes(1600, *size) == count


def test_published_names_become_native_ones_and_back(folder, loaded, tmp_path):
    out = convert(folder, tmp_path / "out", verify=True)
    assert read_config(out)["model_type"] == "eve-qwen2"
    names = set(mx.load(str(out / "model.safetensors")))
    assert eve2.FAMILY.is_native(names)
    assert "language_model.model.layers.2.self_attn.moe_q_proj.bias" in names
    written = json.loads((out / "preprocessor_config.json").read_text())
    assert (written["max_size"], written["patch_stride"], written["dense_stride"]) == (160, 16, 2)
    inputs = loaded[1](QUESTION, images=[picture(1)])
    assert np.array_equal(load(str(out))[0](inputs), loaded[0](inputs))


def test_verify_compares_both_kinds_of_weights(folder, tmp_path, monkeypatch):
    """A visual weight that is written wrong is found."""

    def spoilt(target, weights, **options):
        name = "language_model.model.layers.1.moe_mlp.up_proj.weight"
        save_weights(target, weights | {name: weights[name] * 1.1}, **options)

    monkeypatch.setattr(pipeline, "save_weights", spoilt)
    with pytest.raises(UsageError, match="off by"):
        convert(folder, tmp_path / "out", verify=True)


def test_both_kinds_of_weights_are_quantised(folder, loaded, tmp_path):
    out = convert(folder, tmp_path / "q", bits=8, group_size=32)
    names = set(mx.load(str(out / "model.safetensors")))
    assert "language_model.model.layers.0.moe_mlp.up_proj.scales" in names
    inputs = loaded[1](QUESTION, images=[picture(1)])
    model = load(str(out))[0]
    assert distance(model(inputs), loaded[0](inputs)) < 0.1
    assert "visual" in model.language_model.model.layers[0]
    fused = model.language_model.model.layers[0].visual.self_attn
    assert "qkv_proj" in fused
    whole = load(str(folder), quantize=8)[0]
    assert distance(whole(inputs), loaded[0](inputs)) < 0.1


def test_the_class_token_under_its_other_name(folder, loaded, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = mx.load(str(copy / "model.safetensors"))
    weights["model.vision_tower.start_embedding"] = weights.pop(
        "model.vision_tower.class_embedding"
    )
    mx.eval(weights)
    mx.save_safetensors(str(copy / "model.safetensors"), weights)
    inputs = loaded[1](QUESTION, images=[picture(1)])
    assert np.array_equal(load(str(copy))[0](inputs), loaded[0](inputs))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"add_moe": False}, "add_moe False"),
        ({"moe_part": "mlp"}, "moe_part 'mlp'"),
        ({"mm_vision_tower": "openai/clip"}, "'openai/clip' is not known"),
        ({"mm_hidden_size": None}, "lacks 'mm_hidden_size'"),
    ],
)
def test_an_unknown_variant_raises(changes, said, theirs):
    config = {k: v for k, v in {**theirs.TINY, **changes}.items() if v is not None}
    with pytest.raises(UsageError, match=said):
        eve2.Config.from_dict(config)


def test_a_smaller_resolution_costs_fewer_tokens(folder):
    small = load(str(folder), resolution=96)[1](QUESTION, images=[picture(1, 64, 64)])
    assert len(small.visual) == 1 + 3 * 4
    with pytest.raises(UsageError, match="32 or more"):
        load(str(folder), resolution=16)
    with pytest.raises(UsageError, match="keeps a picture's shape"):
        load(str(folder), image_strategy="pad")


def test_an_elongated_picture_is_refused_before_it_fills_the_memory():
    with pytest.raises(UsageError, match="too elongated"):
        sizes(1600, 30_000_000, 1)
