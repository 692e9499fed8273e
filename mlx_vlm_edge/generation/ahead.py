"""A prompt's pictures -> visual tokens, each under way while the next picture is being read."""

from dataclasses import replace

import mlx.core as mx

from .. import forked
from ..models.base import VisionLanguageModel
from ..picture.image import Pixels
from ..text.prompt import Inputs, Processor
from ..timings import result


class Ahead:
    """Sets out on every picture that the processor has read; for a prompt of several.

    A family that takes an image in several passes waits between them, and so does the reading.
    """

    def __init__(self, model: VisionLanguageModel, processor: Processor) -> None:
        forked.check()
        mx.reset_peak_memory()
        self.model, self.processor = model, processor
        self._tokens: list[mx.array] = []
        self._room = int(model.config.context)  # a prompt without any is refused, when it is whole

    def begin(self, pixels: Pixels) -> None:
        self._room -= self.processor.visual_tokens(pixels)
        if self._room > 0:
            self._tokens += result(self.model.encode([pixels]))
            mx.async_eval(self._tokens[-1])

    def complete(self, inputs: Inputs) -> Inputs:
        """The prompt with its pictures' visual tokens, if all were begun."""
        begun = len(self._tokens) == len(inputs.pixels)
        return replace(inputs, tokens=self._tokens) if begun else inputs
