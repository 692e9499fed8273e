"""PEFT on a tiny reference model: adapters of every kind, saved, and the model that has them."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
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


def skeleton(weights: Mapping[str, mx.array]) -> nn.Module:
    """Modules that have published weights under their names and compute nothing: what PEFT needs of
    a model whose original code does not run here. Matrices are linear layers."""
    root = nn.Module()
    for name, array in weights.items():
        *parents, last = name.split(".")
        tensor = torch.from_numpy(np.array(array.astype(mx.float32)))
        if last == "weight" and tensor.ndim == 2:
            linear = nn.Linear(tensor.shape[1], tensor.shape[0], f"{name[:-6]}bias" in weights)
            linear.weight.data = tensor
            _below(root, parents[:-1]).add_module(parents[-1], linear)
    for name, array in weights.items():
        *parents, last = name.split(".")
        module = _below(root, parents)
        if not (last == "weight" and array.ndim == 2):
            tensor = torch.from_numpy(np.array(array.astype(mx.float32)))
            setattr(module, last, nn.Parameter(tensor))
    return root


def _below(module: nn.Module, names: Sequence[str]) -> nn.Module:
    for name in names:
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module._modules[name]
    return module


def merged(peft: nn.Module) -> dict[str, mx.array]:
    """The published weights with PEFT's own merge of its adapter in them, float32."""
    model = copy.deepcopy(peft).merge_and_unload()
    return {name: mx.array(tensor.float().numpy()) for name, tensor in model.state_dict().items()}
