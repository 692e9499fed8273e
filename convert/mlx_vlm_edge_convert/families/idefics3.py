"""Idefics3 and SmolVLM checkpoints -> the native (mlx-vlm) layout.

All published ones have transformers' names (`model.vision_model.*`, `model.text_model.*`). The
checkpoints from before that have Llama's names at the top, with added vocabulary rows apart.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_edge.checkpoint.config import says_tied
from mlx_vlm_edge.checkpoint.files import PREPROCESSOR_CONFIG, PROCESSOR_CONFIG
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.models.idefics3 import is_native
from mlx_vlm_edge.models.idefics3_config import Config
from mlx_vlm_edge.picture.image import Pixels
from mlx_vlm_edge.wording import some

from ..rules import Arrays, Rule, apply
from ..save import complete_json
from .decoder import EMBEDDING, decoder_rules, settle_head
from .vit import tower_rules

CONNECTOR = "connector.modality_projection.proj.weight"
PATCHES = "vision_model.embeddings.patch_embedding.weight"
ADDED = {  # rows for added tokens, which the first checkpoints keep apart -> what they go under
    "model.embed_tokens.additional_embedding.weight": "model.embed_tokens.weight",
    "additional_fc.weight": "lm_head.weight",
}
# mlx-vlm's Idefics3 decoder has no `model.` in its names.
_TO_NATIVE = (
    Rule(r"language_model\.model\.(.*)", r"language_model.\1"),
    Rule(r"(.*)", r"\1"),
)


def rules(decoder: str, connector: str) -> tuple[Rule, ...]:
    """A published layout, by the prefixes of its decoder's and its connector's names."""
    return (
        *tower_rules("model.vision_model.", "vision_model."),
        Rule(rf"{connector}(modality_projection\.proj\.weight)", r"connector.\1"),
        *decoder_rules(decoder),
    )


_TRANSFORMERS = rules("model.text_model.", r"model\.connector\.")
_FIRST = rules("model.", r"model\.")


def rename(weights: Mapping[str, mx.array]) -> Arrays:
    """Any published layout -> `vision_model.*`, `connector.*` and `language_model.model.*`, lazily.

    Raises UsageError for an unknown layout and for names without a rule.
    """
    if any(name.startswith("model.text_model.") for name in weights):
        return apply(_TRANSFORMERS, weights, "transformers' Idefics3 layout")
    if any(name.startswith("model.vision_model.") for name in weights):
        return apply(_FIRST, _with_added_rows(weights), "the first Idefics3 layout")
    raise UsageError(f"no Idefics3 layout has names such as {some(weights)}")


def _with_added_rows(weights: Mapping[str, mx.array]) -> Arrays:
    whole = dict(weights)
    for rows, table in ADDED.items():
        if rows in whole:
            if table not in whole:
                raise UsageError(f"the checkpoint lacks {table}, which {rows} belongs to")
            whole[table] = mx.concatenate([whole[table], whole.pop(rows)])
    return whole


config_alone = dict  # the published config.json has the native words


def adapter_rules() -> tuple[Rule, ...]:
    """The names of weights that an adapter may change, in every published spelling."""
    return (*_TRANSFORMERS, *_FIRST)


def to_native(
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    preprocessor: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Arrays]:
    """The native config and weights of a published checkpoint.

    Geometry is taken from the weights where the config leaves it out. Raises UsageError when
    names, shapes and config disagree.
    """
    if is_native(weights):
        return dict(config), dict(weights)
    renamed = rename(weights)
    if CONNECTOR not in renamed or PATCHES not in renamed or EMBEDDING not in renamed:
        raise UsageError("the checkpoint has no complete Idefics3: shards may be missing")
    tied = settle_head(renamed, says_tied(config))
    native = {**config, "tie_word_embeddings": tied}
    native["text_config"] = _text_config(config, renamed, tied)
    native["vision_config"] = _vision_config(config, renamed)
    return native, apply(_TO_NATIVE, renamed, "Idefics3")


def _text_config(config: Mapping[str, Any], weights: Arrays, tied: bool) -> dict[str, Any]:
    """The decoder's config with its vocabulary as it is: the first one counts added rows apart."""
    text = {"model_type": "llama", **(config.get("text_config") or {})}
    vocabulary, hidden = weights[EMBEDDING].shape
    return {
        **text,
        "vocab_size": vocabulary,
        "hidden_size": text.get("hidden_size", hidden),
        "tie_word_embeddings": tied,
    }


def _vision_config(config: Mapping[str, Any], weights: Arrays) -> dict[str, Any]:
    """The tower's config, with what the shapes of its weights tell filled in."""
    given = dict(config.get("vision_config") or {})
    if "embed_dim" in given:  # the first configs' name of it
        given.setdefault("hidden_size", given["embed_dim"])
    width, patch, _, _ = weights[PATCHES].shape
    inner = weights["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
    rows = weights["vision_model.embeddings.position_embedding.weight"].shape[0]
    layers = sum(name.endswith("layer_norm1.weight") for name in weights)
    derived = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "patch_size": patch,
        "image_size": round(rows**0.5) * patch,
    }
    if given.get("image_size", 0) // patch == round(rows**0.5):
        derived["image_size"] = given["image_size"]  # 384 / 14 leaves a rest that no shape shows
    for key, value in derived.items():
        if given.get(key, value) != value:
            raise UsageError(f"vision_config says {key} {given[key]}, but the weights have {value}")
    return {"model_type": "idefics3", **given, **derived}


def write_files(folder: Path, config: Mapping[str, Any]) -> None:
    """Complete preprocessor_config.json and processor_config.json as peers read them."""
    parsed = Config.from_dict(config)
    kind = "SmolVLM" if config["model_type"] == "smolvlm" else "Idefics3"
    pixels = {
        "do_convert_rgb": True,
        "do_image_splitting": parsed.strategy == "split",
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(parsed.mean),
        "image_processor_type": f"{kind}ImageProcessor",
        "image_std": list(parsed.std),
        "max_image_size": {"longest_edge": parsed.tile},
        "resample": 1,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": parsed.longest_edge},
    }
    patches = parsed.tile // parsed.vision.patch_size // parsed.scale_factor
    named = {"processor_class": f"{kind}Processor"}
    complete_json(folder / PREPROCESSOR_CONFIG, pixels, named)
    complete_json(folder / PROCESSOR_CONFIG, {"image_seq_len": patches**2}, named)


def probe(config: Mapping[str, Any]) -> Pixels:
    """One tile of noise for `--verify`."""
    tile = Config.from_dict(config).tile
    data = np.random.default_rng(0).integers(0, 256, (1, tile, tile, 3), np.uint8)
    return Pixels(data, (tile, tile))
