"""A bundle's manifest -> the sizes of pictures that it takes, and the one that a host chooses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_vlm_edge.errors import UsageError

from ..names import MAIN
from ..package.malformed import reading


@dataclass(frozen=True)
class PictureSize:
    """function: of the vision part and the connector. tokens: visual tokens of a picture, None
    where the bundle does not say."""

    function: str
    height: int
    width: int
    tokens: int | None

    @property
    def name(self) -> str:
        """As people write it."""
        return f"{self.width}x{self.height}"


def picture_sizes(content: Mapping[str, Any]) -> list[PictureSize]:
    """Of a manifest, the usual one first. Raises UsageError for a bundle that takes no pictures."""
    with reading("manifest.json"):
        if "preprocessing" not in content:
            raise UsageError("this bundle takes no pictures of one size")
        usual = content["preprocessing"]
        only = {"function": MAIN, "height": usual["height"], "width": usual["width"]}
        listed = content.get("sizes") or [{**only, "tokens": None}]
        return [PictureSize(**{key: each[key] for key in (*only, "tokens")}) for each in listed]


def choose(
    sizes: Sequence[PictureSize], name: str | None = None, budget: int | None = None
) -> PictureSize:
    """The size of a name ("768x512", or 512 of a square), or the largest of at most `budget` visual
    tokens; the usual one without either. Raises UsageError where there is none."""
    if name is not None:
        names = {each.name: each for each in sizes}
        wanted = name if "x" in name else f"{name}x{name}"
        if wanted not in names:
            raise UsageError(f"this bundle takes pictures of {', '.join(names)}, not of {name}")
        return names[wanted]
    if budget is None:
        return sizes[0]
    counted = [(each.tokens, each) for each in sizes if each.tokens is not None]
    within = [pair for pair in counted if pair[0] <= budget]
    if not within:
        counts = ", ".join(f"{count} at {each.name}" for count, each in counted) or "not said"
        raise UsageError(f"no picture takes at most {budget} visual tokens here: {counts}")
    return max(within, key=lambda pair: pair[0])[1]
