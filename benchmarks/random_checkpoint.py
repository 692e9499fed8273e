"""A FastVLM-0.5B folder with random weights at full size, which mlx-vlm and we both load.

python benchmarks/random_checkpoint.py FOLDER [--bits 4|8] [--layers N] [--vision-layers a,b,c,d,e]

For timing and for comparing two programs: latency does not depend on the values. The values keep a
signal's spread from the pixels to the logits, so that equal answers mean something.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

TEXT = {
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LAYERS, WIDTHS = (2, 12, 24, 4, 2), (96, 192, 384, 768, 1536)
BLOCKS_AT = (0, 2, 4, 7, 10)  # indices within `network`; the downsamplings stand before them
DOWN_AT = (1, 3, 5, 8)
POSITIONS_AT = {6: 768, 9: 1536}
ATTENTION = (3, 4)  # stages
SIDE, EMBEDDED, HEAD = 1024, 3072, 768
TOWER = "vision_tower.vision_model."
WORDS_OF_TEXT = 151643
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = """You are a helpful assistant Describe the image in detail What is this photo of system
user Who How many people there this it picture see do can one two short sentence and to for
with on at"""
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Variances that make up for activations; the decoder's branches outweigh what they are added to,
# so that tied embeddings do not just repeat the last token.
GAINS = {
    "fc1": 2.0,
    "token_mixer.reparam_conv": 1.5,
    "reparam": 2.5,  # each GELU behind one halves what is small
    "mm_projector": 1.0,
    "o_proj": 9.0,
    "down_proj": 90.0,
}
Shapes = dict[str, tuple[int, ...]]


def convolution(name: str, out: int, side: int, inputs: int = 1) -> Shapes:
    return {f"{name}.weight": (out, side, side, inputs), f"{name}.bias": (out,)}


def linear(name: str, out: int, inputs: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, inputs)} | ({f"{name}.bias": (out,)} if bias else {})


def tower_shapes(layers: tuple[int, ...] = LAYERS) -> Shapes:
    """FastViTHD in the native layout, re-parameterised, NHWC."""
    stem = "patch_embed.blocks."
    shapes = convolution(f"{stem}0.reparam_conv", WIDTHS[0], 3, 3)
    shapes |= convolution(f"{stem}1.reparam_conv", WIDTHS[0], 3)
    shapes |= convolution(f"{stem}2.reparam_conv", WIDTHS[0], 1, WIDTHS[0])
    for stage, (count, width) in enumerate(zip(layers, WIDTHS, strict=True)):
        for index in range(count):
            block = f"network.{BLOCKS_AT[stage]}.{index}."
            shapes |= block_shapes(block, width, stage in ATTENTION)
    for at, width in zip(DOWN_AT, WIDTHS[1:], strict=True):
        shapes |= convolution(f"network.{at}.proj.0.lkb_reparam", width, 7)
        shapes |= convolution(f"network.{at}.proj.1.reparam_conv", width, 1, width)
    for at, width in POSITIONS_AT.items():
        shapes |= convolution(f"network.{at}.reparam_conv", width, 7)
    shapes |= convolution("conv_exp.reparam_conv", EMBEDDED, 3)
    shapes |= convolution("conv_exp.se.reduce", EMBEDDED // 16, 1, EMBEDDED)
    shapes |= convolution("conv_exp.se.expand", EMBEDDED, 1, EMBEDDED // 16)
    shapes["head.proj"] = (EMBEDDED, HEAD)
    return {TOWER + name: shape for name, shape in shapes.items()}


def block_shapes(block: str, width: int, attention: bool) -> Shapes:
    ffn = f"{block}convffn."
    shapes: Shapes = {f"{ffn}conv.conv.weight": (width, 7, 7, 1)}
    for name in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"{ffn}conv.bn.{name}"] = (width,)
    shapes |= convolution(f"{ffn}fc1", 4 * width, 1, width)
    shapes |= convolution(f"{ffn}fc2", width, 1, 4 * width)
    if not attention:
        shapes |= convolution(f"{block}token_mixer.reparam_conv", width, 3)
        return shapes | {f"{block}layer_scale": (1, 1, width)}
    shapes |= linear(f"{block}token_mixer.qkv", 3 * width, width, bias=False)
    shapes |= linear(f"{block}token_mixer.proj", width, width)
    shapes |= {f"{block}norm.{name}": (width,) for name in ("weight", "bias")}
    return shapes | {f"{block}layer_scale_{index}": (1, 1, width) for index in (1, 2)}


def decoder_shapes(layers: int) -> Shapes:
    """The connector and Qwen2 with tied embeddings."""
    width, inner = TEXT["hidden_size"], TEXT["intermediate_size"]
    narrow = width * TEXT["num_key_value_heads"] // TEXT["num_attention_heads"]
    shapes = linear("mm_projector.0", width, EMBEDDED) | linear("mm_projector.2", width, width)
    shapes["language_model.model.embed_tokens.weight"] = (TEXT["vocab_size"], width)
    shapes["language_model.model.norm.weight"] = (width,)
    for index in range(layers):
        layer = f"language_model.model.layers.{index}."
        for name, out in (("q", width), ("k", narrow), ("v", narrow)):
            shapes |= linear(f"{layer}self_attn.{name}_proj", out, width)
        shapes |= linear(f"{layer}self_attn.o_proj", width, width, bias=False)
        shapes |= linear(f"{layer}mlp.gate_proj", inner, width, bias=False)
        shapes |= linear(f"{layer}mlp.up_proj", inner, width, bias=False)
        shapes |= linear(f"{layer}mlp.down_proj", width, inner, bias=False)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (width,)
    return shapes


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values, the same ones for the same name; a merged kernel keeps its identity."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    leaf = name.rpartition(".")[2]
    if "layer_scale" in name:
        return rng.uniform(0.1, 0.3, shape).astype(np.float32)
    if leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
        return rng.uniform(0.7, 1.4, shape).astype(np.float32)
    drawn = rng.standard_normal(shape, dtype=np.float32)
    if leaf in ("bias", "running_mean"):
        return drawn * np.float32(0.03 if name.startswith(TOWER) else 0.1)
    if "embed_tokens" in name:
        drawn[WORDS_OF_TEXT + len(SPECIAL) :] = 0  # ids without text are never the best answer
        return drawn
    fan_in = shape[0] if leaf == "proj" else int(np.prod(shape[1:]))
    gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
    drawn *= np.float32((gain / fan_in) ** 0.5)
    if holds_identity(name, shape):
        drawn *= np.float32(0.1)
        drawn[:, shape[1] // 2, shape[2] // 2, 0] += 1
    return drawn


def holds_identity(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this kernel has its block's residual merged in: RepMixers and position encodings."""
    merged = "token_mixer.reparam_conv" in name or any(
        f"network.{at}.reparam_conv" in name for at in POSITIONS_AT
    )
    return merged and len(shape) == 4


