"""A model's native weights and adapters -> the weights with them, and what stays beside.

Full-precision weights take an update up before anything is built, so that a fused model costs what
it did. Packed ones cannot, and weights that models share must not: their layers get it as a branch
of low rank (kernels/low_rank.py).
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..checkpoint.adapter import Adapter, LowRank
from ..checkpoint.quantization import PARTS, dequantized, form
from ..errors import UsageError
from ..kernels import low_rank
from .build import TOWERS

Arrays = dict[str, mx.array]
EMBEDDING = "language_model.model.embed_tokens"
HEAD = "language_model.lm_head"


class Native(Protocol):
    """A native name, and what the original's tensor becomes under it."""

    @property
    def name(self) -> str: ...
    @property
    def transform(self) -> Callable[[mx.array], mx.array]: ...


# (config, published names of weights, the adapter for messages) -> their native names.
NativeNames = Callable[[Mapping[str, Any], Iterable[str], str], Mapping[str, Native]]


@dataclass(frozen=True)
class Adapted:
    """Native weights with whatever could be merged.

    branches: updates of layers that do not take them up, by name. changed: the layers that have any
    part of one, and whether more updates of it would add up. untied: whether a tied head was given
    weights of its own.
    """

    arrays: Arrays
    branches: Sequence[tuple[str, LowRank]] = ()
    changed: Mapping[str, bool] = field(default_factory=dict)
    untied: bool = False

    @property
    def tower_changed(self) -> bool:
        """Whether pictures are encoded otherwise than by the base."""
        return any(layer.startswith(TOWERS) for layer in self.changed)

    def place(self, model: nn.Module, rename: Callable[[str], str]) -> None:
        """Put the branches beside their layers; `rename` gives parameters' names of native ones."""
        for name, update in self.branches:
            path = rename(f"{name}.weight").removesuffix(".weight")
            layer = dict(model.named_modules())[path]
            model.update_modules(tree_unflatten([(path, branched(layer, update))]))


def adapt(
    config: Mapping[str, Any],
    before: Adapted,
    adapters: Sequence[Adapter],
    native_names: NativeNames,
    shared: Collection[str] = (),
) -> Adapted:
    """A model's native weights with adapters, one after the other. Nothing is evaluated.

    before: the weights, with earlier adapters. native_names: what knows published names. shared:
    layers that take no update up. Raises UsageError for layers that the model does not have or that
    are shaped otherwise, and for two adapters that change one layer and do not add up.
    """
    base = _Base(config, before, shared)
    for adapter in adapters:
        base.take(adapter, native_names)
    return Adapted(base.arrays, base.branches, base.changed, base.untied)


def _native(
    config: Mapping[str, Any], adapter: Adapter, arrays: Arrays, native_names: NativeNames
) -> tuple[dict[str, LowRank], Arrays]:
    """Its updates and whole weights under native names. Raises UsageError where one has none."""
    if not adapter.published:
        return {_under(layer, arrays): update for layer, update in adapter.low_rank.items()}, {}
    layers = native_names(config, [f"{layer}.weight" for layer in adapter.low_rank], adapter.called)
    low = {
        layers[f"{layer}.weight"].name.removesuffix(".weight"): update
        for layer, update in adapter.low_rank.items()
    }
    names = native_names(config, adapter.whole, adapter.called)
    whole = {names[name].name: names[name].transform(a) for name, a in adapter.whole.items()}
    if len(low) != len(adapter.low_rank) or len(whole) != len(adapter.whole):
        raise UsageError(f"{adapter.called}: two of its names are of the same weight")
    return low, whole


def _under(layer: str, arrays: Arrays) -> str:
    """mlx-lm's names are of a language model alone."""
    inner = f"language_model.{layer}"
    return inner if f"{layer}.weight" not in arrays and f"{inner}.weight" in arrays else layer


