"""transformers' CLIP and SigLIP towers, tiny, with variance-preserving random weights.

They stand alone: nested in another model, transformers 5 hands out wrong hidden states (twice as
many as there are, so that [-2] is the last).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from . import torchvision_shim
from .variance import randomise

torchvision_shim.install()

from transformers import (  # noqa: E402
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

GEOMETRY = {
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 58,  # four patches of 14 and a rest
    "patch_size": 14,
}
KINDS = {
    "clip": ("clip_vision_model", CLIPVisionConfig, CLIPVisionModel),
    "siglip": ("siglip_vision_model", SiglipVisionConfig, SiglipVisionModel),
}


@dataclass
class Tower:
    model: nn.Module
    config: dict[str, Any]

    @torch.no_grad()
    def hidden_states(self, pixels: np.ndarray) -> list[np.ndarray]:
        """[B, N, D] after the embeddings and after each layer, for pixels [B, H, W, 3]."""
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).double()
        states = self.model(pixel_values=x, output_hidden_states=True).hidden_states
        assert len(states) == self.config["num_hidden_layers"] + 1
        return [state.numpy() for state in states]

    @torch.no_grad()
    def last(self, pixels: np.ndarray) -> np.ndarray:
        """[B, N, D] after the final norm where the model has it on all tokens (SigLIP)."""
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).double()
        return self.model(pixel_values=x).last_hidden_state.numpy()

    def weights(self) -> dict[str, np.ndarray]:
        """By Hugging Face's names under vision_model., NHWC."""
        found = {}
        for name, tensor in self.model.state_dict().items():
            if tensor.dim() == 4:
                tensor = tensor.permute(0, 2, 3, 1)
            short = name.removeprefix("vision_model.")
            found[f"vision_model.{short}"] = tensor.float().contiguous().numpy()
        return found


def build(kind: str, **changes: Any) -> Tower:
    """`kind`: "clip" or "siglip"."""
    model_type, config_class, model_class = KINDS[kind]
    geometry = GEOMETRY | changes
    torch.manual_seed(0)
    model = model_class(config_class(**geometry)).float().eval()
    model.set_attn_implementation("eager")
    side = geometry["image_size"]
    x = torch.from_numpy(pixels(7, side)).permute(0, 3, 1, 2)
    randomise(model, lambda: model(pixel_values=x))
    for name, parameter in model.named_parameters():
        if name.endswith(("position_embedding.weight", "class_embedding")):
            parameter.data.mul_(0.5 / parameter.data.std())
    return Tower(model.double(), {"model_type": model_type, **geometry})


def pixels(seed: int, side: int, count: int = 1) -> np.ndarray:
    """Normalised pixels float32 [count, side, side, 3]."""
    values = np.random.default_rng(seed).normal(size=(count, side, side, 3))
    return values.astype(np.float32)
