"""transformers' Idefics3 and SmolVLM at tiny sizes, with their own image processors (Pillow's).

Three cases, one per scale factor, each with what is particular to one published size:
"idefics3": scale 2, llama3 RoPE, markers that are ordinary text, a tokenizer that adds BOS itself;
"smolvlm-2b": scale 3, tiles whose last pixels fill no patch, markers as text, no BOS of its own;
"smolvlm": scale 4, a tied head, markers that are tokens, saved under the second model type.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn

from . import torchvision_shim
from .variance import randomise

torchvision_shim.install()

from transformers import PreTrainedTokenizerFast  # noqa: E402
from transformers.models.idefics3 import configuration_idefics3, modeling_idefics3  # noqa: E402
from transformers.models.idefics3.image_processing_pil_idefics3 import (  # noqa: E402
    Idefics3ImageProcessorPil,
)
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor  # noqa: E402
from transformers.models.smolvlm import configuration_smolvlm, modeling_smolvlm  # noqa: E402

TEMPLATE = (
    "{bos}{{% for message in messages %}}{{{{message['role'] | capitalize}}}}"
    "{{% if message['content'][0]['type'] == 'image' %}}{{{{':'}}}}{{% else %}}{{{{': '}}}}"
    "{{% endif %}}{{% for line in message['content'] %}}{{% if line['type'] == 'text' %}}"
    "{{{{line['text']}}}}{{% elif line['type'] == 'image' %}}{{{{ '<image>' }}}}{{% endif %}}"
    "{{% endfor %}}<end_of_utterance>\n{{% endfor %}}{{% if add_generation_prompt %}}"
    "{{{{ 'Assistant:' }}}}{{% endif %}}"
)
MARKERS = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


class Case(NamedTuple):
    """A tiny model: its scale factor, tile and patch in pixels, and what is particular to it."""

    family: str
    scale: int
    tile: int
    patch: int
    bos: str
    adds_bos: bool
    marker_tokens: bool
    tied: bool
    rope: dict[str, Any]


CASES = {
    "idefics3": Case("idefics3", 2, 16, 4, "<|begin_of_text|>", True, False, False, LLAMA3),
    "smolvlm-2b": Case("idefics3", 3, 38, 4, "<|im_start|>", False, False, False, PLAIN),
    "smolvlm": Case("smolvlm", 4, 32, 4, "<|im_start|>", False, True, True, PLAIN),
}


def tokenizer(case: Case) -> Tokenizer:
    """Byte-level, with the merge of two newlines, and the special tokens of the case."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["ĊĊ", "th", "in", "er", "an", "Ġt", "Ġi", "Ġa"]
    vocab = {text: index for index, text in enumerate([*alphabet, *merged])}
    built = Tokenizer(models.BPE(vocab=vocab, merges=[(text[0], text[1]) for text in merged]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    markers = ["<global-img>", *MARKERS] if case.marker_tokens else []
    names = [case.bos, *markers, "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    built.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    if case.adds_bos:
        bos = (case.bos, built.token_to_id(case.bos))
        template = f"{case.bos} $A"
        built.post_processor = processors.TemplateProcessing(template, special_tokens=[bos])
    return built


def vision_config(case: Case) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": case.tile,
        "patch_size": case.patch,
    }


def text_config(case: Case) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": tokenizer(case).get_vocab_size() + 5,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": case.rope,
        "tie_word_embeddings": case.tied,
    }


def config(case: Case) -> Any:
    kinds: dict[str, Any] = {
        "idefics3": configuration_idefics3.Idefics3Config,
        "smolvlm": configuration_smolvlm.SmolVLMConfig,
    }
    return kinds[case.family](
        text_config=text_config(case),
        vision_config=vision_config(case),
        scale_factor=case.scale,
        image_token_id=tokenizer(case).token_to_id("<image>"),
        tie_word_embeddings=case.tied,
    )


def image_processor(case: Case, **options: Any) -> Any:
    edges = {"size": {"longest_edge": 4 * case.tile}, "max_image_size": {"longest_edge": case.tile}}
    return Idefics3ImageProcessorPil(**{**edges, **options})


def processor(case: Case, **options: Any) -> Any:
    """transformers' whole processor; SmolVLM's differs from Idefics3's in videos only."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(case), bos_token=case.bos, eos_token="<end_of_utterance>"
    )
    tokens = (case.tile // case.patch // case.scale) ** 2
    template = TEMPLATE.format(bos=case.bos)
    return Idefics3Processor(
        image_processor(case, **options), wrapped, image_seq_len=tokens, chat_template=template
    )


def picture(seed: int, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3] with structure at every scale: blocks, ramps and some noise."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 80, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    blocks = random.integers(0, 90, (-(-height // 12), -(-width // 12), 3))
    blocks = np.kron(blocks, np.ones((12, 12, 1)))[:height, :width]
    return np.clip(ramp + blocks + random.integers(0, 25, (height, width, 3)), 0, 255).astype("u1")


def build(case: Case, seed: int = 0) -> nn.Module:
    """A model with variance-preserving random weights, float64 so that its rounding is none."""
    kinds: dict[str, ModuleType] = {"idefics3": modeling_idefics3, "smolvlm": modeling_smolvlm}
    names = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}
    kind = getattr(kinds[case.family], f"{names[case.family]}ForConditionalGeneration")
    torch.manual_seed(seed)
    model = kind(config(case)).float().eval()
    model.set_attn_implementation("eager")
    inputs = prepare(case, f"{case.bos}User:<image>What is it?", [picture(99, 50, 40)])
    spread = {"lm_head": 4.0}
    randomise(model, lambda: model(**inputs), seed, lambda name: spread.get(name, 1.0))
    if case.tied:
        model.tie_weights()
    return model.double()


def prepare(case: Case, text: str, images: list[np.ndarray], **options: Any) -> dict[str, Any]:
    """What transformers' processor makes of a rendered text and its images."""
    chosen = {"images": [images]} if images else {}
    made = processor(case, **options)(
        text=[text], **chosen, add_special_tokens=False, return_tensors="pt"
    )
    return dict(made)


def render(case: Case, messages: list[dict[str, Any]]) -> str:
    return processor(case).apply_chat_template(messages, add_generation_prompt=True)


@torch.no_grad()
def features(model: nn.Module, pixels: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """Image features [tiles, N, C] of pixels [tiles, 3, H, W] and a mask [tiles, H, W]."""
    kept: list[torch.Tensor] = []
    hook = model.model.vision_model.register_forward_hook(
        lambda _module, _inputs, output: kept.append(output.last_hidden_state)
    )
    model.model.get_image_features(pixels[None].double(), mask[None])
    hook.remove()
    return kept[0].numpy()


@torch.no_grad()
def visual_tokens(model: nn.Module, pixels: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """[tiles * tokens per tile, D]."""
    found = model.model.get_image_features(pixels[None].double(), mask[None]).pooler_output
    return torch.cat(list(found)).numpy()


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Any]) -> np.ndarray:
    """[L, V] of the whole prompt."""
    return model(**inputs).logits[0].numpy()


@torch.no_grad()
def greedy(model: nn.Module, inputs: dict[str, Any], count: int) -> tuple[list[int], float]:
    """`count` greedy ids, each from a full forward, and the smallest lead of a winner."""
    inputs, ids, gap = dict(inputs), [], float("inf")
    inputs.pop("attention_mask", None)
    for _ in range(count):
        last = logits(model, inputs)[-1]
        second, first = np.sort(last)[-2:]
        gap = min(gap, float(first - second))
        ids.append(int(last.argmax()))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids[-1:]])], dim=1)
    return ids, gap


def save(model: nn.Module, case: Case, folder: Path) -> Path:
    """A Hugging Face folder as the published ones are."""
    folder.mkdir(parents=True, exist_ok=True)
    single = model.float()
    single.save_pretrained(folder, safe_serialization=True)
    model.double()
    tokenizer(case).save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": case.bos,
        "eos_token": "<end_of_utterance>",
        "chat_template": TEMPLATE.format(bos=case.bos),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor(case).to_dict()))
    return folder
