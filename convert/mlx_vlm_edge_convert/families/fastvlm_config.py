"""A published FastVLM config.json -> the native one: every key kept, every key peers need added.

mlx-vlm and mlx-swift-lm read the text fields at the root and a complete `vision_config`. The
tower's geometry comes from the weights; what a source says about it must agree with them.
"""

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.picture.preprocessing import clip_strategy
from mlx_vlm_edge.vision.fastvit import STRIDE

Config = dict[str, Any]

_NETWORK = "vision_tower.vision_model.network."
_EXPANSION = "vision_tower.vision_model.conv_exp.reparam_conv.weight"
_CLIP_HEAD = "vision_tower.vision_model.head.proj"
_PUBLISHED_SIZE = 1024

# Fields of mlx-community's vision_config that no weight shows; FastVLM's own values.
_PUBLISHED = {
    "down_stride": 2,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "layer_scale_init_value": 1e-5,
    "num_classes": 1000,
    "patch_size": STRIDE,
}
_ROOT = {
    "mm_projector_type": "mlp2x_gelu",
    "tokenizer_model_max_length": 8192,
    "tokenizer_padding_side": "right",
}
_QWEN2_END_OF_TURN = 151645


def native_config(
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    *,
    tied: bool,
    preprocessor: Mapping[str, Any] | None = None,
) -> Config:
    """The native config of a source's, for weights that are native already.

    `preprocessor` is the source's preprocessor_config.json; only transformers' `fast_vlm` needs
    it, whose config has neither the image size nor the way non-square images are treated: its
    image processor crops the centre, so `image_aspect_ratio` becomes "center_crop" unless that
    file says otherwise (mlx-vlm ignores the key and always pads). Apple's pads. The placeholder
    stays the source's: -200 in Apple's layout, 151646 (`<image>`) in `fast_vlm`.
    Raises UsageError where the config contradicts the weights or names an unknown part.
    """
    if config.get("model_type") == "fast_vlm":
        native = from_transformers(config, preprocessor or {})
    else:
        native = from_apple(config)
    given = native["vision_config"]
    derived = derive_geometry(weights, head_width(config))
    _agree("vision_config", given, derived)
    native["vision_config"] = {**_PUBLISHED, **given, **derived}
    features = int(weights[_EXPANSION].shape[0])
    _agree("config.json", native, {"mm_hidden_size": features})
    native = {**_ROOT, **native, "mm_hidden_size": features, "tie_word_embeddings": tied}
    projector = native["mm_projector_type"]
    if projector != _ROOT["mm_projector_type"]:
        raise UsageError(f"config.json: mm_projector_type {projector!r} is not known")
    if native.get("eos_token_id") is None and native.get("vocab_size", 0) > _QWEN2_END_OF_TURN:
        native["eos_token_id"] = _QWEN2_END_OF_TURN
    return native


def head_width(config: Mapping[str, Any]) -> int:
    """Width of the CLIP head that a source without one gets (of zeros)."""
    return int((config.get("vision_config") or {}).get("projection_dim") or 768)


def derive_geometry(weights: Mapping[str, mx.array], head: int = 768) -> Config:
    """What the shapes of the native vision weights tell of `vision_config`.

    Raises UsageError when the tower has no stages or one with an incomplete first block.
    """
    stages: list[Config] = []
    position, index = None, 0
    geometry: Config = {"down_patch_size": 7, "repmixer_kernel_size": 3}
    while True:
        prefix = f"{_NETWORK}{index}."
        large = f"{prefix}proj.0.lkb_reparam.weight"
        encoding = f"{prefix}reparam_conv.weight"
        mixer = f"{prefix}0.token_mixer.reparam_conv.weight"
        if large in weights:
            geometry["down_patch_size"] = weights[large].shape[1]
        elif encoding in weights:
            position = list(weights[encoding].shape[1:3])
        elif f"{prefix}0.convffn.fc1.weight" in weights:
            stages.append({**_stage(weights, prefix), "pos_embs_shapes": position})
            position = None
            if mixer in weights:
                geometry["repmixer_kernel_size"] = weights[mixer].shape[1]
        else:
            break
        index += 1
    if not stages or _EXPANSION not in weights:
        raise UsageError("the checkpoint has no complete FastViTHD vision tower")
    for key in stages[0]:
        geometry[key] = [stage[key] for stage in stages]
    clip_head = weights.get(_CLIP_HEAD)
    return {
        **geometry,
        "cls_ratio": weights[_EXPANSION].shape[0] / stages[-1]["embed_dims"],
        "downsamples": [True] * len(stages),
        "projection_dim": head if clip_head is None else clip_head.shape[1],
    }


