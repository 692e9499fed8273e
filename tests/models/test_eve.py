"""EVE v1 against numbers from the original code, and the rest of its conversation by transformers.

The golden model is tiny (longer side 112, teacher's 56, width 32); see tests/golden/README.md.
"""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_vlm_edge_convert import convert, to_native
from mlx_vlm_edge_convert.families import eve as rules
from PIL import Image

from mlx_vlm_edge import load, stream_generate
from mlx_vlm_edge.checkpoint.config import read_config
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.hub.models import ALIASES
from mlx_vlm_edge.kernels import gelu_tanh
from mlx_vlm_edge.models import eve
from mlx_vlm_edge.models.build import build
from mlx_vlm_edge.picture.image import Pixels
from mlx_vlm_edge.text.tokenizer import Tokenizer
from mlx_vlm_edge.vision import eve as vision

from ..memory import Peak
from ..parity import clip_pixels, distance

GOLDEN = Path(__file__).parents[1] / "golden"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QUESTION = "What is in this image?"
PICTURES = ("land", "port", "square", "thin")
SMALL, LARGE = 1e-5, 1e-3  # how far the patch embedding and the logits may be from the original's
FULL = {
    "model_type": "eve", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "rms_norm_eps": 1e-5, "mm_hidden_size": 1024,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "mm_vision_tower": "openai/eve-patch14-anypixel-672",
}  # fmt: skip
HD = FULL | {"mm_vision_tower": "openai/eve-patch14-anypixel-1344"}


@pytest.fixture(scope="module")
def expected():
    return np.load(GOLDEN / "eve_tiny" / "expected.npz")


@pytest.fixture(scope="module")
def loaded():
    return load(str(GOLDEN / "eve_tiny"))


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden model that a test may change."""
    return Path(shutil.copytree(GOLDEN / "eve_tiny", tmp_path / "eve"))


def largest(got, want):
    difference = np.abs(np.array(got, dtype=np.float64) - want)
    assert np.isfinite(difference).all()
    return difference.max()


def around(ids, count):
    """The original's ids, its one placeholder repeated for each visual token."""
    place = ids.tolist().index(-200)
    return [*ids[:place].tolist(), *[-200] * count, *ids[place + 1 :].tolist()]


@pytest.mark.parametrize("name", PICTURES)
def test_pixels(name, loaded, expected):
    """The original's canvas, cut to where its mask is."""
    pixels = loaded[1](QUESTION, images=[expected[f"{name}/image"]]).pixels[0]
    assert pixels.data.dtype == np.uint8
    assert np.array_equal(pixels.data, expected[f"{name}/resized"])


@pytest.mark.parametrize("name", PICTURES)
def test_patch_embedding_and_visual_tokens(name, loaded, expected):
    model, processor = loaded
    pixels = processor(QUESTION, images=[expected[f"{name}/image"]]).pixels[0]
    embedded = model.vision_tower(clip_pixels(pixels.data[None]))
    assert largest(embedded, expected[f"{name}/pel"]) < SMALL
    assert largest(model.encode_image(pixels), expected[f"{name}/proj"]) < SMALL
    assert processor.visual_tokens(pixels) == len(expected[f"{name}/pel"])


@pytest.mark.parametrize("name", PICTURES)
def test_prompt_logits_and_greedy_ids(name, loaded, expected):
    model, processor = loaded
    image = expected[f"{name}/image"]
    inputs = processor(QUESTION, images=[image])
    want = around(expected[f"{name}/input_ids"], len(expected[f"{name}/pel"]))
    assert inputs.input_ids.tolist() == [want]
    assert inputs.visual.tolist() == [i for i, token in enumerate(want) if token == -200]
    raw = processor(str(expected[f"{name}/prompt"]), images=[image], raw=True)
    assert np.array_equal(raw.input_ids, inputs.input_ids)
    assert largest(model(inputs)[0], expected[f"{name}/logits"]) < LARGE
    pieces = stream_generate(model, processor, QUESTION, images=[image], max_tokens=8)
    tokens = [piece.token for piece in pieces if piece.token is not None]
    assert tokens == expected[f"{name}/greedy"].tolist()


def test_text_only(loaded, expected):
    model, processor = loaded
    inputs = processor("hello world", raw=True)
    assert inputs.input_ids[0].tolist() == expected["text/input_ids"].tolist()
    assert inputs.visual.size == 0
    assert largest(model(inputs)[0], expected["text/logits"]) < LARGE


