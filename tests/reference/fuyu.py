"""transformers' Fuyu at a tiny size, its processor and a tokenizer of Fuyu's kind.

The tokenizer is made as the published one is: a Unigram model with a "▁" put in front of every
text, whose |SPEAKER|, |NEWLINE|, <s> and <0x04> are pieces of the vocabulary and not added tokens.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import nn

from . import torchvision_shim
from .variance import randomise

torchvision_shim.install()

from transformers import (  # noqa: E402
    FuyuConfig,
    FuyuForCausalLM,
    FuyuProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.fuyu.image_processing_fuyu import FuyuImageProcessor  # noqa: E402
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil  # noqa: E402

VOCAB = 448
WIDE = torch.float64  # what results are handed out in
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "hidden_act": "relu2",
    "layer_norm_eps": 1e-5,
    "qk_layernorm": True,
    "eos_token_id": 2,
    "rope_theta": 25000.0,
}
WORDS = ["▁What", "▁is", "▁this", "▁it", "▁a", "▁the", "▁bus", "▁color", "What", "th", "er", "on"]


def tokenizer() -> Tokenizer:
    """Unigram with byte pieces; control pieces score 0, as sentencepiece writes them."""
    control = ["<unk>", "<s>", "</s>", "|ENDOFTEXT|", "|SPEAKER|", "|NEWLINE|"]
    pieces = [(piece, 0.0) for piece in control]
    pieces += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    pieces += [("▁", -3.0)] + [(chr(code), -5.0 - code / 100) for code in range(33, 127)]
    pieces += [(word, -4.0) for word in WORDS]
    assert len(pieces) <= VOCAB, len(pieces)
    built = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    built.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    built.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    built.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    built.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "</s>")])
    return built


def processor(pil: bool = False) -> FuyuProcessor:
    """transformers' processor; with torchvision's resize, or Pillow's as Adept's own code had."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    return FuyuProcessor(FuyuImageProcessorPil() if pil else FuyuImageProcessor(), fast)


def token_ids(text: str, image: np.ndarray | None) -> list[int]:
    """What transformers makes of a text and a picture [H, W, 3]."""
    images = None if image is None else Image.fromarray(image)
    made = processor()(text=text, images=images)["input_ids"]
    return torch.as_tensor(np.asarray(made)).flatten().tolist()


def patches(image: np.ndarray) -> np.ndarray:
    """float32 [patches, 2700] of a picture, with Pillow's resize: the original's whole chain."""
    pixels = FuyuImageProcessorPil()
    made = pixels(Image.fromarray(image))
    canvas = np.asarray(made["images"]).squeeze()  # [3, 1080, 1920]
    height, width = made["image_unpadded_heights"][0][0], made["image_unpadded_widths"][0][0]
    used = canvas[:, : -(-height // 30) * 30, : -(-width // 30) * 30]
    return FuyuImageProcessor().patchify_image(torch.tensor(used)[None])[0].numpy()


def build(seed: int = 0) -> nn.Module:
    """A model with variance-preserving random weights, float32, in eval mode."""
    torch.manual_seed(seed)
    model = FuyuForCausalLM(FuyuConfig(text_config={"model_type": "persimmon", **TEXT}))
    model.config.image_token_id = tokenizer().token_to_id("|SPEAKER|")
    model = model.float().eval()
    model.set_attn_implementation("eager")
    ids = torch.tensor([token_ids("What is this?\n", picture(99, 100, 70))])
    pixels = torch.tensor(patches(picture(99, 100, 70)))[None]
    randomise(model, lambda: model(input_ids=ids, pixel_values=pixels), seed, _spread)
    return model


def _spread(name: str) -> float:
    return 4.0 if name.endswith("lm_head") else 1.0


def picture(seed: int, width: int, height: int) -> np.ndarray:
    """A picture with structure at every scale, uint8 [H, W, 3]: blocks, a ramp and some noise."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 130, (-(-height // 16), -(-width // 16), 3))
    blocks = np.kron(blocks, np.ones((16, 16, 1)))[:height, :width]
    ramp = np.linspace(0, 90, width)[None, :, None]
    return (blocks + ramp + random.integers(0, 35, (height, width, 3))).astype(np.uint8)


@torch.no_grad()
def layers(model: nn.Module, ids: list[int], image: np.ndarray | None) -> list[np.ndarray]:
    """Input embeddings, every layer's output (the last one after the norm), logits; all [L, .]."""
    wide = next(model.parameters()).dtype
    pixels = None if image is None else torch.tensor(patches(image))[None].to(wide)
    output = model(input_ids=torch.tensor([ids]), pixel_values=pixels, output_hidden_states=True)
    return [stage[0].to(WIDE).numpy() for stage in (*output.hidden_states, output.logits)]


def greedy(
    model: nn.Module, ids: list[int], image: np.ndarray | None, count: int
) -> tuple[list[int], float]:
    """`count` greedy ids, each from a full forward, and the smallest lead of a winner."""
    ids, start, gap = list(ids), len(ids), float("inf")
    for _ in range(count):
        last = layers(model, ids, image)[-1][-1]
        second, first = np.sort(last)[-2:]
        gap = min(gap, float(first - second))
        ids.append(int(last.argmax()))
    return ids[start:], gap


def save(model: nn.Module, folder: Path, layout: str) -> Path:
    """A model folder, "hub" (adept/fuyu-8b's names and flat config) or "transformers" (5)."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    ids = {"image_newline_id": tokenizer().token_to_id("|NEWLINE|")}
    if layout == "transformers":
        model.save_pretrained(folder)
        written = json.loads((folder / "config.json").read_text()) | ids
    else:
        renamed = {hub_name(name): value for name, value in model.state_dict().items()}
        save_file({k: v.contiguous() for k, v in renamed.items()}, folder / "model.safetensors")
        ids["image_token_id"] = model.config.image_token_id
        written = {"model_type": "fuyu", "patch_size": 30, "num_channels": 3, **TEXT, **ids}
    (folder / "config.json").write_text(json.dumps(written))
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


def hub_name(name: str) -> str:
    """transformers 5's name of a weight -> adept/fuyu-8b's (facts: model_doc/fuyu, key mapping)."""
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    return f"language_model.{name}" if name.startswith("lm_head") else name.removeprefix("model.")
