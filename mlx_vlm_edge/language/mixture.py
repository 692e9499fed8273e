"""DeepSpeed's mixture of experts at evaluation: a token [D] -> the two experts that its gate likes
best, their outputs weighted and added up.

The gate is in float32. The first choice has the largest logit, the second the largest of the rest:
the original adds Gumbel noise to these at inference too, so that two of its runs differ; we do not.
Where an expert takes `capacity` tokens only, the tokens after these go without it.
Source: DeepSpeed 0.9.5, deepspeed/moe/sharded_moe.py (top2gating), experts.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.config import check, first
from ..errors import UsageError
from ..kernels import cpu, forms

CHOICES = 2  # experts of a token
MAX_EXPERTS = 1000
SORTED = 64  # rows from which on MLX's kernel gains from having each expert's together
_ONLY = {"top_k_experts": CHOICES, "use_residual": False, "moe_enable": True}


@dataclass(frozen=True)
class MixtureConfig:
    """experts: how many each layer has, 0 where it has one MLP as ever. The rest is the gate's."""

    experts: tuple[int, ...]
    eval_capacity_factor: float
    min_capacity: int

    def __post_init__(self) -> None:
        check(self)
        if any(0 < count < CHOICES for count in self.experts) or self.eval_capacity_factor <= 0:
            raise UsageError("config.json: moe: a gate that chooses two experts has two or more")
        if max(self.experts, default=0) > MAX_EXPERTS:
            raise UsageError(
                f"config.json: moe: {max(self.experts):,} experts are more than any has"
            )

    @classmethod
    def from_dict(cls, block: Mapping[str, Any], layers: int) -> "MixtureConfig":
        """Read MoE-LLaVA's `moe`. Raises UsageError for what its released models don't do.

        Defaults are the original class's, which the released values differ from.
        """
        for key, known in _ONLY.items():
            if (value := first(block.get(key), known)) != known:
                raise UsageError(f"config.json: moe: {key} {value!r} is not known")
        try:
            indices, counts = block["moe_layers_idx"], block["num_experts"]
        except KeyError as error:
            raise UsageError(f"config.json: moe lacks {error.args[0]!r}") from error
        counts = counts * len(indices) if len(counts) == 1 else counts
        if len(counts) != len(indices) or not all(0 <= index < layers for index in indices):
            raise UsageError(f"config.json: moe: experts {counts} for layers {indices} of {layers}")
        placed = dict(zip(indices, counts, strict=True))
        return cls(
            experts=tuple(placed.get(index, 0) for index in range(layers)),
            eval_capacity_factor=first(block.get("eval_capacity_factor"), 1.0),
            min_capacity=first(block.get("min_capacity"), 4),
        )

    def capacity(self, tokens: int, experts: int) -> int:
        """How many of the tokens an expert takes at most, rounded in float32 as in the original."""
        factor = np.float32(self.eval_capacity_factor * CHOICES)
        return max(math.ceil(np.float32(tokens / experts) * factor), self.min_capacity)


class Stack(nn.Module):
    """The same layer of every expert, plain or quantised: weight [E, out, in]."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        for name, setting in _form(layers[0]).items():
            setattr(self, name, setting)
        for name in layers[0].parameters():
            self[name] = mx.stack([layer[name] for layer in layers])

    def __call__(self, x: mx.array, experts: mx.array, in_order: bool) -> mx.array:
        """x [N, in], each row by the layer of its own expert, int[N] -> [N, out]."""
        rows = x[:, None]
        chosen: dict[str, Any] = {"rhs_indices": experts, "sorted_indices": in_order}
        if "scales" in self:
            w, scales, biases = self.weight, self.scales, self.get("biases")
            y = mx.gather_qmm(rows, w, scales, biases, **_form(self), **chosen)[:, 0]
        else:
            y = mx.gather_mm(rows, self.weight.swapaxes(-1, -2), **chosen)[:, 0]
        return y + self.bias[experts] if "bias" in self else y


def _form(layer: nn.Module) -> dict[str, Any]:
    """How a layer is quantised; {} where it is not."""
    names = ("group_size", "bits", "mode") if "scales" in layer else ()
    return {name: getattr(layer, name) for name in names}


def _stacked(experts: Sequence[nn.Module]) -> dict[str, Stack]:
    """The layers of some MLPs by name; {} where they are of several kinds, or a CPU's."""
    columns = {name: [expert[name] for expert in experts] for name in experts[0].children()}
    for layers in columns.values():
        kinds = {(type(layer), *_form(layer).values(), *layer.parameters()) for layer in layers}
        if len(kinds) > 1 or type(layers[0]) not in (nn.Linear, nn.QuantizedLinear):
            return {}
    return {name: Stack(layers) for name, layers in columns.items()}


