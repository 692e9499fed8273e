"""PEFT on a tiny reference model: adapters of every kind, saved, and the model that has them."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import torchvision_shim

torchvision_shim.install()

from peft import LoraConfig, get_peft_model  # noqa: E402


def tuned(
    model: nn.Module, folder: Path, save_embedding_layers: bool | str = "auto", **settings: Any
) -> nn.Module:
    """A copy of the model with a random adapter, which is written to the folder.

    Every tensor of it is random: an update, or a replaced module, that is left out would show.
    """
    torch.manual_seed(5)
    config = LoraConfig(**{"r": 3, "lora_alpha": 6, "init_lora_weights": False, **settings})
    peft = get_peft_model(copy.deepcopy(model).float(), config)
    for name, parameter in peft.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data.mul_(1 + 0.3 * torch.rand_like(parameter))
        elif parameter.requires_grad:
            spread = 0.5 * parameter.data.std().nan_to_num(0.1).clamp(min=0.02)
            parameter.data.add_(spread * torch.randn_like(parameter))
    peft.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    return peft.double().eval()
