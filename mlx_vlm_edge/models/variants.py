"""A model in memory, and the same with an adapter, not read yet -> one that has the adapter and of
its own what that changes; all other weights are the first one's.

Whole weights are its own, by layers of the language model or all that sees pictures; an update of
low rank is beside a layer of the first model's, in whatever form that has: fused, packed, or laid
out for a CPU. A layer that has no such form is its own as well.
"""

from collections.abc import Collection, Iterator, Mapping
from copy import copy
from typing import Any

import mlx.nn as nn

from ..kernels import low_rank, on_cpu
from .adapted import Adapted
from .base import VisionLanguageModel
from .build import build
from .contract import Family

LANGUAGE = "language_model"
UNSEEN = (f"{LANGUAGE}.model.layers.", f"{LANGUAGE}.lm_head.")  # no picture comes by them
SHARED = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)

Branches = Mapping[str, nn.Module]


def shared_layers(kind: Family[Any], config: Mapping[str, Any], weights: Adapted) -> set[str]:
    """The native names of the language model's layers whose weights enter the model as they are,
    so that an update fits beside them."""
    layers: dict[str, Any] = dict(build(kind, config, weights.arrays).named_modules())
    shared = set()
    for name in (name for name in weights.arrays if name.endswith(".weight")):
        path = kind.rename(name).removesuffix(".weight")
        if not path.startswith(f"{LANGUAGE}.") or type(layers.get(path)) not in SHARED:
            continue
        if layers[path].weight is weights.arrays[name]:
            shared.add(name.removesuffix(".weight"))
    return shared


def _path(kind: Family[Any], name: str) -> str:
    return kind.rename(f"{name}.weight").removesuffix(".weight")


class Difference:
    """What a model with one more adapter has that the one before lacks, by its parameters' names.

    changed: parameters that are others. branched: layers with an update beside them.
    """

    def __init__(self, kind: Family[Any], before: Adapted, after: Adapted) -> None:
        names = before.arrays.keys() | after.arrays.keys()
        self.changed = {
            kind.rename(name)
            for name in names
            if before.arrays.get(name) is not after.arrays.get(name)
        }
        added = after.branches[len(before.branches) :]
        self.branched = {_path(kind, name) for name, _ in added}

    @property
    def sight(self) -> bool:
        """Whether a part is another that stands before the language model."""
        return any(not name.startswith(f"{LANGUAGE}.") for name in self.changed)

    @property
    def pictures(self) -> bool:
        """Whether visual tokens may be others: a family may take some from the vocabulary."""
        return any(not f"{name}.".startswith(UNSEEN) for name in self.changed | self.branched)

    def within(self, unit: str) -> bool:
        """Whether a part of the language model has changed parameters."""
        return any(f"{name}.".startswith(f"{unit}.") for name in self.changed)


def share(model: VisionLanguageModel, variant: VisionLanguageModel, difference: Difference) -> None:
    """Give the variant, whose layers have their branches, all else of the model's. Nothing is
    evaluated."""
    for name in variant:
        if name != LANGUAGE and not difference.sight:
            variant[name] = model[name]
    for unit in list(_units(variant.language_model)):
        if not difference.within(f"{LANGUAGE}.{unit}"):
            branches = _branches(variant, unit, difference.branched)
            _share(model.language_model, variant.language_model, unit, branches)
    variant.encoder = model.encoder
    if not difference.pictures:
        variant.seen_by = lambda: model


def _units(language: nn.Module) -> Iterator[str]:
    """The parts of a language model that are shared or not: "model.layers.0", "lm_head"."""
    for name, child in language.model.children().items():
        if isinstance(child, list):
            yield from (f"model.{name}.{index}" for index in range(len(child)))
        else:
            yield f"model.{name}"
    if "lm_head" in language:
        yield "lm_head"


def _branches(variant: nn.Module, unit: str, branched: Collection[str]) -> dict[str, nn.Module]:
    """The layers with branches in a unit, by their names in it; "" for the unit itself."""
    whole = f"{LANGUAGE}.{unit}"
    layers = dict(variant.named_modules())
    return {
        path.removeprefix(whole).removeprefix("."): layers[path]
        for path in branched
        if f"{path}.".startswith(f"{whole}.")
    }


def _share(model: nn.Module, variant: nn.Module, unit: str, branches: Branches) -> None:
    """Put one part of the model into the variant, with branches; where it has no layer that they
    fit, the variant's own stays, fused as the model's is."""
    *parents, last = unit.split(".")
    theirs, ours = model, variant
    for name in parents:
        theirs, ours = _child(theirs, name), _child(ours, name)
    try:
        part = _beside(_child(theirs, last), branches)
    except LookupError:
        own = _child(ours, last)
        if not on_cpu() and hasattr(own, "fuse"):
            own.fuse()
        return
    ours[int(last) if isinstance(ours, list) else last] = part


def _child(block: Any, name: str) -> Any:
    return block[int(name)] if isinstance(block, list) else block[name]


def _beside(block: Any, branches: Branches) -> Any:
    """A block whose layers have branches, or of a list of blocks. Raises LookupError for one that
    it does not have."""
    if not branches:
        return block
    if "" in branches:
        return branches[""].beside(block)
    inner: dict[str, dict[str, nn.Module]] = {}
    for path, branch in branches.items():
        head, _, rest = path.partition(".")
        inner.setdefault(head, {})[rest] = branch
    whole: Any = copy(block)
    fused: dict[str, list[tuple[low_rank.Columns, Any]]] = {}
    for head, own in inner.items():
        if isinstance(block, list):
            whole[int(head)] = _beside(block[int(head)], own)
        elif head in block:
            whole[head] = _beside(block[head], own)
        else:
            name, columns = getattr(block, "_fused", {})[head]
            fused.setdefault(name, []).append((columns, own[""]))
    for name, updates in fused.items():
        whole[name] = low_rank.beside_fused(block[name], updates)
    return whole