class _Base:
    """A model's native weights, which take adapters up one after the other."""

    def __init__(self, config: Mapping[str, Any], before: Adapted, shared: Collection[str]) -> None:
        self.config, self.arrays, self.shared = config, dict(before.arrays), shared
        self.branches, self.changed = list(before.branches), dict(before.changed)
        self.untied = before.untied

    def take(self, adapter: Adapter, native_names: NativeNames) -> None:
        low, whole = _native(self.config, adapter, self.arrays, native_names)
        table = low.get(EMBEDDING)
        if table is not None and table.tied and self.untied:
            low.setdefault(HEAD, table.of_head)
        adding = {layer: update.magnitude is None for layer, update in low.items()}
        adding |= {name.removesuffix(".weight"): False for name in whole}
        self._check_apart(adding, adapter)
        follows = table is not None and table.tied
        self._untie(adding, follows)
        for name, array in whole.items():
            self._replace(name, array, adapter)
        for layer, update in low.items():
            self._update(layer, update, adapter)
        self.changed |= adding
        if follows and f"{HEAD}.weight" not in self.arrays:
            self.changed[HEAD] = adding[EMBEDDING]

    def _check_apart(self, adding: Mapping[str, bool], adapter: Adapter) -> None:
        """Raises UsageError where an adapter and an earlier one do not add up."""
        for layer, adds in adding.items():
            if not (adds and self.changed.get(layer, True)) and layer in self.changed:
                raise UsageError(
                    f"{adapter.called}: another adapter changes {layer} too, and one of them "
                    "replaces it; name one of the two"
                )

    def _untie(self, adding: Mapping[str, bool], follows: bool) -> None:
        """Give a tied head its own weights where the table's or its own are to change.

        PEFT trains one without the other, mlx-lm (`follows`) the table with a head tied to it. A
        table with a branch stays tied: the branch says whether it is the head's too.
        """
        parts = {part: self.arrays.get(f"{EMBEDDING}.{part}") for part in PARTS}
        tied = f"{HEAD}.weight" not in self.arrays and parts["weight"] is not None
        packed = parts["scales"] is not None
        branch = (packed or EMBEDDING in self.shared) and adding.get(EMBEDDING, False)
        if tied and (HEAD in adding or (EMBEDDING in adding and not branch and not follows)):
            self.arrays |= {f"{HEAD}.{part}": a for part, a in parts.items() if a is not None}
            self.branches += [
                (HEAD, u.of_head) for name, u in self.branches if name == EMBEDDING and u.tied
            ]
            self.untied = True

    def _replace(self, name: str, array: mx.array, adapter: Adapter) -> None:
        layer = name.removesuffix(".weight")
        self._check(name, tuple(array.shape), adapter)
        like = self.arrays.get(f"{layer}.scales", self.arrays[name])
        if layer != name:  # packed weights go as a whole
            for part in PARTS:
                self.arrays.pop(f"{layer}.{part}", None)
        self.arrays[name] = array.astype(like.dtype)

    def _update(self, layer: str, update: LowRank, adapter: Adapter) -> None:
        if layer in self.arrays:  # a mixture's gate, which is no layer
            self._check(layer, update.shape, adapter)
            self.arrays[layer] = update.merged(self.arrays[layer])
            return
        self._check(f"{layer}.weight", update.shape, adapter)
        packed = f"{layer}.scales" in self.arrays and not layer.startswith(TOWERS)
        if packed or (layer in self.shared and f"{layer}.weight" in self.arrays):
            self.branches.append((layer, update))
            return
        self._unpack(layer)
        self.arrays[f"{layer}.weight"] = update.merged(self.arrays[f"{layer}.weight"])

    def _check(self, name: str, shape: tuple[int, ...], adapter: Adapter) -> None:
        """Raises UsageError for a weight that is not there, or of another shape."""
        if name not in self.arrays:
            model_type = self.config.get("model_type")
            raise UsageError(
                f"{adapter.called}: this model ({model_type}) has no {name}; it is of another base"
            )
        own = self._shape(name)
        if shape != own:
            raise UsageError(
                f"{adapter.called}: {name} is {shape}, {own} in this model; it is of another base"
            )

    def _shape(self, name: str) -> tuple[int, ...]:
        """Of a weight in numbers, packed or not."""
        weight, layer = self.arrays[name], name.removesuffix(".weight")
        scales = self.arrays.get(f"{layer}.scales")
        if scales is None or layer == name:
            return tuple(weight.shape)
        kind = form(self.config.get("quantization") or {}, layer, weight, scales)
        return weight.shape[0], scales.shape[-1] * kind.group_size

    def _unpack(self, layer: str) -> None:
        """One layer of a tower, which is never run packed."""
        if f"{layer}.scales" in self.arrays:
            names = [f"{layer}.{part}" for part in PARTS]
            packed = {name: self.arrays.pop(name) for name in names if name in self.arrays}
            self.arrays.update(dequantized(packed, self.config.get("quantization")))


def branched(layer: nn.Module, update: LowRank) -> nn.Module:
    """A layer with an update beside it."""
    a, b, factor = update.a.T, update.b.T * update.scale, None
    if update.magnitude is not None:
        factor = update.factor(_weight(layer).astype(mx.float32) + update.delta)
    if update.embedding:
        return low_rank.Embedding(layer, a, b, factor, update.tied)
    return low_rank.Linear(layer, a, b, factor)


def _weight(layer: nn.Module) -> mx.array:
    """A layer's weight [out, in] in numbers."""
    if "scales" not in layer:
        weight: mx.array = layer.weight
        return weight
    packed = {f"x.{part}": layer[part] for part in PARTS if part in layer}
    block = {"bits": layer.bits, "group_size": layer.group_size, "mode": layer.mode}
    return dequantized(packed, block)["x.weight"]