def test_bos_is_there_once(loaded):
    processor = loaded[1]
    assert processor("<s>hello world", raw=True).input_ids[0].tolist()[:2] == [398, 257]
    image = np.zeros((28, 28, 3), np.uint8)
    assert processor("<image>", images=[image], raw=True).input_ids[0].tolist()[:2] == [398, -200]
    assert processor("</s><s>").input_ids[0].tolist().count(398) == 1  # a user's is only text


def test_a_sentencepiece_tokenizer_marks_the_text_after_the_image(loaded, expected):
    """Vicuna's tokenizer: "\\n" after the image is the word mark and a byte (29871, 13 there)."""
    tokenizer = Tokenizer.from_folder(GOLDEN / "mobilevlm_v1")
    config = loaded[0].config
    text = replace(config.text, vocab_size=tokenizer.vocab_size)
    processor = eve.Processor(replace(config, bos_token_id=1, text=text), tokenizer)
    row = processor(QUESTION, images=[expected["thin/image"]]).input_ids[0].tolist()
    after = row[len(row) - row[::-1].index(-200) :]
    assert after[:2] == [tokenizer.token_id("\u2581"), tokenizer.token_id("<0x0A>")]
    assert row[:2].count(1) == row.count(1) == 1
    assert 2 in processor.eos_ids


def test_a_conversation(loaded):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ]
    text = "Be brief. USER: <image>\nOne? ASSISTANT: Yes.</s>USER: And? ASSISTANT:"
    assert loaded[1].render(messages) == text
    assert loaded[1].render(messages[1:]).startswith(f"{SYSTEM} USER: <image>")


@pytest.fixture(scope="module")
def llama():
    """The golden model's decoder in transformers, by its published names."""
    import torch
    from safetensors.torch import load_file

    from ..reference import decoder  # noqa: F401  (sets transformers up)

    torch.set_num_threads(1)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = json.loads((GOLDEN / "eve_tiny" / "config.json").read_text())
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k in FULL}))
    weights = load_file(GOLDEN / "eve_tiny" / "model.safetensors")
    extra = model.load_state_dict(weights, strict=False)
    assert not extra.missing_keys
    return model.eval()


def test_two_images_of_mixed_sizes(loaded, llama, expected):
    """As the original's inference code takes them: each at its own place, one after the other."""
    import torch

    model, processor = loaded
    tokenizer = processor.tokenizer
    texts = ("Here is ", " and then ", ", so?")
    table = llama.get_input_embeddings()
    with torch.no_grad():
        rows = [table(torch.tensor([398]))]
        for text, name in zip(texts, ("thin", "port", None), strict=True):
            rows.append(table(torch.tensor(tokenizer.encode(text))))
            rows += [torch.from_numpy(expected[f"{name}/proj"])] if name else []
        want = llama(inputs_embeds=torch.cat(rows)[None]).logits[0].numpy()
    images = [expected[f"{name}/image"] for name in ("thin", "port")]
    inputs = processor("<image>".join(texts), images=images, raw=True)
    assert largest(model(inputs)[0], want) < LARGE
    swapped = processor("<image>".join(texts), images=images[::-1], raw=True)
    assert largest(model(swapped)[0, -1], want[-1]) > LARGE


def heads_of_their_own_scale(original):
    def attend(q, k, v, scale):
        return original(q, k, v, scale=q.shape[-1] ** -0.5)

    return attend


def keys_and_values_swapped(self, query, features):
    second = self.kv[1].weight
    half = second.shape[0] // 2
    self.kv[1].weight = mx.concatenate([second[half:], second[:half]])
    out = ATTENTION(self, query, features)
    self.kv[1].weight = second
    return out


def residual_of_the_norm(self, query, features):
    return ATTENTION(self, query, features) - query + self.q[0](query)


