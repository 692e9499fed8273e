"""What a checkpoint says of its pictures' preprocessing, and what a user may change of it, as one
value; families refuse the rest.

`Config.adapted(asked)` holds it against what the family understands. The processor alone has the
result: a model takes its geometry from the pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.config import PREPROCESSOR, first, fits
from ..checkpoint.files import PREPROCESSOR_CONFIG
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
# What CLIP's image processor and those made after it do here: bicubic, in 0..1.
CLIP_SETTINGS = {"do_resize": True, "do_rescale": True, "resample": 3}


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


def image_strategy(
    config: Mapping[str, Any], side: int, mean: Sequence[float], std: Sequence[float]
) -> Strategy:
    """What is done to a picture that is not square: what config.json asks for or, where that leaves
    it to the image processor, what the processor's own file does.

    side: of the square that the model takes. mean, std: by which it has pixels normalised. Raises
    UsageError for an image_aspect_ratio that is not known, and for settings of another processor.
    """
    aspect = config.get("image_aspect_ratio") or "square"
    if not isinstance(aspect, str) or aspect not in STRATEGIES:
        raise UsageError(f"config.json: image_aspect_ratio {aspect!r} is not known")
    file = config.get(PREPROCESSOR) or {}
    check_settings(file, CLIP_SETTINGS)
    check_normalised(file, mean, std)
    return clip_strategy(file, side) if aspect == "square" else STRATEGIES[aspect]


def check_settings(file: Mapping[str, Any], only: Mapping[str, Any]) -> None:
    """Raises UsageError where preprocessor_config.json says another value than the only one that
    there is of a setting, or has pixels scaled to anything but 0..1."""
    for key, value in only.items():
        if (said := file.get(key, value)) != value:
            raise UsageError(f"{PREPROCESSOR_CONFIG}: {key} {said!r} is not known")
    factor = first(file.get("rescale_factor"), 1 / 255)
    if not fits(factor, float) or not abs(factor - 1 / 255) < 1e-6:
        raise UsageError(f"{PREPROCESSOR_CONFIG}: rescale_factor cannot be {factor!r}, but 1 / 255")


def check_normalised(file: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]) -> None:
    """Raises UsageError where preprocessor_config.json normalises otherwise than the model does."""
    as_it_is = not file.get("do_normalize", True)
    for key, ours, nothing in (("image_mean", mean, 0.0), ("image_std", std, 1.0)):
        said = nothing if as_it_is else first(file.get(key), list(ours))
        theirs = said if isinstance(said, list) else [said] * len(ours)
        equal = len(theirs) == len(ours) and all(
            fits(a, float) and abs(a - b) <= 1e-6 for a, b in zip(theirs, ours, strict=True)
        )
        if not equal:
            told = "do_normalize False" if as_it_is else f"{key} {said}"
            raise UsageError(f"{PREPROCESSOR_CONFIG}: {told} is not this model's {[*ours]}")


def clip_strategy(file: Mapping[str, Any], side: int) -> Strategy:
    """What an image processor of CLIP's kind does to a picture that is not square, by its file.

    It may pad, then brings the shorter side, or both, to `size`, then may crop the centre. Raises
    UsageError for pictures that are no squares of `side` pixels.
    """
    pads, crops = file.get("do_pad", False), file.get("do_center_crop", True)
    size = _lengths(file, "size", ("shortest_edge",))
    crop = _lengths(file, "crop_size", ("height", "width")) if crops else ()
    if any(length != side for length in (*size, *crop)):
        raise UsageError(
            f"{PREPROCESSOR_CONFIG}: size {file.get('size')} and crop_size {file.get('crop_size')} "
            f"are not the {side} x {side} pixels that the model takes"
        )
    if pads:
        return "pad"
    if len(size) == 2:
        return "stretch"
    if not crops:
        raise UsageError(f"{PREPROCESSOR_CONFIG}: do_center_crop False leaves pictures their shape")
    return "center_crop"


def _lengths(file: Mapping[str, Any], key: str, plain: Sequence[str]) -> tuple[Any, ...]:
    """Pixels under `key`: of the shorter side, of (height, width), or () where nothing is said.

    plain: what a number alone stands for.
    """
    said = first(file.get(key), {})
    named = said if isinstance(said, Mapping) else dict.fromkeys(plain, said)
    named = {name: value for name, value in named.items() if value is not None}
    if named and named.keys() not in ({"shortest_edge"}, {"height", "width"}):
        raise UsageError(f"{PREPROCESSOR_CONFIG}: {key} cannot be {said!r}")
    return tuple(named.values())


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
