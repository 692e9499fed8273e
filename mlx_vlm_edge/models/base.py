"""What every family's model does the same way: merge visual tokens into text, prefill, decode."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.weights import Weights
from ..errors import UsageError
from ..language.cache import Cache
from ..language.decoder import LanguageModel, prefill
from ..picture.image import Pixels
from ..picture.resize import Levels
from ..picture.token_budget import ATTENDED, Reduction
from ..text.prompt import Inputs
from ..timings import Steps, result
from ..vision.attended import listening


def replace_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """A name with the first of the prefixes that it begins with exchanged for its counterpart."""
    for prefix, other in prefixes.items():
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    return name


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


class VisionLanguageModel(nn.Module):
    """Base of the families' models; they supply the parts and `features`, or `stages` where visual
    tokens are made otherwise.

    The tower and the connector go by the checkpoint's names, `tower_name` and `connector_name`.
    encoder: what computes image features in the tower's place, another back end. config: the
    checkpoint's; what pictures are made into is the processor's, and stands in their pixels.
    """

    config: Any
    language_model: LanguageModel
    tower_name = "vision_tower"
    connector_name: str | None = "mm_projector"
    encoder: Callable[[np.ndarray], mx.array] | None = None
    identify: Callable[[], str] | None = None  # asked once, see `identity`
    _identity: str | None = None
    unread: Callable[[], Any] | None = None  # waits for weights that are still being read
    pass_costs: Mapping[int, float] | None = None  # see generation/drafting.py
    seen_by: Callable[[], "VisionLanguageModel"] | None = None  # see `eyes`
    openings: Any = None  # see generation/opening.py

    @property
    def identity(self) -> str | None:
        """What stands for the weights and settings of a model that was read from files, for what
        outlives the process; None for one that was not. Files that are replaced later change
        nothing of the model, nor of this."""
        if self.identify is None:
            return None
        if self._identity is None:
            self._identity = self.identify()
        return self._identity

    @property
    def eyes(self) -> "VisionLanguageModel":
        """The model whose visual tokens are this one's, for what remembers them."""
        return self if self.seen_by is None else self.seen_by()

    @property
    def tower(self) -> Any:
        """Pixels -> image features, or the embedding of patches that stands in for that."""
        return self[self.tower_name]

    @property
    def connector(self) -> Any:
        """Image features [B, N, C] -> visual tokens [B, N', D]; None where they are the same."""
        return self[self.connector_name] if self.connector_name else None

    def finish_loading(self) -> None:
        """Wait until all weights are here. Raises UsageError when they cannot be read."""
        if self.unread is not None:
            self.unread()
            self.unread = None

    def encode_image(self, pixels: Pixels) -> mx.array:
        """Pixels of one image -> visual tokens [N, D], as they enter the language model."""
        (tokens,) = result(self.encode([pixels]))
        return tokens

    def encode(self, images: Sequence[Pixels]) -> Steps[list[mx.array]]:
        """The visual tokens of each of a prompt's images: all that `stages` makes, or as few of
        them as the pixels say, in a step "reduce"."""
        tokens = []
        for pixels in images:
            if pixels.reduction is None:
                tokens.append((yield from self.stages(pixels)))
            else:
                tokens.append((yield from self.fewer(pixels, pixels.reduction)))
        return tokens

    def fewer(self, pixels: Pixels, reduction: Reduction) -> Steps[mx.array]:
        """The visual tokens that a reduction leaves of an image."""
        from ..reduction import reduced

        if reduction.method in ATTENDED:
            tokens = yield from self.attended(pixels, reduction)
        else:
            tokens = reduced((yield from self.stages(pixels)), reduction)
        yield "reduce", tokens
        return tokens

    def attended(self, pixels: Pixels, reduction: Reduction) -> Steps[mx.array]:
        """`fewer` by a method that asks the tower's attention. Raises UsageError without one."""
        from ..reduction.attended import by_layers, zipped

        with listening() as calls:
            tokens = yield from self.stages(pixels)
        if not calls:
            raise UsageError(
                f"token method {reduction.method!r} needs the attention of the model's own vision "
                "tower: leave the vision backend out"
            )
        if reduction.method == "hiprune":
            early, late = (
                self.token_scores(mx.concatenate([getattr(call, which) for call in calls]), pixels)
                for which in ("early", "late")
            )
            return by_layers(tokens, reduction, early, late)
        (call,) = calls
        if call.of_class is None:
            raise UsageError(
                "token method 'visionzip' asks the class token, which this model's vision tower "
                "lacks: hiprune does without"
            )
        features = zipped(call.hidden[0], call.of_class[0], call.keys[0], reduction.total)
        return self.connector(features[None])[0]

    def token_scores(self, seen: mx.array, pixels: Pixels) -> mx.array:
        """What patches receive, float32[tiles, n] -> of each visual token, float32[N].

        A token that is made of a square of patches has their mean; what is not the picture's has 0.
        """
        from ..reduction.blocks import block_scores

        assert pixels.reduction is not None
        return block_scores(seen, pixels.reduction)

    def stages(self, pixels: Pixels) -> Steps[mx.array]:
        """All visual tokens of an image in the steps that make them: "vision" gives image features,
        "connector" the tokens."""
        features = self.image_features(pixels.data[None])
        yield "vision", features
        tokens: mx.array = self.connector(features)[0]
        yield "connector", tokens
        return tokens

    def image_features(self, pictures: Levels) -> mx.array:
        """`features` of the same, by `encoder` where there is one."""
        if self.encoder is not None:
            return self.encoder(np.asarray(pictures))
        return self.features(pictures)

    def features(self, pictures: Levels) -> mx.array:
        """uint8 [B, H, W, 3] -> image features [B, N, C] by the tower."""
        raise NotImplementedError

    def embed(self, inputs: Inputs) -> mx.array:
        """Input embeddings [1, L, D] of a whole prompt, visual tokens in place."""
        ids = inputs.input_ids.copy()
        ids[0, inputs.visual] = 0  # placeholders may be no vocabulary entry (-200)
        tokens = result(self.encode(inputs.pixels)) if inputs.tokens is None else inputs.tokens
        return merge(self.language_model.embed(mx.array(ids)), tokens, inputs.visual)

    def make_cache(self) -> list[Cache]:
        """One empty KV cache per layer."""
        return self.language_model.make_cache()

    def prefill(self, inputs: Inputs, cache: Sequence[Cache], step_size: int) -> mx.array:
        """Run the prompt into `cache`, after what that holds; logits [1, V] of its last position.

        One pass, or chunks of `step_size` positions when the prompt is longer than that.
        """
        return result(self.prefilling(inputs, cache, step_size))

    def prefilling(self, inputs: Inputs, cache: Sequence[Cache], step_size: int) -> Steps[mx.array]:
        """`prefill` in its steps, each "prefill" the logits of a chunk's last position."""
        return prefill(self.language_model, self.embed(inputs), cache, step_size)

    def step(self, token: mx.array, cache: Sequence[Cache]) -> mx.array:
        """Logits [B, V] after one more token of each sequence, int[B]."""
        return self.follow(token[:, None], cache)[:, -1]

    def follow(self, tokens: mx.array, cache: Sequence[Cache]) -> mx.array:
        """Logits [B, L, V] after each of L more tokens of each sequence, int[B, L]."""
        return self.language_model(self.language_model.embed(tokens), cache)

    def __call__(self, inputs: Inputs) -> mx.array:
        """Logits [1, L, V] of the whole prompt, for tests and scoring."""
        return self.language_model(self.embed(inputs))
