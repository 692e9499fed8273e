"""MoE-LLaVA: CLIP ViT-L/14-336 or SigLIP-384 -> mlp2x_gelu -> StableLM, Qwen 1 or Phi-2 with four
experts in every second layer, two of which a token goes to.

LLaVA-1.5 but for the language model, a prompt without BOS whose answers end with <|endoftext|>, and
a flat config with names of its own. With SigLIP, which has no class token, the first patch is left
out in its place, as in the original: 728 visual tokens.
Native layout: LLaVA's tower and connector; `language_model.` before the published names, the gate
as `gate.wg`.
Source: PKU-YuanGroup/MoE-LLaVA, moellava/model, moellava/conversation.py.
"""

import re
from collections.abc import Mapping
from typing import Any, Self

import mlx.core as mx
import numpy as np

from ..checkpoint.weights import Weights
from ..connectors.mlp import MLP
from ..errors import UsageError
from ..language.moe_llava import LanguageModel, TextConfig
from ..picture.image import Pixels
from ..text import prompt
from ..vision.vit import ViT
from . import llava
from .base import VisionLanguageModel
from .contract import Family

BASES = {f"moe_llava_{base}": base for base in ("stablelm", "qwen", "phi")}
PROJECTOR = "mlp2x_gelu"
LANGUAGE = "language_model."
# Published names -> parameters', after another, wherever they are in a name.
RENAMES = tuple(
    (re.compile(pattern), target)
    for pattern, target in (
        (r"\.deepspeed_moe\.gate\.wg$", ".gate"),
        (r"\.deepspeed_moe\.experts\.deepspeed_experts\.", ".experts."),
        (r"\.model\.final_layernorm\.", ".model.norm."),  # Phi-2
        (r"\.self_attn\.dense\.", ".self_attn.o_proj."),
        (r"\.transformer\.ln_f\.", ".model.norm."),  # Qwen
        (r"\.transformer\.wte\.", ".model.embed_tokens."),
        (r"\.transformer\.h\.", ".model.layers."),
        (r"\.ln_1\.", ".input_layernorm."),
        (r"\.ln_2\.", ".post_attention_layernorm."),
        (r"\.attn\.c_attn\.", ".self_attn.qkv_proj."),
        (r"\.attn\.c_proj\.", ".self_attn.o_proj."),
        (r"(\.mlp\.(?:experts\.\d+\.)?)w1\.", r"\1up_proj."),
        (r"(\.mlp\.(?:experts\.\d+\.)?)w2\.", r"\1gate_proj."),  # the one under silu
        (r"(\.mlp\.(?:experts\.\d+\.)?)c_proj\.", r"\1down_proj."),
    )
)


class Config(llava.Config):
    text: TextConfig

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a native config.json. Raises UsageError for a missing key or an unknown value."""
        kind, projector = config.get("model_type"), config.get("image_projector_type")
        if kind not in BASES:
            raise UsageError(f"config.json: model_type {kind!r} is no MoE-LLaVA's")
        if projector != PROJECTOR:
            raise UsageError(f"config.json: image_projector_type {projector!r} is not known")
        if not isinstance(config.get("vision_config"), Mapping):
            raise UsageError("config.json lacks 'vision_config'")
        text = TextConfig.of(config, BASES[kind])
        return cls.flat(config, text, projector)


def rename(name: str) -> str:
    """A native weight's name -> its parameter's (the vision tower's are folded instead)."""
    if not name.startswith(LANGUAGE):
        return llava.rename(name)
    for pattern, target in RENAMES:
        name = pattern.sub(target, name)
    return name


def fold(weights: Weights, config: Config) -> dict[str, mx.array]:
    """The model's parameters from renamed native weights."""
    return llava.fold(weights, config)


class Model(llava.Model):
    def __init__(self, config: Config) -> None:
        VisionLanguageModel.__init__(self)
        self.config = config
        self.vision_tower = ViT(config.vision)
        self.mm_projector = MLP(config.vision.hidden_size, config.text.hidden_size)
        self.language_model = LanguageModel(config.text)


class Processor(llava.Processor):
    """Vicuna's words with no BOS, and <|endoftext|> after each answer, for all three bases."""

    config: Config
    stop_tokens = ("<|endoftext|>",)
    answer_end = "<|endoftext|>"

    def expand(self, segments: list[str], pixels: list[Pixels]) -> tuple[list[int], np.ndarray]:
        """Each segment is tokenised by itself, and none has a BOS before it."""
        counts = [self.visual_tokens(image) for image in pixels]
        placeholder = self.config.image_token_index
        return prompt.expand_around_images(segments, counts, self.tokenizer, placeholder)


FAMILY = Family(Config, Processor, Model, rename, fold, llava.is_native)