class Bound:
    """Stacks in the place of an MLP's layers, for some rows: what the MLP's own code is run on."""

    def __init__(self, stacks: Mapping[str, Stack], experts: mx.array, in_order: bool) -> None:
        self.stacks = stacks
        self.chosen: dict[str, Any] = {"experts": experts, "in_order": in_order}

    def __contains__(self, name: str) -> bool:
        return name in self.stacks

    def __getattr__(self, name: str) -> Any:
        return partial(self.stacks[name], **self.chosen)


class Mixture(nn.Module):
    """What stands in an MLP's place; its experts are MLPs. `fuse` stacks them for a GPU, which then
    need not wait to learn which of them a token goes to."""

    def __init__(
        self, config: MixtureConfig, hidden_size: int, experts: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.config, self.kind = config, type(experts[0])
        self.gate = mx.zeros((len(experts), hidden_size))  # no Linear: it is never quantised
        self.experts = list(experts)

    def fuse(self) -> None:
        for expert in self.experts:
            expert.fuse()
        if forms() is not cpu and (stacks := _stacked(self.experts)):
            self.stacks, self.experts = stacks, []

    def drops(self, tokens: int) -> bool:
        """Whether an expert may have too little room for that many tokens."""
        return self.config.capacity(tokens, self.gate.shape[0]) < tokens

    def __call__(self, x: mx.array) -> mx.array:
        """[B, L, D] -> [B, L, D]. Each sequence as if it were alone: which tokens are dropped hangs
        on those before, and must not on other people's prompts."""
        chosen, weights = self.route(x)
        rows, experts = x.reshape(-1, x.shape[-1]), chosen.reshape(-1, CHOICES)
        stacks = self.get("stacks") or (None if forms() is cpu else _stacked(self.experts))
        y = self._gathered(rows, experts, stacks) if stacks else self._one_by_one(rows, experts)
        y = y.reshape(*x.shape[:-1], CHOICES, -1)
        return (y * weights[..., None].astype(x.dtype)).sum(axis=-2)

    def logits(self, x: mx.array) -> mx.array:
        """What the gate makes of x [B, L, D]: float32 [B, L, E].

        No matmul, which some GPUs compute in TF32: choices would be others than the original's, and
        others for a prompt in parts.
        """
        products = x.astype(mx.float32)[..., None, :] * self.gate.astype(mx.float32)
        return products.sum(axis=-1)

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The experts of each token, int[B, L, 2], and their weights: 0 where it is dropped, else
        they add up to 1."""
        logits = self.logits(x)
        L, E = logits.shape[-2:]
        chosen = mx.argsort(-logits, axis=-1)[..., :CHOICES]
        p = mx.take_along_axis(mx.softmax(logits, axis=-1), chosen, axis=-1)
        if self.drops(L):
            p = p * (_places(chosen, E) < self.config.capacity(L, E))
        return chosen, p / mx.maximum(p.sum(axis=-1, keepdims=True), mx.finfo(mx.float32).eps)

    def _gathered(self, rows: mx.array, chosen: mx.array, stacks: Mapping[str, Stack]) -> mx.array:
        """rows [S, D], chosen int[S, 2] -> what each row's experts make of it [S, 2, D]. Lazy."""
        experts = chosen.flatten()
        order = mx.argsort(experts) if experts.size >= SORTED else mx.arange(experts.size)
        bound = Bound(stacks, experts[order], experts.size >= SORTED)
        y = self.kind.__call__(bound, rows[order // CHOICES])
        return y[mx.argsort(order)].reshape(*chosen.shape, -1)

    def _one_by_one(self, rows: mx.array, chosen: mx.array) -> mx.array:
        """The same, one expert after the other. Waits for the gate."""
        experts = np.array(chosen).flatten()
        order = np.argsort(experts, kind="stable")
        queues = np.split(order, np.flatnonzero(np.diff(experts[order])) + 1)
        parts = [self.experts[experts[own[0]]](rows[mx.array(own // CHOICES)]) for own in queues]
        return mx.concatenate(parts)[mx.array(np.argsort(order))].reshape(*chosen.shape, -1)


def _places(chosen: mx.array, experts: int) -> mx.array:
    """How many tokens are before each in the queues of its two experts: int[B, L, 2].

    All first choices go before all second ones: [[0, 1], [0, 2], [1, 0]] -> [[0, 1], [1, 0],
    [0, 2]].
    """
    one_hot = (chosen[..., None] == mx.arange(experts)).astype(mx.int32)  # [B, L, 2, E]
    before = mx.cumsum(one_hot, axis=1) - one_hot
    first_choices = one_hot[:, :, :1].sum(axis=1, keepdims=True)
    before = before + mx.concatenate([mx.zeros_like(first_choices), first_choices], axis=2)
    return (before * one_hot).sum(axis=-1)
