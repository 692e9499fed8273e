"""Begin from a trained native checkpoint: fused weights -> the un-fused, trainable modules.

A merged kernel goes into the convolution branch, less what the other branches add; every BatchNorm
is then set to pass its input through as it is on a batch of pictures. Attention blocks that the
checkpoint has not begin by adding nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from decoder import DemoModel
from network import (
    AttentionBlock,
    ConvBN,
    LargeKernel,
    MobileOne,
    RepCPE,
    RepMixer,
    VisionTower,
    pass_through,
)  # fmt: skip
from safetensors.torch import load_file
from torch import Tensor, nn

TOWER = "vision_tower.vision_model."
Weights = dict[str, Tensor]


def kernel(weight: Tensor) -> Tensor:
    """MLX's [out, H, W, in] -> PyTorch's [out, in, H, W]."""
    return weight.permute(0, 3, 1, 2).contiguous() if weight.ndim == 4 else weight


def silent(branch: ConvBN) -> None:
    """A branch that adds nothing yet."""
    branch.bn.weight.zero_()
    branch.bn.bias.zero_()


def branches(block: nn.Module, weights: Weights, name: str) -> dict[nn.Module, Tensor]:
    """Fill a block's branches from its merged kernel; BatchNorm -> the bias that it must add."""
    if isinstance(block, RepMixer):
        merged = kernel(weights[f"{name}.reparam_conv.weight"])
        mixer, scale = block.mixer.rbr_conv[0], block.layer_scale.view(-1)
        # x + s * (mixer(x) - norm(x)): the two skips cancel out.
        change = merged - pass_through(merged, merged.shape[0])
        mixer.conv.weight.copy_(change / scale.view(-1, 1, 1, 1))
        silent(block.mixer.rbr_scale)
        return {mixer.bn: weights[f"{name}.reparam_conv.bias"] / scale}
    if isinstance(block, LargeKernel):
        block.lkb_origin.conv.weight.copy_(kernel(weights[f"{name}.lkb_reparam.weight"]))
        silent(block.small_conv)
        return {block.lkb_origin.bn: weights[f"{name}.lkb_reparam.bias"]}
    if isinstance(block, RepCPE):
        merged = kernel(weights[f"{name}.reparam_conv.weight"])
        block.pe.weight.copy_(merged - pass_through(merged, merged.shape[0]))
        block.pe.bias.copy_(weights[f"{name}.reparam_conv.bias"])
    if isinstance(block, MobileOne) and f"{name}.reparam_conv.weight" in weights:
        merged, conv = kernel(weights[f"{name}.reparam_conv.weight"]), block.rbr_conv[0]
        if block.rbr_skip is not None:
            merged = merged - pass_through(merged, conv.conv.groups)
        if block.rbr_scale is not None:
            silent(block.rbr_scale)
        conv.conv.weight.copy_(merged)
        return {conv.bn: weights[f"{name}.reparam_conv.bias"]}
    return {}


def calibrate(tower: VisionTower, biases: dict[nn.Module, Tensor], pixels: Tensor) -> None:
    """Set each BatchNorm in `biases` to add its bias to what it gets, and no more."""

    def fit(bn: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        var, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        bn.running_mean.copy_(mean)
        bn.running_var.copy_(var)
        bn.weight.copy_((var + bn.eps).sqrt())
        bn.bias.copy_(mean + biases[bn])

    hooks = [bn.register_forward_pre_hook(fit) for bn in biases]
    norms = [module for module in tower.modules() if isinstance(module, nn.BatchNorm2d)]
    moves = norms[0].momentum
    for norm in norms:
        norm.momentum = 0.0  # statistics are set here, not collected
    tower.train()  # branch by branch
    tower(pixels)
    for norm in norms:
        norm.momentum = moves
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def begin(folder: Path, model: DemoModel, pixels: Tensor) -> None:
    """Fill the model with a native checkpoint's weights; `pixels` as in training."""
    weights = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    tower = {k.removeprefix(TOWER): v for k, v in weights.items() if k.startswith(TOWER)}
    biases: dict[nn.Module, Tensor] = {}
    for name, block in model.tower.named_modules():
        biases |= branches(block, tower, name.replace("patch_embed.", "patch_embed.blocks."))
        if name.endswith("rbr_skip"):
            biases[block] = torch.zeros(1)
        if isinstance(block, AttentionBlock) and f"{name}.norm.weight" not in tower:
            print(f"{name} is new: it begins by changing nothing")
            for last in (block.token_mixer.proj, block.convffn.fc2):
                last.weight.zero_()
                last.bias.zero_()
    own = model.tower.state_dict()
    for name, value in tower.items():
        if name in own:
            own[name].copy_(kernel(value).reshape(own[name].shape))
    calibrate(model.tower, biases, pixels)
    rest = {
        k.removeprefix("language_model."): v for k, v in weights.items() if not k.startswith(TOWER)
    }
    own = model.state_dict()
    for name, value in rest.items():
        name = name if name.startswith("model.") else f"model.{name}"
        own[name].copy_(value)
