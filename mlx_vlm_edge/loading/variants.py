"""Adapters that requests may name -> a model for each, which shares the loaded one's weights.

Everything about them is checked before the model is loaded, and nothing is read when a request
names one.
"""

from collections.abc import Mapping
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoint.adapter_choice import AdapterChoice, choices
from ..hub.models import obtain
from ..kernels import on_cpu, quantized
from ..models import family
from ..models.base import VisionLanguageModel
from ..models.variants import Difference, share, shared_layers
from .adapters import adapted, onto, read_adapters
from .load import (
    LoadOptions,
    built,
    check_backend,
    give_back,
    model_identity,
    read_checkpoint,
)


class Variants:
    """Models with one more adapter each, checked when this is made and built by `of`.

    name and options: of the model, as `load` takes them. Raises UsageError for an adapter that is
    damaged or of another base.
    """

    def __init__(self, name: str, options: LoadOptions, named: Mapping[str, AdapterChoice]) -> None:
        self._options = options
        read = {called: read_adapters([choice]) for called, choice in named.items()}
        self._folder = obtain(name, revision=options.revision, offline=options.offline)
        self._config, arrays = read_checkpoint(self._folder)
        self._kind, always = family(self._config), choices(options.adapter)
        self._before = adapted(self._config, arrays, read_adapters(always))
        layers = shared_layers(self._kind, self._config, self._before)
        self._after = {
            called: onto(self._config, self._before, adapters, layers)
            for called, adapters in read.items()
        }
        for called, adapters in read.items():
            check_backend(self._after[called], adapters, options)
        beneath = [choice.identity() for choice in always]
        self._changed = {
            called: [*beneath, f"beside {choice.identity()}"] for called, choice in named.items()
        }

    def nbytes(self) -> int:
        """Bytes of what the models will hold beside the first one's weights. Nothing is read."""
        model = built(self._kind, self._config, self._before, self._options)
        packed = any(isinstance(layer, nn.QuantizedLinear) for layer in model.modules())
        for layer in model.language_model.model.layers if packed or not on_cpu() else ():
            layer.fuse()  # as `arrange` does
        shared, beside = _arrays(model), dict[int, int]()
        variants = [self._variant(model, called) for called in self._after]  # ids of living arrays
        for variant in variants:
            beside |= _arrays(variant)
        return sum(size for array, size in beside.items() if array not in shared)

    def of(self, model: VisionLanguageModel) -> dict[str, VisionLanguageModel]:
        """The model with each adapter, by its name; the model has to be whole. Once only: what was
        read for them is let go."""
        variants = {called: self._variant(model, called) for called in self._after}
        del self._before, self._after  # so that weights that a DoRA's norms need go as they come
        for layers in zip(*(v.language_model.model.layers for v in variants.values()), strict=True):
            mx.eval([layer.state for layer in layers])
        for variant in variants.values():
            if on_cpu():
                quantized.for_cpu(variant)
            mx.eval(variant.state)
        give_back()
        return variants

    def _variant(self, model: VisionLanguageModel, called: str) -> VisionLanguageModel:
        after = self._after[called]
        variant = built(self._kind, self._config, after, self._options)
        share(model, variant, Difference(self._kind, self._before, after))
        changed = self._changed[called]
        variant.identify = partial(model_identity, self._folder, self._options, on_cpu(), changed)
        return variant


def _arrays(model: VisionLanguageModel) -> dict[int, int]:
    return {id(array): array.nbytes for _, array in tree_flatten(model.parameters())}