def config(layers: int, vision_layers: tuple[int, ...], side: int) -> dict[str, Any]:
    """config.json with what mlx-vlm and we read."""
    return {
        "model_type": "llava_qwen2",
        "architectures": ["LlavaQwen2ForCausalLM"],
        **TEXT,
        "num_hidden_layers": layers,
        "eos_token_id": WORDS_OF_TEXT + 2,
        "image_aspect_ratio": "pad",
        "image_token_index": -200,
        "mm_hidden_size": EMBEDDED,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": f"mobileclip_l_{side}",
        "tokenizer_model_max_length": 8192,
        "tokenizer_padding_side": "right",
        "vision_config": {
            "model_type": "llava_qwen2",
            "image_size": side,
            "patch_size": 64,
            "layers": list(vision_layers),
            "embed_dims": list(WIDTHS),
            "mlp_ratios": [4] * 5,
            "projection_dim": HEAD,
            "token_mixers": ["repmixer"] * 3 + ["attention"] * 2,
        },
    }


def preprocessor(side: int) -> dict[str, Any]:
    """preprocessor_config.json of CLIP's kind, without mean and standard deviation."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": side, "width": side},
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "resample": 3,
        "rescale_factor": 1 / 255,
    }


def byte_letters() -> list[str]:
    """The letters that byte-level BPE writes bytes as: printable ones themselves, others above."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + index) for index in range(len(moved))]


