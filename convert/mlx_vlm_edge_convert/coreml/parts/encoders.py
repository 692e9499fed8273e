"""How a family's picture becomes image features: its tower's emitter, its pixels, its grid."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.models import (
    cambrian,
    convllava,
    eve2,
    fastvlm,
    idefics3,
    llava,
    llava_onevision,
)
from mlx_vlm_edge.models import eve as eve_family
from mlx_vlm_edge.models.base import VisionLanguageModel
from mlx_vlm_edge.picture.image import Color, Pixels, Strategy
from mlx_vlm_edge.picture.preprocessing import Preprocessing
from mlx_vlm_edge.vision.pixels import CLIP, CLIP_MEAN, CLIP_STD, HALF, normalized
from mlx_vlm_edge.vision.positions import position_ids
from mlx_vlm_edge.vision.vit import ViTConfig

from ..emit import convnext, eve, fastvit, several, vit
from ..emit.network import Network, Value
from ..emit.toolkit import tools
from ..names import FEATURES, TOKENS
from ..part import Size, UnexportableError


@dataclass(frozen=True)
class AppPixels:
    """How an app makes pixels. size: (height, width). Mean and std are in the package already."""

    size: Size
    strategy: Strategy
    fill: Color
    mean: Sequence[float]
    std: Sequence[float]


@dataclass(frozen=True)
class Encoder:
    """A model's vision tower for pictures of one size.

    emit(net, image) gives features [1, C, *grid], grid (h, w) or (1, N); connector is None where
    features are visual tokens. reference(pixels uint8 [H, W, 3]) is what MLX makes of a picture:
    image features [1, N, C] and visual tokens [1, M, D]. notes go into the manifest, arrays into a
    file beside the package.
    """

    pixels: AppPixels
    emit: Callable[[Network, Value], Value]
    width: int
    grid: Size
    connector: nn.Module | None
    reference: Callable[[np.ndarray], dict[str, mx.array]]
    notes: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


def encoder(model: VisionLanguageModel, size: Size | None, strategy: str | None) -> Encoder:
    """The encoder of a model at (height, width), the model's own without it.

    Raises UsageError for a size that it does not take, or a family without an encoder.
    """
    for family, make in _MAKERS:
        if isinstance(model, family):
            built: Encoder = make(model, size, strategy)
            return built
    name = type(model).__module__.rpartition(".")[2]
    cause = f"{name} has no vision tower that can be exported"
    raise UnexportableError(cause, "use --part decoder")


def encoders(
    model: VisionLanguageModel, size: Size | None, strategy: str | None
) -> dict[str, Encoder]:
    """The encoder of a model as its part `vision`, or of each of several towers: `vision_0`, ...

    Raises UsageError as `encoder` does.
    """
    if not isinstance(model, cambrian.Model):
        return {"vision": encoder(model, size, strategy)}
    if size is not None:
        raise UsageError(f"resolution {_shown(size)}: each of the towers has a size of its own")
    model.config.adapted(Preprocessing(strategy))
    count = len(model.config.views)
    return {f"vision_{index}": _one_of_several(model, index) for index in range(count)}


def _one_of_several(model: cambrian.Model, index: int) -> Encoder:
    """A tower's features on the grid that the aggregator takes."""
    view, tower = model.config.views[index], model.tower.towers[index]
    config, mean, std = view.tower, view.mean, view.std
    side = config.image_size

    def reference(pixels: np.ndarray) -> dict[str, mx.array]:
        return {FEATURES: model.tower(normalized(pixels[None], mx.float32, mean, std), index)}

    return Encoder(
        AppPixels((side, side), "pad", view.fill, mean, std),
        lambda net, image: several.emit(net, tower, config, image, mean, std),
        config.width, (config.side, config.side), model.connector, reference, {"tower": index},
    )  # fmt: skip


def _cambrian(model: cambrian.Model, size: Size | None, strategy: str | None) -> Encoder:
    raise UnexportableError(
        f"Cambrian-1 has {len(model.config.views)} vision towers, which no one package can be",
        "export --part vision writes each",
    )


def _stages(model: VisionLanguageModel, data: np.ndarray) -> dict[str, mx.array]:
    """Image features and visual tokens, as they come up on the way of `encode_image`."""
    outputs = dict(model.stages(Pixels(data, (data.shape[-2], data.shape[-3]))))
    outputs.setdefault("connector", outputs["vision"])  # where features are visual tokens
    names = {FEATURES: outputs["vision"], TOKENS: outputs["connector"]}
    return {name: array.reshape(1, *array.shape[-2:]) for name, array in names.items()}


def _fixed(size: Size | None, side: int) -> Size:
    """Raises UsageError for another size than the tower's own."""
    if size not in (None, (side, side)):
        raise UsageError(
            f"resolution {_shown(size)}: this vision tower takes {side}x{side} only"
        )  # fmt: skip
    return side, side


def _whole_steps(size: Size | None, side: int, step: int, tower: str) -> Size:
    """A size or the tower's own. Raises UsageError for no multiples of its stride."""
    height, width = size or (side, side)
    if min(height, width) < step or height % step or width % step:
        shown = _shown((height, width))
        raise UsageError(f"resolution {shown}: {tower} takes multiples of {step} on each side")
    return height, width


def _shown(size: Size | None) -> str:
    return "x".join(map(str, size or ()))


