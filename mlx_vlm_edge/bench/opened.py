"""A name and options -> a model to be timed, from its checkpoint or with random weights."""

from dataclasses import dataclass

from ..loading import load
from ..models.base import VisionLanguageModel
from ..prompt import Processor


@dataclass(frozen=True)
class Choice:
    """Which model, at which precision."""

    model: str
    random: bool = False
    dtype: str | None = None
    bits: int | None = None

    @property
    def weights(self) -> str:
        return "random weights" if self.random else "checkpoint"


class Opened:
    """A model in memory, which can be set to one resolution after another."""

    def __init__(self, choice: Choice) -> None:
        if choice.random:
            from .random_weights import blueprint, build

            plan = blueprint(choice.model, dtype=choice.dtype, bits=choice.bits)
            self.model, self._processor = build(plan)
        else:
            self.model, self._processor = load(
                choice.model, dtype=choice.dtype, quantize=choice.bits
            )
        self._config = self.model.config

    def at(self, resolution: int | None) -> tuple[VisionLanguageModel, Processor]:
        """The model at a resolution, None for the checkpoint's own.

        Raises UsageError for one that the family does not take.
        """
        config = self._config
        if resolution is not None:
            config = config.adapted(None, resolution, None)
        self.model.config = config
        return self.model, type(self._processor)(config, self._processor.tokenizer)

    @property
    def dtype(self) -> str:
        """Of the language model's activations: "float32"."""
        return str(self.model.language_model.model.norm.weight.dtype).removeprefix("mlx.core.")
