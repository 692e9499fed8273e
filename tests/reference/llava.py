"""transformers' LLaVA-1.5 at a tiny size: its parts' outputs, and its weights in every layout.

The vision tower is run by itself: nested in LlavaModel, transformers 5 collects every hidden state
twice, so that layer -2 silently becomes the last (see the project's fact sheet, section 5.1).
"""

import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from . import torchvision_shim
from .fastvlm import spread
from .variance import randomise

torchvision_shim.install()

from transformers import (  # noqa: E402
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "mobilevlm_v1"
VOCAB, IMAGE, PAD = 576, 512, 513  # the tokenizer's 512, <image>, <pad>, and rows nobody uses
SIDE, TOKENS = 56, 16
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,  # 64 wide, as CLIP's are: the original layout does not say how many
    "image_size": SIDE,
    "patch_size": 14,
    "projection_dim": 32,
}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "image_size": SIDE + 2}  # and a rest
TEXT = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
ORIGINAL = {
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaForCausalLM"],
    **{key: value for key, value in TEXT.items() if key != "model_type"},
    "hidden_act": "silu",
    "image_aspect_ratio": "pad",
    "mm_hidden_size": 128,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-tiny-patch14-56",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass
class Reference:
    model: nn.Module
    tower: nn.Module
    strategy: str = "default"

    @torch.no_grad()
    def features(self, pixels: np.ndarray) -> torch.Tensor:
        """[1, N, 128] of normalised pixels [H, W, 3]: the last layer but one, without the first
        token unless the strategy is "full"."""
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
        states = self.tower(pixel_values=x, output_hidden_states=True).hidden_states
        assert len(states) == VISION["num_hidden_layers"] + 1
        return states[-2][:, int(self.strategy == "default") :]

    @torch.no_grad()
    def tokens(self, pixels: np.ndarray) -> torch.Tensor:
        return self.model.model.multi_modal_projector(self.features(pixels))

    @torch.no_grad()
    def logits(self, ids: list[int], visual: Any, tokens: torch.Tensor | None) -> np.ndarray:
        """[L, V] of ids whose positions `visual` take the visual tokens."""
        ids = [0 if index in set(visual) else token for index, token in enumerate(ids)]
        embedded = self.model.get_input_embeddings()(torch.tensor([ids]))
        if tokens is not None:
            embedded[0, torch.tensor(list(visual))] = tokens.reshape(-1, tokens.shape[-1])
        states = self.model.model.language_model(inputs_embeds=embedded, use_cache=False)
        return self.model.lm_head(states.last_hidden_state)[0].numpy()

    def greedy(self, ids: list[int], visual: Any, tokens: Any, count: int) -> list[int]:
        ids = list(ids)
        for _ in range(count):
            ids.append(int(self.logits(ids, visual, tokens)[-1].argmax()))
        return ids[-count:]


def build(vision: dict[str, Any] = VISION, strategy: str = "default") -> Reference:
    """A model with variance-preserving random weights, float64, in eval mode."""
    torch.manual_seed(0)
    clip, side = vision["model_type"] == "clip_vision_model", vision["image_size"]
    count = TOKENS + clip - (strategy == "default")
    config = LlavaConfig(
        vision_config=vision,
        text_config=TEXT,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
        image_seq_length=count,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).float().eval()
    model.set_attn_implementation("eager")
    ids = torch.tensor([[1, 40, 41, *[IMAGE] * count, *range(60, 90)]])
    x = torch.randn(1, 3, side, side)
    randomise(model, lambda: model(input_ids=ids, pixel_values=x), 0, spread)
    for name, parameter in model.named_parameters():
        if name.endswith(("position_embedding.weight", "class_embedding")):
            parameter.data.mul_(0.5 / parameter.data.std())
    made = (CLIPVisionModel, CLIPVisionConfig) if clip else (SiglipVisionModel, SiglipVisionConfig)
    tower = made[0](made[1](**vision)).eval()
    tower.load_state_dict(model.model.vision_tower.state_dict())
    tower.set_attn_implementation("eager")
    return Reference(model.double(), tower.double(), strategy)


def weights(reference: Reference, layout: str) -> dict[str, np.ndarray]:
    """By the names of "transformers 5", "hub", "original" or "towerless", PyTorch's layouts."""
    named = {}
    for name, tensor in copy.deepcopy(reference.model).float().state_dict().items():
        array = tensor.contiguous().numpy()
        if layout in NESTED:
            name = NESTED[layout](name)
        elif layout != "transformers 5":
            name = to_hub(name)
        if layout in ("original", "towerless"):
            name = to_original(name)
        if layout != "towerless" or "vision_tower" not in name:
            named[name] = array
    return named


def to_hub(name: str) -> str:
    """transformers 5's names in memory -> those of the files on the Hub."""
    name = name.replace("model.language_model.", "language_model.model.")
    name = name.replace("lm_head.", "language_model.lm_head.")
    name = name.replace("model.vision_tower.", "vision_tower.vision_model.")
    return name.replace("model.multi_modal_projector.", "multi_modal_projector.")


def to_5_5(name: str) -> str:
    """transformers 5's names in memory -> those that 5.4 and 5.5 wrote."""
    name = name.replace("model.language_model.", "model.language_model.model.")
    name = name.replace("lm_head.", "language_model.lm_head.")
    return name.replace("model.vision_tower.", "model.vision_tower.vision_model.")


# From 5.6 on the Hub's names, without vision_model.
NESTED = {
    "transformers 5.5": to_5_5,
    "transformers 5.6": lambda name: to_hub(name).replace("vision_model.", ""),
}


def to_original(name: str) -> str:
    """The Hub's names -> the original repository's."""
    for old, new in (
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def config(layout: str, **changes: Any) -> dict[str, Any]:
    """config.json as that layout's folders have it."""
    if layout in ("original", "towerless"):
        return ORIGINAL | changes
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": IMAGE,
        "pad_token_id": PAD,
        "projector_hidden_act": "gelu",
        "text_config": TEXT,
        "tie_word_embeddings": False,
        "vision_config": VISION,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    } | changes


def save(reference: Reference, layout: str, folder: Path, **changes: Any) -> Path:
    """A model folder in one of the layouts, with the golden tokenizer.model."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights(reference, layout), str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config(layout, **changes)))
    shutil.copyfile(GOLDEN / "tokenizer.model", folder / "tokenizer.model")
    tokenizer = json.loads((GOLDEN / "tokenizer_config.json").read_text())
    if layout not in ("original", "towerless"):
        extra = {str(IMAGE): "<image>", str(PAD): "<pad>"}
        tokenizer["added_tokens_decoder"] = {
            index: {"content": content, "special": True, "normalized": False}
            for index, content in extra.items()
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def save_tower(reference: Reference, folder: Path) -> Path:
    """The tower as a CLIP repository of its own: nested config, text side, pytorch_model.bin."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        f"vision_model.{name.removeprefix('vision_model.')}": tensor.float()
        for name, tensor in reference.tower.state_dict().items()
    }
    state |= {
        "text_model.embeddings.token_embedding.weight": torch.zeros(4, 8),
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "logit_scale": torch.tensor(4.6),
        "text_projection.weight": torch.zeros(8, 8),
        "visual_projection.weight": torch.zeros(8, 128),
    }
    torch.save(state, folder / "pytorch_model.bin")
    written = {"model_type": "clip", "vision_config": VISION}
    (folder / "config.json").write_text(json.dumps(written))
    return folder
