"""A model's config -> its parts: vision tower, connector and decoder, and what a picture costs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.checkpoint.configs.defaults import IDEFICS3_VISION, LLAMA
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.models import family_name

from . import connector, decoder, vision, visual
from .decoder import Decoder
from .visual import Size, View
from .work import Work, linear

Config = Mapping[str, Any]
SQUARE = (1024, 1024)  # pixels of the picture where nothing else is said
_CLIP = "openai/clip-vit-large-patch14-336"


@dataclass(frozen=True)
class Parts:
    """vision, connector: what a picture costs there. view: what it becomes. tower: "fastvithd",
    "vit", or "patches" where a thin embedding stands in for one."""

    tower: str
    vision: Work
    connector: Work
    decoder: Decoder
    view: View


def parts_of(config: Config, resolution: int | None = None, image: Size = SQUARE) -> Parts:
    """The parts of a model for a picture of `image` (width, height) pixels.

    config: as a folder or `configs.read` has it, native or as published. resolution: what
    `load(resolution=)` takes. Raises UsageError for a config that is not known or not whole, and
    for a size that cannot be.
    """
    if min(image) < 1:
        raise UsageError(f"a picture of {image[0]} x {image[1]} pixels has nothing in it")
    build = _BUILDERS[family_name(config)]
    try:
        return build(config, resolution, image)
    except KeyError as error:
        raise UsageError(f"config.json lacks {error.args[0]!r}") from error
    except (TypeError, AttributeError, ZeroDivisionError, ValueError) as error:
        raise UsageError(f"config.json: a value is of the wrong kind ({error})") from error


def _tied(config: Config, text: Config, default: bool = False) -> bool:
    said = [part["tie_word_embeddings"] for part in (config, text) if "tie_word_embeddings" in part]
    return any(said) if said else default


def _fastvlm(config: Config, resolution: int | None, image: Size) -> Parts:
    text = {**config, **(config.get("text_config") or {})}
    given = config.get("vision_config") or {}
    name = str(config.get("mm_vision_tower", "")).rsplit("_", 1)[-1]
    published = configs.read("fastvlm-0.5b")["vision_config"]
    size = {"image_size": int(name)} if name.isdigit() else {}
    tower = {**published, **size, **{key: given[key] for key in given.keys() & published.keys()}}
    view = visual.fastvlm({"vision_config": tower}, resolution, image)
    works = vision.fastvithd(tower, view.height, view.width).values()
    text_model = decoder.llama(text, "qwen2", tied=_tied(config, text))
    features = int(tower["embed_dims"][-1] * tower["cls_ratio"])
    join = connector.mlp(view.tokens, features, text_model.width)
    return Parts("fastvithd", sum(works, Work()), join, text_model, view)


def _llava(config: Config, resolution: int | None, image: Size) -> Parts:
    """LLaVA-1.5 and MobileVLM, whose original configs are flat and name their tower."""
    nested = config.get("text_config")
    text = {**LLAMA, **nested} if nested is not None else config
    config = {**config, "vision_config": _clip(config)}
    tower = config["vision_config"]
    view = visual.fixed(config, resolution, image)
    layer = config.get("vision_feature_layer", config.get("mm_vision_select_layer", -2))
    layers = layer + (tower["num_hidden_layers"] + 1 if layer < 0 else 0)
    text_model = decoder.llama(text, "llama", tied=_tied(config, text))
    side, features = tower["image_size"] // tower["patch_size"], tower["hidden_size"]
    kind, width = config.get("mm_projector_type"), text_model.width
    if kind == "ldpnetv2":
        join = connector.ldpv2(side, features, width)
    elif kind == "ldpnet":
        join = connector.ldp(side, features, width)
    else:
        join = connector.mlp(view.tokens, features, width)
    return Parts("vit", vision.vit(tower, layers), join, text_model, view)


def _clip(config: Config) -> Config:
    given = config.get("vision_config")
    if given:
        return dict(given)
    if config.get("mm_vision_tower") != _CLIP:
        raise UsageError(
            f"config.json has no vision_config, and {config.get('mm_vision_tower')!r} is not known"
        )
    found: Config = configs.read("llava-1.5-7b")["vision_config"]
    return found


def _onevision(config: Config, resolution: int | None, image: Size) -> Parts:
    published = configs.read("llava-onevision-0.5b")
    text = config.get("text_config") or config
    tower = {**published["vision_config"], **(config.get("vision_config") or {})}
    pinpoints = config.get("image_grid_pinpoints") if config.get("text_config") else None
    aspect = config.get("vision_aspect_ratio") or published["vision_aspect_ratio"]
    view = visual.onevision(
        {
            "vision_config": tower,
            "image_grid_pinpoints": pinpoints,
            "vision_aspect_ratio": aspect,
        },
        resolution,
        image,
    )
    text_model = decoder.llama(text, "qwen2", tied=_tied(config, text))
    encoded = vision.vit(tower, tower["num_hidden_layers"]).runs(view.tiles)
    rows = (tower["image_size"] // tower["patch_size"]) ** 2
    join = connector.mlp(rows, tower["hidden_size"], text_model.width).runs(view.tiles)
    newline = Work(vectors=text_model.width)
    return Parts("vit", encoded, join + newline, text_model, view)


def _idefics3(config: Config, resolution: int | None, image: Size) -> Parts:
    tower = {**IDEFICS3_VISION, **config["vision_config"]}
    text = {**LLAMA, **config["text_config"]}
    whole = {**config, "vision_config": tower, "text_config": text}
    view = visual.idefics3(whole, resolution, image)
    text_model = decoder.llama(text, "llama", tied=_tied(config, {}))
    own = {**tower, "model_type": "siglip_vision_model"}
    encoded = vision.vit(own, tower["num_hidden_layers"], post_norm=True).runs(view.tiles)
    scale, width = config.get("scale_factor", 2), text_model.width
    join = connector.pixel_shuffle(view.tokens, tower["hidden_size"], width, scale)
    return Parts("vit", encoded, join, text_model, view)


def _eve(config: Config, resolution: int | None, image: Size) -> Parts:
    view = visual.eve(config, resolution, image)
    text_model = decoder.llama(config, "llama", tied=_tied(config, {}))
    channels, width = config["mm_hidden_size"], text_model.width
    patch, window = config.get("patch_stride", 14), config.get("conv_stride", 2)
    embedding = vision.eve(channels, patch, window, view.height, view.width)
    return Parts(
        "patches", embedding, connector.mlp(view.tokens, channels, width), text_model, view
    )


def _eve2(config: Config, resolution: int | None, image: Size) -> Parts:
    view = visual.eve2(config, resolution, image)
    text_model = decoder.llama(config, "qwen2", tied=_tied(config, {}), kinds=2)
    patch, window = config.get("patch_stride", 16), config.get("dense_stride", 2)
    embedding = vision.eve2(
        config["mm_hidden_size"], text_model.width, patch, window, view.height, view.width
    )
    return Parts("patches", embedding, Work(), text_model, view)


def _fuyu(config: Config, resolution: int | None, image: Size) -> Parts:
    view = visual.fuyu(config, resolution, image)
    text = {**config, **(config.get("text_config") or {})}
    text_model = decoder.persimmon(text, tied=_tied(config, text))
    patch = config.get("patch_size", 30)
    patches = (view.height // patch) * (view.width // patch)
    embedding = linear(patches, 3 * patch**2, text_model.width)
    return Parts("patches", embedding, Work(), text_model, view)


_BUILDERS = {
    "fastvlm": _fastvlm,
    "llava": _llava,
    "mobilevlm": _llava,
    "llava_onevision": _onevision,
    "idefics3": _idefics3,
    "eve": _eve,
    "eve2": _eve2,
    "fuyu": _fuyu,
}
