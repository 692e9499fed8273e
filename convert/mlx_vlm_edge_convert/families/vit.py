"""CLIP and SigLIP towers of any published family -> `vision_tower.vision_model.*`, NHWC."""

import re

from ..rules import Rule, to_channels_last

TOWER = "vision_tower.vision_model."
_WB = r"(?:weight|bias)"
_LAYER = (
    rf"layer_norm[12]\.{_WB}|mlp\.fc[12]\.{_WB}"
    rf"|self_attn\.(?:[qkv]_proj|out_proj)\.{_WB}"
)


def tower_rules(prefix: str, target: str = TOWER) -> tuple[Rule, ...]:
    """Hugging Face's names of a tower under `prefix`; `pre_layrnorm` is spelt so."""
    x = re.escape(prefix)
    return (
        Rule(rf"{x}(embeddings\.patch_embedding\.weight)", rf"{target}\1", to_channels_last),
        Rule(
            rf"{x}(embeddings\.(?:class_embedding|patch_embedding\.bias|position_embedding\.weight))",
            rf"{target}\1",
        ),
        Rule(rf"{x}embeddings\.position_ids", None, why="0, 1, 2, ..., saved by old versions"),
        Rule(rf"{x}((?:pre_layrnorm|post_layernorm)\.{_WB})", rf"{target}\1"),
        Rule(rf"{x}(encoder\.layers\.\d+\.(?:{_LAYER}))", rf"{target}\1"),
        Rule(rf"{x}head\..*", None, why="SigLIP's pooling head; features are read before it"),
    )
