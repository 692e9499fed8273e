"""Adapters that requests may name -> a model for each, which shares the loaded one's weights.

Everything about them is checked before the model is loaded, and nothing is read when a request
names one.
"""

from collections.abc import Mapping
from functools import partial

import mlx.core as mx

from ..checkpoint.adapter_choice import AdapterChoice, choices
from ..hub.models import obtain
from ..kernels import on_cpu
from ..models import family
from ..models.base import VisionLanguageModel
from ..models.variants import Difference, share, shared_layers
from .adapters import adapted, onto, read_adapters
from .load import LoadOptions, built, check_backend, model_identity, read_checkpoint


class Variants:
    """Models with one more adapter each, checked when this is made and built by `of`.

    name and options: of the model, as `load` takes them. Raises UsageError for an adapter that is
    damaged or of another base.
    """

    def __init__(self, name: str, options: LoadOptions, named: Mapping[str, AdapterChoice]) -> None:
        self._options, self._named = options, named
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
        self._identities = [choice.identity() for choice in always]

    def of(self, model: VisionLanguageModel) -> dict[str, VisionLanguageModel]:
        """The model with each adapter, by its name; the model has to be whole."""
        return {called: self._variant(model, called) for called in self._named}

    def _variant(self, model: VisionLanguageModel, called: str) -> VisionLanguageModel:
        after = self._after.pop(called)
        variant = built(self._kind, self._config, after, self._options)
        share(model, variant, Difference(self._kind, self._before, after))
        changed = [*self._identities, f"beside {self._named[called].identity()}"]
        variant.identify = partial(model_identity, self._folder, self._options, on_cpu(), changed)
        mx.eval(variant.state)
        return variant