def _fastvlm(model: fastvlm.Model, size: Size | None, strategy: str | None) -> Encoder:
    config = model.config.adapted(Preprocessing(strategy))
    step = fastvit.STRIDE
    height, width = _whole_steps(size, config.image_size, step, "FastViTHD")
    return Encoder(
        AppPixels((height, width), config.image_strategy, (0, 0, 0), (0.0,) * 3, (1.0,) * 3),
        lambda net, image: fastvit.emit(net, model.tower, image),
        config.vision.out_dim,
        (height // step, width // step),
        model.connector,
        lambda pixels: _stages(model, pixels),
        {},
    )  # fmt: skip


def _llava(model: llava.Model, size: Size | None, strategy: str | None) -> Encoder:
    config = model.config.adapted(Preprocessing(strategy))
    vision, keeps, (mean, std, fill) = config.vision, config.keeps_class_token, config.normal
    if not (keeps or vision.class_token):
        raise UnexportableError(
            "the model leaves out SigLIP's first patch, so that its features fill no grid",
            "its tower cannot be exported",
        )
    side = vision.grid
    grid = (1, side * side + 1) if keeps and vision.class_token else (side, side)

    def emit(net: Network, image: Value) -> Value:
        x = vit.emit(net, model.tower, vision, image, mean, std)
        if not vision.class_token:
            return net.reshape(x, (1, vision.hidden_size, *grid), "features")
        return x if keeps else _without_class_token(net, x, grid)

    pixels = _fixed(size, vision.image_size)
    return Encoder(
        AppPixels(pixels, config.image_strategy, fill, mean, std),
        emit, vision.hidden_size, grid, model.connector,
        lambda pixels: _stages(model, pixels), {},
    )  # fmt: skip


def _convllava(model: convllava.Model, size: Size | None, strategy: str | None) -> Encoder:
    config = model.config.adapted(Preprocessing(strategy))
    step = config.vision.stride
    height, width = _whole_steps(size, config.image_size, step, "this ConvNeXt")
    return Encoder(
        AppPixels((height, width), config.image_strategy, CLIP.fill, CLIP.mean, CLIP.std),
        lambda net, image: convnext.emit(net, model.tower, image, CLIP.mean, CLIP.std),
        config.vision.out_dim,
        (height // step, width // step),
        model.connector,
        lambda pixels: _stages(model, pixels),
        {},
    )  # fmt: skip


def _without_class_token(net: Network, x: Value, grid: Size) -> Value:
    begin, end = [0, 0, 0, 1], list(x.shape)
    cut = tools().mb.slice_by_index(x=x.var, begin=begin, end=end, name="patches_only")
    return net.reshape(net.value(cut, x.site), (1, x.shape[1], *grid), "features")


def _square(vision: ViTConfig, rows: int) -> np.ndarray | None:
    """Rows of the position embedding for rows x rows patches, None for all in order."""
    if rows == vision.grid:
        return None
    return position_ids(rows, rows, vision.grid)


def _idefics3(model: idefics3.Model, size: Size | None, strategy: str | None) -> Encoder:
    if strategy is not None:
        raise UsageError("Idefics3 and SmolVLM cut pictures into tiles: leave --image-strategy out")
    config = model.config
    vision, side = config.vision, config.tile // config.vision.patch_size

    def emit(net: Network, image: Value) -> Value:
        rows = _square(vision, side)
        x = vit.emit(net, model.tower, vision, image, config.mean, config.std, rows)
        return net.reshape(x, (1, vision.hidden_size, side, side), "features")

    return Encoder(
        AppPixels(
            _fixed(size, config.tile), "stretch", (0, 0, 0), config.mean, config.std
        ),
        emit, vision.hidden_size, (side, side), model.connector,
        lambda pixels: _stages(model, pixels[None]), {"tiles": True},
    )  # fmt: skip


def _onevision(model: llava_onevision.Model, size: Size | None, strategy: str | None) -> Encoder:
    config = model.config.adapted(Preprocessing(strategy))
    vision, side = config.vision, config.vision.grid

    def emit(net: Network, image: Value) -> Value:
        x = vit.emit(net, model.tower, vision, image, HALF, HALF)
        return net.reshape(x, (1, vision.hidden_size, side, side), "features")

    def reference(pixels: np.ndarray) -> dict[str, mx.array]:
        features = model.features(pixels[None])
        tokens = model.connector(features)
        return {FEATURES: features, TOKENS: tokens}

    return Encoder(
        AppPixels(
            _fixed(size, vision.image_size), "pad", llava_onevision.PADDING, HALF, HALF
        ),
        emit, vision.hidden_size, (side, side), model.connector, reference,
        {"tiles": True}, {"image_newline": np.array(model.image_newline.astype(mx.float32))},
    )  # fmt: skip


def _eve(
    model: eve_family.Model | eve2.Model, size: Size | None, strategy: str | None
) -> Encoder:  # fmt: skip
    config = model.config.adapted(Preprocessing(strategy))
    stride = config.vision.stride
    step = math.lcm(config.step, stride) if isinstance(config, eve_family.Config) else stride
    height, width = size or (config.image_size // step * step,) * 2
    if min(height, width) < step or height % step or width % step:
        raise UsageError(
            f"resolution {_shown((height, width))}: this EVE takes multiples of {step} on each side"
        )
    second = isinstance(model, eve2.Model)
    return Encoder(
        AppPixels((height, width), "stretch", (0, 0, 0), CLIP_MEAN, CLIP_STD),
        lambda net, image: eve.emit(net, model.tower, image, CLIP_MEAN, CLIP_STD),
        config.text.hidden_size if second else config.vision.width,
        (1, 1 + height // stride * (width // stride + 1)),
        model.connector,
        lambda pixels: _stages(model, pixels), {},
    )  # fmt: skip


_MAKERS: tuple[tuple[type, Callable[..., Encoder]], ...] = (
    (fastvlm.Model, _fastvlm),
    (cambrian.Model, _cambrian),
    (llava.Model, _llava),
    (convllava.Model, _convllava),
    (idefics3.Model, _idefics3),
    (llava_onevision.Model, _onevision),
    (eve_family.Model, _eve),
    (eve2.Model, _eve),
)
