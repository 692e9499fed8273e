"""What every family's model does the same way: merge visual tokens into text, prefill, decode."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.weights import Weights
from ..errors import UsageError
from ..language.cache import Cache, settle
from ..language.decoder import LanguageModel
from ..picture.image import Pixels, Strategy
from ..text.prompt import Inputs
from ..timings import Stages

# LLaVA's names for what is done to a picture that is not square -> ours. "square" is its image
# processor's own resize and crop.
STRATEGIES: dict[str, Strategy] = {
    "pad": "pad",
    "center_crop": "center_crop",
    "square": "center_crop",
    "stretch": "stretch",
}


def image_strategy(config: Mapping[str, Any]) -> Strategy:
    """What config.json asks for. Raises UsageError for an image_aspect_ratio that is not known."""
    aspect = config.get("image_aspect_ratio") or "square"
    if not isinstance(aspect, str) or aspect not in STRATEGIES:
        raise UsageError(f"config.json: image_aspect_ratio {aspect!r} is not known")
    return STRATEGIES[aspect]


def chosen_strategy(name: str) -> Strategy:
    """What the user asks for. Raises UsageError for a name that is not known."""
    if name not in STRATEGIES:
        raise UsageError(f"image strategy {name!r} is not one of pad, center_crop, stretch")
    return STRATEGIES[name]


def eos_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end an answer by config.json: none, one, or a list of them."""
    eos = config.get("eos_token_id")
    if isinstance(eos, list):
        return tuple(eos)
    return () if eos is None else (eos,)


def with_tower(weights: Weights, tower: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A LLaVA's parameters: its folded tower, and connector and language model as they are."""
    return {
        **{f"vision_tower.{name}": array for name, array in tower.items()},
        **weights.take_prefix("mm_projector."),
        **weights.take_prefix("language_model."),
    }


def merge(embeddings: mx.array, tokens: Sequence[mx.array], visual: np.ndarray) -> mx.array:
    """Put the visual tokens, each [N, D], at their positions in [1, L, D].

    `visual` int[V] is known from tokenising, so nothing waits for the device.
    """
    if not tokens:
        return embeddings
    rows = mx.concatenate(list(tokens), axis=0).astype(embeddings.dtype)
    if rows.shape[0] != len(visual):
        raise ValueError(f"{rows.shape[0]} visual tokens for {len(visual)} positions")
    embeddings[0, mx.array(visual)] = rows
    return embeddings


def refuse_max_tiles(max_tiles: int | None) -> None:
    """For the families that do not cut images up. Raises UsageError when a limit is given."""
    if max_tiles is not None:
        raise UsageError("this model takes an image as one tile: use resolution, not max tiles")


class VisionLanguageModel(nn.Module):
    """Base of the families' models; they supply the parts and `features`, or `encode_image` where
    visual tokens are made otherwise."""

    language_model: LanguageModel
    mm_projector: Any  # features [B, N, C] -> visual tokens [B, N', D]
    arriving: Callable[[], Any] | None = None  # waits for weights that are still being read

    def arrive(self) -> None:
        """Wait until all weights are here. Raises UsageError when they cannot be read."""
        if self.arriving is not None:
            self.arriving()
            self.arriving = None

    def encode_image(self, pixels: Pixels, stages: Stages | None = None) -> mx.array:
        """Pixels of one image -> visual tokens [N, D], as they enter the language model."""
        stages = stages or Stages()
        features = self.features(pixels.data[None])
        stages.mark("vision", features)
        tokens: mx.array = self.mm_projector(features)[0]
        stages.mark("connector", tokens)
        return tokens

    def features(self, pictures: np.ndarray) -> mx.array:
        """uint8 [B, H, W, 3] -> image features [B, N, C]: what another back end may compute."""
        raise NotImplementedError

    def embed(self, inputs: Inputs, stages: Stages | None = None) -> mx.array:
        """Input embeddings [1, L, D] of a whole prompt, visual tokens in place."""
        ids = inputs.input_ids.copy()
        ids[0, inputs.visual] = 0  # placeholders may be no vocabulary entry (-200)
        tokens = inputs.tokens
        if tokens is None:
            tokens = [self.encode_image(pixels, stages) for pixels in inputs.pixels]
        return merge(self.language_model.embed(mx.array(ids)), tokens, inputs.visual)

    def make_cache(self) -> list[Cache]:
        """One empty KV cache per layer."""
        return self.language_model.make_cache()

    def reusable(self, length: int) -> int:
        """How many of the `length` positions that two prompts share have the same keys and values
        in both: all, where no position sees a later one."""
        return length

    def prefill(
        self, inputs: Inputs, cache: Sequence[Cache], step_size: int, stages: Stages
    ) -> mx.array:
        """Run the prompt into `cache`, after what that holds; logits [1, V] of its last position.

        One pass, or chunks of `step_size` positions when the prompt is longer than that.
        """
        embeddings = self.embed(inputs, stages)
        length = embeddings.shape[1]
        for start in range(0, length - step_size, step_size):
            self.language_model(embeddings[:, start : start + step_size], cache, last_only=True)
            settle(cache)
        rest = embeddings[:, (length - 1) // step_size * step_size :]
        logits = self.language_model(rest, cache, last_only=True)[:, -1]
        stages.mark("prefill", logits)
        return logits

    def step(self, token: mx.array, cache: Sequence[Cache]) -> mx.array:
        """Logits [1, V] after one more token, int[1]."""
        embeddings = self.language_model.embed(token[None])
        return self.language_model(embeddings, cache)[:, -1]

    def __call__(self, inputs: Inputs) -> mx.array:
        """Logits [1, L, V] of the whole prompt, for tests and scoring."""
        return self.language_model(self.embed(inputs))
