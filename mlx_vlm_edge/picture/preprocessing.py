"""What a user may change of a checkpoint's preprocessing, as one value; families refuse the rest.

`Config.adapted(asked)` holds it against what the family understands. The processor alone has the
result: a model takes its geometry from the pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from .image import Strategy
from .token_budget import TokenBudget

# LLaVA's names for what is done to a picture that is not square -> ours. "square" is its image
# processor's own resize and crop.
STRATEGIES: dict[str, Strategy] = {
    "pad": "pad",
    "center_crop": "center_crop",
    "square": "center_crop",
    "stretch": "stretch",
}


@dataclass(frozen=True)
class Preprocessing:
    """What is asked for in the place of the checkpoint's own; None changes nothing.

    strategy: what is done to a picture that has not the model's shape. resolution: pixels, each
    family says of what. max_tiles: of one image, in the families that cut it up. budget: how many
    visual tokens the language model is to see of each image. auto: whether the side is chosen by
    what is in a picture, up to `largest`, in the family that does so.
    """

    strategy: str | None = None
    resolution: int | None = None
    max_tiles: int | None = None
    budget: TokenBudget | None = None
    auto: bool = False
    largest: int | None = None


AS_PUBLISHED = Preprocessing()


def image_strategy(config: Mapping[str, Any]) -> Strategy:
    """What config.json asks for. Raises UsageError for an image_aspect_ratio that is not known."""
    aspect = config.get("image_aspect_ratio") or "square"
    if not isinstance(aspect, str) or aspect not in STRATEGIES:
        raise UsageError(f"config.json: image_aspect_ratio {aspect!r} is not known")
    return STRATEGIES[aspect]


def chosen_strategy(asked: Preprocessing, own: Strategy) -> Strategy:
    """The user's, or the checkpoint's own. Raises UsageError for a name that is not known."""
    if asked.strategy is None:
        return own
    if asked.strategy not in STRATEGIES:
        raise UsageError(
            f"image strategy {asked.strategy!r} is not one of pad, center_crop, stretch"
        )
    return STRATEGIES[asked.strategy]


def refuse_max_tiles(asked: Preprocessing) -> None:
    """For the families that do not cut images up. Raises UsageError when a limit is given."""
    if asked.max_tiles is not None:
        raise UsageError("this model takes an image as one tile: use resolution, not max tiles")
