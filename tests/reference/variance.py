"""Random weights under which signals neither die out nor blow up, so that parity sees every part.

With the usual small random weights a deep network's output is nearly its last bias: parity then
passes with whole layers missing. Here each layer is scaled, on one calibration input, until its
output has the spread it should have (LSUV, arXiv 1511.06422), and each BatchNorm gets the
statistics of what really reaches it.
"""

from collections.abc import Callable

import torch
from torch import nn

Target = Callable[[str], float]


def one(name: str) -> float:
    """The default spread of every layer's output."""
    return 1.0


def _scale_layer(name: str, target: Target) -> Callable[..., torch.Tensor]:
    def hook(layer: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        bias = 0 if layer.bias is None else layer.bias.detach().view(-1, *[1] * _trailing(layer))
        spread = (output - bias).std() + 1e-6
        gain = target(name) / spread
        layer.weight.data.mul_(gain)
        return (output - bias) * gain + bias

    return hook


def _trailing(layer: nn.Module) -> int:
    """Dimensions behind the channels of the layer's output: 2 for [B, C, H, W], 0 for [B, L, C]."""
    return 2 if isinstance(layer, nn.Conv2d) else 0


def _measure_norm(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    x = inputs[0]
    layer.running_mean.copy_(x.mean((0, 2, 3)))
    layer.running_var.copy_(x.var((0, 2, 3), unbiased=False) * layer.running_var + 1e-3)


def _uniform(parameter: torch.Tensor, low: float, high: float) -> None:
    parameter.data.uniform_(low, high)


def draw(model: nn.Module) -> None:
    """First values: normal weights, biases that matter, gains around one, layer scales in 0.3..1.

    The kernel of an already merged RepMixer or RepCPE keeps its identity, as a trained one has.
    """
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if "layer_scale" in name or leaf == "gamma":
            _uniform(parameter, 0.3, 1.0)
        elif leaf == "bias":
            parameter.data.normal_(0, 0.2)
        elif parameter.dim() == 1:
            _uniform(parameter, 0.7, 1.3)
        else:
            parameter.data.normal_(0, 1)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            _uniform(layer.running_var, 0.7, 1.4)


@torch.no_grad()
def randomise(
    model: nn.Module, run: Callable[[], object], seed: int = 0, target: Target = one
) -> None:
    """Draw the weights of `model` and scale them on what `run` feeds it.

    `target(name)` is the spread wanted of a layer's output; lm_head and gates want more than 1.
    """
    torch.manual_seed(seed)
    model.eval()
    draw(model)
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            hooks.append(layer.register_forward_hook(_scale_layer(name, target)))
        elif isinstance(layer, nn.BatchNorm2d):
            hooks.append(layer.register_forward_pre_hook(_measure_norm))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    _keep_identities(model)


def _keep_identities(model: nn.Module) -> None:
    """Kernels of merged RepMixers and RepCPEs: what was drawn, halved, plus the identity."""
    for name, layer in model.named_modules():
        merged = name.endswith(("token_mixer.reparam_conv", "pos_emb.reparam_conv"))
        if merged and isinstance(layer, nn.Conv2d):
            middle = layer.kernel_size[0] // 2
            layer.weight.data.mul_(0.5)
            layer.weight.data[:, 0, middle, middle] += 1