ATTENTION, ROWS = vision.CrossAttention.__call__, vision.in_rows
FAULTS = {
    "the scale of a head": (
        mx.fast,
        "scaled_dot_product_attention",
        heads_of_their_own_scale(mx.fast.scaled_dot_product_attention),
    ),
    "values before keys": (vision.CrossAttention, "__call__", keys_and_values_swapped),
    "a normalised residual": (vision.CrossAttention, "__call__", residual_of_the_norm),
    "rows that begin with the split token": (
        vision,
        "in_rows",
        lambda tokens, first, last: ROWS(tokens[:, ::-1], first, last)[::-1],
    ),
    "the class token unattended": (
        vision,
        "in_rows",
        lambda tokens, first, last: ROWS(tokens, mx.zeros_like(first), last),
    ),
    "no mean and deviation": (eve, "normalized", lambda pictures, *_: mx.array(pictures) / 255),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, loaded, expected, monkeypatch):
    monkeypatch.setattr(*FAULTS[fault])
    model, processor = loaded
    pixels = processor(QUESTION, images=[expected["port/image"]]).pixels[0]
    embedded = model.features(pixels.data[None])[0]
    assert np.abs(np.array(embedded) - expected["port/pel"]).max() > 10 * SMALL


def test_the_connectors_gelu_is_the_exact_one(loaded, expected, monkeypatch):
    from mlx_vlm_edge.connectors import mlp

    monkeypatch.setattr(mlp, "gelu", gelu_tanh)
    pixels = loaded[1](QUESTION, images=[expected["port/image"]]).pixels[0]
    got = loaded[0].encode_image(pixels)
    assert np.abs(np.array(got) - expected["port/proj"]).max() > 10 * SMALL


COUNTS = [
    ((800, 800), 601, 2353), ((640, 480), 451, 1765), ((1920, 1080), 351, 1373),
    ((3000, 500), 101, 393), ((50, 50), 601, 2353), ((10, 4000), 49, 145),
]  # fmt: skip


@pytest.mark.parametrize(("size", "small", "large"), COUNTS)
@pytest.mark.parametrize("config", [FULL, HD])
def test_token_counts(config, size, small, large):
    processor = eve.Processor.__new__(eve.Processor)
    processor.config = eve.Config.from_dict(config)
    pixels = processor.preprocess(Image.new("RGB", size))
    assert processor.visual_tokens(pixels) == (small if config is FULL else large)


def published():
    with gzip.open(GOLDEN / "keys" / "eve_7b_v1_keys.json.gz", "rt") as file:
        return {name: tuple(shape) for name, shape in json.load(file).items()}


TRAINING = {
    "model.vision_clip.vision_tower.vision_model.embeddings.class_embedding": (1024,),
    "model.vision_tower_compressor.norm_layer.0.1.weight": (1024, 4096),
    "model.vision_tower_compressor.clip_layer.backbone.post_layernorm.bias": (1024,),
    "model.layers.3.self_attn.rotary_emb.inv_freq": (64,),
}


@pytest.mark.parametrize("more", [{}, TRAINING])
def test_a_published_checkpoint_becomes_the_native_key_set(more):
    """Every tensor has a place, nothing is allocated, what only training needed is left out."""
    listed = published()
    peak = Peak()
    source = {name: mx.zeros(shape, dtype=mx.float16) for name, shape in (listed | more).items()}
    native = rules.rename(source)
    assert len(native) == len(listed)
    model = build(eve, FULL, native)
    assert peak.bytes < 10_000_000
    count = sum(array.size for _, array in tree_flatten(model.parameters()))
    assert count == 6_768_398_336
    parts = (model.vision_tower, model.mm_projector)
    sizes = (array.size for part in parts for _, array in tree_flatten(part.parameters()))
    assert sum(sizes) == 29_982_720


def test_every_rule_that_drops_weights_says_why():
    assert all(rule.why for rule in rules.RULES if rule.target is None)
    unknown = {"model.vision_tower_extra.weight": mx.zeros(1)}
    with pytest.raises(UsageError, match=r"no rule for model\.vision_tower_extra\.weight"):
        rules.rename(unknown)