def _stage(weights: Mapping[str, mx.array], prefix: str) -> Config:
    hidden, *_, width = weights[f"{prefix}0.convffn.fc1.weight"].shape
    blocks = 1
    while f"{prefix}{blocks}.convffn.fc1.weight" in weights:
        blocks += 1
    attention = f"{prefix}0.token_mixer.qkv.weight" in weights
    return {
        "embed_dims": width,
        "layers": blocks,
        "mlp_ratios": hidden // width if hidden % width == 0 else hidden / width,
        "token_mixers": "attention" if attention else "repmixer",
    }


def _agree(where: str, given: Mapping[str, Any], derived: Mapping[str, Any]) -> None:
    for key, value in derived.items():
        if key in given and given[key] is not None and given[key] != value:
            raise UsageError(f"{where} says {key} {given[key]}, but the weights have {value}")


def from_apple(config: Mapping[str, Any]) -> Config:
    """A `llava_qwen2` config; the image size is the last part of mm_vision_tower's name."""
    native = dict(config)
    tower = str(config.get("mm_vision_tower", ""))
    if tower and "mobileclip" not in tower.lower():
        raise UsageError(f"config.json: mm_vision_tower {tower!r} is not a FastViTHD")
    size = tower.rsplit("_", 1)[-1]
    vision = dict(config.get("vision_config") or {})
    vision.setdefault("image_size", int(size) if size.isdigit() else _PUBLISHED_SIZE)
    native["vision_config"] = vision
    native.setdefault("image_token_index", -200)
    if not native.get("image_aspect_ratio") and "embed_dims" not in vision:  # not native yet
        native["image_aspect_ratio"] = "pad"
    return native


def from_transformers(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Config:
    """A `fast_vlm` config: text fields to the root, timm's fields of the tower kept beside ours."""
    activation = config.get("projector_hidden_act", "gelu")
    if activation != "gelu":
        raise UsageError(f"config.json: projector_hidden_act {activation!r} is not known")
    text = config.get("text_config") or {}
    own = {key: value for key, value in config.items() if value is not None}
    own.pop("text_config", None)
    native: Config = {**text, **own, "model_type": "llava_qwen2"}
    native["architectures"] = ["LlavaQwen2ForCausalLM"]
    rope = text.get("rope_parameters") or {}
    if "rope_theta" in rope:
        native.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        native.setdefault("rope_scaling", dict(rope))
    tower = dict(config.get("vision_config") or {})
    features, arguments = tower.pop("hidden_size", None), tower.get("model_args") or {}
    if features is not None:
        native["mm_hidden_size"] = features
    geometry = {key: arguments[key] for key in ("layers", "embed_dims") if key in arguments}
    tower.pop("num_classes", None)
    side = _image_size(config, preprocessor)
    native["vision_config"] = {
        **tower,
        **{key: list(value) for key, value in geometry.items()},
        "model_type": "llava_qwen2",
        "image_size": side,
    }
    # mlx-vlm and mlx-swift-lm put -200 for an image whatever the config says.
    native["image_token_id"] = config.get("image_token_index", config.get("image_token_id", 151646))
    native["image_token_index"] = -200
    if not native.get("image_aspect_ratio"):
        native["image_aspect_ratio"] = clip_strategy(preprocessor, side)
    return native


def _image_size(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> int:
    """The side of a preprocessed image: of the crop, else of the visual tokens, else published."""
    for key in ("crop_size", "size") if preprocessor.get("do_center_crop", True) else ("size",):
        size: Any = preprocessor.get(key)
        if isinstance(size, int):
            return int(size)
        if size:
            return int(size.get("height") or size.get("shortest_edge"))
    tokens = int(config.get("image_seq_length") or 0)
    if tokens and math.isqrt(tokens) ** 2 == tokens:
        return math.isqrt(tokens) * STRIDE
    return _PUBLISHED_SIZE
