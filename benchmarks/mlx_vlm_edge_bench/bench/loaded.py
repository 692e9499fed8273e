"""A name and options -> a model to be timed, from its checkpoint or with random weights."""

from dataclasses import dataclass

from mlx_vlm_edge.loading.load import LoadOptions, start_loading, use_backend
from mlx_vlm_edge.models.base import VisionLanguageModel
from mlx_vlm_edge.picture.preprocessing import Preprocessing
from mlx_vlm_edge.picture.token_budget import TokenBudget
from mlx_vlm_edge.text.prompt import Processor


@dataclass(frozen=True)
class Choice:
    """Which model, at which precision."""

    model: str
    random: bool = False
    dtype: str | None = None
    bits: int | None = None
    vision_backend: str = "mlx"

    @property
    def weights(self) -> str:
        return "random weights" if self.random else "checkpoint"


class LoadedModel:
    """A model in memory, which can be set to one resolution after another.

    ahead: loaded as the command line does it, some of it still being read.
    """

    def __init__(self, choice: Choice, *, ahead: bool = False) -> None:
        if choice.random:
            from ..random.weights import blueprint, build

            plan = blueprint(choice.model, dtype=choice.dtype, bits=choice.bits)
            self.model, self._processor = build(plan)
            if choice.vision_backend != "mlx":
                name = f"random {choice.model}"
                use_backend(self.model, self._processor, name, choice.vision_backend)
        else:
            options = LoadOptions(
                dtype=choice.dtype, bits=choice.bits, vision_backend=choice.vision_backend
            )
            self.model, self._processor = start_loading(choice.model, options)
            if not ahead:
                self.model.finish_loading()

    def at(
        self, resolution: int | None, budget: TokenBudget | None = None
    ) -> tuple[VisionLanguageModel, Processor]:
        """The model at a resolution, None for the checkpoint's own, and with so many visual tokens.

        Raises UsageError for one that the family does not take.
        """
        asked = Preprocessing(resolution=resolution, budget=budget)
        tokenizer = self._processor.tokenizer
        return self.model, type(self._processor)(self.model.config, tokenizer, asked)

    @property
    def dtype(self) -> str:
        """Of the language model's activations: "float32"."""
        return str(self.model.language_model.model.norm.weight.dtype).removeprefix("mlx.core.")