def widened(folder):
    """The same function with an MLP of 128 in place of 112, which groups of 32 do not divide."""
    path = folder / "model.safetensors"
    weights = mx.load(str(path))
    for name, array in weights.items():
        if ".mlp." in name:
            width = [(0, 0), (0, 16)] if "down_proj" in name else [(0, 16), (0, 0)]
            weights[name] = mx.pad(array, width)
    mx.eval(weights)
    mx.save_safetensors(str(path), weights)
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_converting_writes_a_native_folder(folder, loaded, expected, tmp_path):
    out = convert(folder, tmp_path / "out", verify=True)
    assert eve.is_native(mx.load(str(out / "model.safetensors")))
    written = json.loads((out / "preprocessor_config.json").read_text())
    assert {written[key] for key in ("image_size", "size", "crop_size")} == {112}
    assert (written["image_size_clip"], written["patch_stride"]) == (56, 14)
    (out / "preprocessor_config.json").unlink()  # the config has it all
    inputs = loaded[1](QUESTION, images=[expected["port/image"]])
    assert np.array_equal(load(str(out))[0](inputs), loaded[0](inputs))


def test_quantised(folder, loaded, expected, tmp_path):
    with pytest.raises(UsageError, match="112 wide"):
        convert(folder, tmp_path / "no", bits=8, group_size=32)
    out = convert(widened(folder), tmp_path / "q", bits=8, group_size=32)
    names = set(mx.load(str(out / "model.safetensors")))
    assert "language_model.lm_head.scales" in names
    assert not any("vision_tower" in name and "scales" in name for name in names)
    got = load(str(out))[0](loaded[1](QUESTION, images=[expected["port/image"]]))
    assert 1e-4 < distance(got[0], expected["port/logits"]) < 0.1


def test_without_the_preprocessors_file_the_constants_hold(folder):
    (folder / "preprocessor_config.json").unlink()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    with pytest.raises(UsageError, match="size of 112 is not EVE's"):
        to_native_config(folder)
    path.write_text(json.dumps(config | {"mm_vision_tower": FULL["mm_vision_tower"]}))
    parsed = to_native_config(folder)
    assert (parsed.image_size, parsed.ratio, parsed.vision.stride) == (672, 2, 28)
    path.write_text(json.dumps(config | {"mm_vision_tower": HD["mm_vision_tower"]}))
    parsed = to_native_config(folder)
    assert (parsed.image_size, parsed.ratio, parsed.step) == (1344, 4, 56)


def test_sizes_that_the_tower_s_name_has_in_it_are_taken():
    """Of an odd multiple of the teacher's size, the patches that fill no window are left out."""
    parsed = eve.Config.from_dict(FULL | {"mm_vision_tower": "x/eve-patch14-anypixel-1008"})
    assert (parsed.image_size, parsed.ratio, parsed.step) == (1008, 3, 42)
    tower = vision.PatchEmbedding(vision.PatchConfig(8, 14, 2))
    pixels = mx.random.normal((1, 42, 84 + 42, 3))
    whole = tower(pixels[:, :28, : 84 + 28])
    assert mx.array_equal(tower(pixels), whole)
    assert len(whole) == 1 + 1 * (4 + 1)
    small = eve.Config.from_dict(FULL | {"image_size": 3 * 28, "image_size_clip": 28})
    processor = eve.Processor.__new__(eve.Processor)
    processor.config = small
    data = np.zeros((42, 84 + 42, 3), np.uint8)
    assert processor.visual_tokens(Pixels(data, (9, 3))) == len(whole)


def to_native_config(folder):
    return eve.Config.from_dict(to_native(folder, read_config(folder))[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
        ({"mm_vision_tower": "openai/clip"}, "'openai/clip' is not known"),
        ({"mm_hidden_size": 30}, "30 is no multiple of 8"),
    ],
)
def test_an_unknown_variant_raises(changes, said):
    with pytest.raises(UsageError, match=said):
        eve.Model(eve.Config.from_dict(FULL | changes))


def test_a_smaller_resolution_costs_fewer_tokens():
    model = str(GOLDEN / "eve_tiny")
    image = np.zeros((64, 64, 3), np.uint8)
    assert len(load(model, resolution=56)[1](QUESTION, images=[image]).visual) == 1 + 2 * 3
    with pytest.raises(UsageError, match="multiples of 28"):
        load(model, resolution=100)
    with pytest.raises(UsageError, match="keeps a picture's shape"):
        load(model, image_strategy="pad")


def test_the_aliases():
    assert ALIASES["eve-7b"] == "BAAI/EVE-7B-v1.0"
    assert ALIASES["eve-7b-hd"] == "BAAI/EVE-7B-HD-v1.0"
    assert ALIASES["eve-7b-hd-v2"] == "BAAI/EVE-7B-HD-v2.0"