def merges_of_words() -> Iterator[tuple[str, str]]:
    """Merges that make one token of each word in WORDS, with and without the space before it."""
    for space in ("\u0120", ""):
        for word in WORDS.split():
            start, rest = (space, word) if space else (word[0], word[1:])
            for letter in rest:
                yield start, letter
                start += letter


def bpe(size: int = WORDS_OF_TEXT) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of `size` tokens and the merges that make them, some seven letters long."""
    tokens = byte_letters()
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []

    def add(left: str, right: str) -> None:
        whole = left + right
        if whole not in vocabulary and len(vocabulary) < size:
            vocabulary[whole] = len(vocabulary)
            tokens.append(whole)
            merges.append((left, right))

    for left, right in merges_of_words():
        add(left, right)
    lower = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    for left in ["\u0120", *lower]:
        for right in lower:
            add(left, right)
    rng = np.random.default_rng(0)
    while len(vocabulary) < size:
        drawn = rng.random(2 * 65536).reshape(-1, 2)
        letters = len(byte_letters())
        for left, right in (letters + drawn * (len(tokens) - letters) * [1.0, 0.02]).astype(int):
            if len(tokens[left]) + len(tokens[right]) <= 12:
                add(tokens[left], tokens[right])
    return vocabulary, merges


def tokenizer() -> dict[str, Any]:
    """tokenizer.json as Qwen2's is built, 11 MB."""
    vocabulary, merges = bpe()
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated"}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": len(vocabulary) + index, "content": text, **flags, "special": True}
        for index, text in enumerate(SPECIAL)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, level | {"use_regex": False}],
        },
        "post_processor": level | {"use_regex": False},
        "decoder": level | {"use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def tokenizer_config() -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 8192,
        "add_prefix_space": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
        "added_tokens_decoder": {
            str(WORDS_OF_TEXT + index): {"content": text, **flags, "special": True}
            for index, text in enumerate(SPECIAL)
        },
    }


def write(
    folder: Path,
    *,
    bits: int | None = None,
    layers: int = TEXT["num_hidden_layers"],
    vision_layers: tuple[int, ...] = LAYERS,
    side: int = SIDE,
) -> Path:
    """Write the folder; bits quantises the language model as `convert --bits` does."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = tower_shapes(vision_layers) | decoder_shapes(layers)
    written = config(layers, vision_layers, side)
    arrays: dict[str, mx.array] = {}
    for name, shape in shapes.items():
        arrays[name] = mx.array(weight(name, shape))
    if bits:
        from mlx_vlm_edge_convert.quantize import quantize

        arrays, block = quantize(arrays, bits)
        written |= {"quantization": block, "quantization_config": block}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    write_json(folder / "config.json", written)
    write_json(folder / "preprocessor_config.json", preprocessor(side))
    write_json(folder / "tokenizer.json", tokenizer())
    write_json(folder / "tokenizer_config.json", tokenizer_config())
    return folder


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantise the language model")
    parser.add_argument("--layers", type=int, default=TEXT["num_hidden_layers"])
    parser.add_argument("--vision-layers", default=",".join(map(str, LAYERS)), metavar="a,b,c,d,e")
    parser.add_argument("--side", type=int, default=SIDE, help="pixels (default: %(default)s)")
    args = parser.parse_args()
    blocks = tuple(int(count) for count in args.vision_layers.split(","))
    print(f"writing {args.folder} ...", file=sys.stderr)
    write(args.folder, bits=args.bits, layers=args.layers, vision_layers=blocks, side=args.side)


if __name__ == "__main__":
    main()
