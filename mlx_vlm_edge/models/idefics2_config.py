"""What Idefics2 needs of config.json and of the preprocessor_config.json beside it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..checkpoint.config import check, first
from ..checkpoint.configs.defaults import IDEFICS2_VISION, MISTRAL
from ..connectors.perceiver import PerceiverConfig
from ..errors import UsageError
from ..language.llama import TextConfig
from ..picture.preprocessing import Preprocessing, check_normalised, check_settings
from ..vision.vit import ViTConfig
from .base import eos_ids

EDGES = {"longest_edge": 980, "shortest_edge": 378}
STRATEGIES = ("split", "whole")
PIECES = 5  # of an image that is split: four quarters and the whole
FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2}
HALVES = [0.5, 0.5, 0.5]
PERCEIVER = {
    "resampler_n_latents": 64, "resampler_depth": 3, "resampler_n_heads": 16,
    "num_key_value_heads": 4, "resampler_head_dim": 96,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """What the model needs of config.json and preprocessor_config.json; `source` has all of it.

    longest_edge, shortest_edge: between which both sides of a piece are brought, in pixels.
    """

    text: TextConfig
    vision: ViTConfig
    perceiver: PerceiverConfig
    longest_edge: int
    shortest_edge: int
    strategy: str
    eos_token_ids: tuple[int, ...]
    context: int
    source: Mapping[str, Any] = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        check(self)
        if not self.vision.patch_size <= self.shortest_edge <= self.longest_edge:
            raise UsageError(
                f"preprocessor_config.json: edges of {self.shortest_edge} to {self.longest_edge} "
                "pixels cannot be"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Config":
        """Read a native config.json, which has `preprocessor_config` from the file beside it.

        Raises UsageError for a missing key or an unknown value.
        """
        for part in ("text_config", "vision_config"):
            if not isinstance(config.get(part), Mapping):
                raise UsageError(f"config.json lacks {part!r}")
        processor = config.get("preprocessor_config") or {}
        check_settings(processor, FIXED)
        check_normalised(processor, HALVES, HALVES)
        size = _edges(processor.get("size") or {})
        own = {**MISTRAL, **config["text_config"]}
        text = _text(own, config.get("tie_word_embeddings", False))
        window = first(own["sliding_window"], text.max_position_embeddings)
        return cls(
            text=text,
            vision=_vision(config["vision_config"]),
            perceiver=_perceiver(config.get("perceiver_config") or {}, text),
            longest_edge=size["longest_edge"],
            shortest_edge=size["shortest_edge"],
            strategy="split" if processor.get("do_image_splitting", False) else "whole",
            eos_token_ids=eos_ids(config),
            context=min(window, text.max_position_embeddings),  # beyond it, layers see less
            source=config,
        )

    def adapted(self, asked: Preprocessing) -> "Config":
        """The same with the user's preprocessing. Raises UsageError for values that cannot be.

        strategy: "split" looks at the four quarters of an image too, "whole" does not; nor does a
        max_tiles below five. resolution: the longest edge.
        """
        if asked.strategy not in (None, *STRATEGIES):
            raise UsageError(
                f"image strategy {asked.strategy!r} is not one of {', '.join(STRATEGIES)}, which "
                "are what Idefics2 has"
            )
        if asked.max_tiles is not None and asked.max_tiles < 1:
            raise UsageError(f"max tiles {asked.max_tiles}: an image is at least one tile")
        edge, largest = first(asked.resolution, self.longest_edge), self.vision.image_size
        if not self.shortest_edge <= edge <= largest:
            raise UsageError(
                f"image size {edge}: the longest edge of Idefics2's pictures is from "
                f"{self.shortest_edge} to {largest} pixels"
            )
        strategy = first(asked.strategy, self.strategy)
        whole = asked.max_tiles is not None and asked.max_tiles < PIECES
        return replace(self, strategy="whole" if whole else strategy, longest_edge=edge)


def _edges(said: Any) -> dict[str, Any]:
    """What a preprocessor's `size` says of EDGES, and these. Raises UsageError for other words."""
    if not isinstance(said, Mapping) or not said.keys() <= EDGES.keys():
        raise UsageError(f"preprocessor_config.json: size cannot be {said!r}")
    return {**EDGES, **said}


def _text(text: Mapping[str, Any], tied: bool) -> TextConfig:
    if (kind := text.get("model_type", "mistral")) != "mistral":
        raise UsageError(f"text_config: model_type {kind!r} is not known in Idefics2")
    return TextConfig.from_dict({**text, "tie_word_embeddings": tied}, "llama")


def _vision(own: Mapping[str, Any]) -> ViTConfig:
    vision = {**IDEFICS2_VISION, **own}
    return ViTConfig(
        layers=vision["num_hidden_layers"],
        class_token=False,
        post_norm=True,
        **{name: vision[name] for name in IDEFICS2_VISION if name != "num_hidden_layers"},
    )


def _perceiver(own: Mapping[str, Any], text: TextConfig) -> PerceiverConfig:
    """The norms' eps is the text's where it is not said, as in training."""
    if (activation := own.get("hidden_act", "silu")) != "silu":
        raise UsageError(f"perceiver_config: hidden_act {activation!r} is not known")
    if own.get("hidden_size", text.hidden_size) != text.hidden_size:
        raise UsageError("perceiver_config: hidden_size is not the language model's")
    perceiver = {**PERCEIVER, **own}
    return PerceiverConfig(
        hidden_size=text.hidden_size,
        projected=text.intermediate_size,
        latents=perceiver["resampler_n_latents"],
        depth=perceiver["resampler_depth"],
        heads=perceiver["resampler_n_heads"],
        kv_heads=perceiver["num_key_value_heads"],
        head_dim=perceiver["resampler_head_dim"],
        rms_norm_eps=first(own.get("rms_norm_eps"), text.rms_norm_eps),
    )
