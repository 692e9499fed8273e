"""A picture's size -> how often the vision tower runs, on what, and how many visual tokens come.

The same arithmetic as the families' processors, on sizes alone.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from mlx_vlm_edge.errors import UsageError

from .connector import POOLED, ldp_side
from .vision import FASTVIT_STRIDE

Size = tuple[int, int]  # width, height
Config = Mapping[str, Any]
_SPELLED = 7  # tokens of a tile's marker where the vocabulary has none for it, about
_MARKED_VOCABULARY = 49280  # SmolVLM's, which has them
_MARKED = 6  # tiles side by side that Idefics3 and SmolVLM know


class View(NamedTuple):
    """tiles of height x width pixels; tokens: visual ones of them all; marks: text around them."""

    tiles: int
    height: int
    width: int
    tokens: int
    marks: int = 0


def fastvlm(config: Config, resolution: int | None, image: Size) -> View:
    side = _or(resolution, config["vision_config"].get("image_size", 1024))
    if side < 1 or side % FASTVIT_STRIDE:
        raise UsageError(f"image size {side}: FastViTHD takes multiples of {FASTVIT_STRIDE}")
    return View(1, side, side, (side // FASTVIT_STRIDE) ** 2)


def _or(given: int | None, default: int) -> int:
    return default if given is None else given


def fixed(config: Config, resolution: int | None, image: Size) -> View:
    """LLaVA-1.5 and MobileVLM: one square."""
    vision = config["vision_config"]
    side = _only(vision["image_size"], resolution)
    grid = side // vision["patch_size"]
    kind = config.get("mm_projector_type")
    if kind == "ldpnetv2":
        tokens = POOLED**2
    elif kind == "ldpnet":
        tokens = ldp_side(grid) ** 2
    else:
        full = config.get("vision_feature_select_strategy", "default") == "full"
        tokens = grid**2 + full
    return View(1, side, side, tokens)


def _only(side: int, resolution: int | None) -> int:
    if resolution not in (None, side):
        raise UsageError(f"image size {resolution}: this vision tower takes {side} only")
    return side


def onevision(config: Config, resolution: int | None, image: Size) -> View:
    from mlx_vlm_edge.picture.tiling import best_resolution, capped, unpad

    vision = config["vision_config"]
    side = _only(vision["image_size"], resolution)
    n = side // vision["patch_size"]
    pinpoints = config.get("image_grid_pinpoints") or [
        [side * i, side * j] for i in range(1, 7) for j in range(1, 7)
    ]
    width, height = best_resolution(image, [(w, h) for h, w in pinpoints])
    rows, columns = height // side, width // side
    picture = unpad(image, (rows * n, columns * n))
    limit = re.search(r"\d+$", str(config.get("vision_aspect_ratio", "anyres_max_9")))
    tiles = int(limit[0]) if limit else 9
    kept = capped(picture.height, picture.width, tiles * n**2)
    return View(1 + rows * columns, side, side, n**2 + kept[0] * (kept[1] + 1))


def idefics3(config: Config, resolution: int | None, image: Size) -> View:
    from mlx_vlm_edge.picture.tiling import split_grid

    vision, processor = config["vision_config"], config.get("preprocessor_config") or {}
    tile = _edge(processor, "max_image_size") or _edge(vision, "max_image_size")
    tile = tile or vision["image_size"]
    if resolution is not None and not 1 <= resolution <= _MARKED * tile:
        raise UsageError(f"image size {resolution}: give at most {_MARKED * tile}")
    usual = _edge(processor, "size") or _edge(vision, "size") or 4 * tile
    longest = _or(resolution, usual)
    rows, columns = 0, 0
    if processor.get("do_image_splitting", True):
        rows, columns = split_grid(image, longest, tile)
    tiles = rows * columns + 1
    each = (tile // vision["patch_size"] // config.get("scale_factor", 2)) ** 2
    marker = 1 if config["text_config"].get("vocab_size") == _MARKED_VOCABULARY else _SPELLED
    return View(tiles, tile, tile, tiles * each, tiles * (1 + marker) + rows + 1)


def _edge(config: Config, key: str) -> int | None:
    edge = (config.get(key) or {}).get("longest_edge")
    return edge if isinstance(edge, int) and edge > 0 else None


def eve(config: Config, resolution: int | None, image: Size) -> View:
    patch = config.get("patch_stride", 14)
    stride = patch * config.get("conv_stride", 2)
    usual = config.get("image_size") or named_size(config)
    step = patch * (usual // config.get("image_size_clip", 336))
    size = _or(resolution, usual)
    if size < step or size % step:
        raise UsageError(f"image size {size}: this EVE takes multiples of {step}")
    other = -(-size * min(image) // (max(image) * step)) * step
    width, height = (size, other) if image[0] > image[1] else (other, size)
    return View(1, height, width, 1 + height // stride * (width // stride + 1))


def eve2(config: Config, resolution: int | None, image: Size) -> View:
    stride = config.get("patch_stride", 16) * config.get("dense_stride", 2)
    size = _or(resolution, config.get("max_size") or named_size(config))
    if size < stride:
        raise UsageError(f"image size {size}: EVE takes {stride} or more")
    scale = math.sqrt(image[0] * image[1]) / size
    width, height = (math.ceil(side / scale / stride) * stride for side in image)
    return View(1, height, width, 1 + height // stride * (width // stride + 1))


def named_size(config: Config) -> int:
    """The image size in the name of EVE's "vision tower": 672 of eve-patch14-anypixel-672."""
    name = str(config.get("mm_vision_tower"))
    if match := re.search(r"(?:anypixel-|anyratio-res)(\d+)", name):
        return int(match[1])
    raise UsageError(f"config.json: mm_vision_tower {name!r} is not known, so no image size is")


def fuyu(config: Config, resolution: int | None, image: Size) -> View:
    from mlx_vlm_edge.picture.tiling import fit_within

    patch = config.get("patch_size", 30)
    if resolution is not None and (resolution < patch or resolution % patch):
        raise UsageError(f"image size {resolution}: Fuyu takes multiples of {patch}")
    limit = _or(resolution, 1920)
    width, height = fit_within(image, (min(1920, limit), min(1080, limit)))
    rows, columns = -(-height // patch), -(-width // patch)
    return View(1, rows * patch, columns * patch, rows * (columns + 1))
