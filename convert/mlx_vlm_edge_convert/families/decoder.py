"""Llama and Qwen2 decoders of any published family -> `language_model.*`; the tied output head."""

import re

import mlx.core as mx

from mlx_vlm_edge.errors import UsageError

from ..rules import Arrays, Rule

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
_COMPARE_ROWS = 8192
_LAYER = (
    r"self_attn\.(?:[qkv]_proj\.(?:weight|bias)|o_proj\.weight)"
    r"|mlp\.(?:gate|up|down)_proj\.weight|(?:input|post_attention)_layernorm\.weight"
)


def decoder_rules(prefix: str, head: str = "lm_head") -> tuple[Rule, ...]:
    """The decoder's names under `prefix`, and its output head's."""
    x = re.escape(prefix)
    return (
        Rule(
            r".*\.rotary_emb\.inv_freq",
            None,
            why="a table computed from rope_theta, saved by old versions",
        ),
        Rule(rf"{x}(layers\.\d+\.(?:{_LAYER}))", r"language_model.model.\1"),
        Rule(rf"{x}(embed_tokens\.weight|norm\.weight)", r"language_model.model.\1"),
        Rule(rf"{re.escape(head)}\.weight", HEAD),
    )


def settle_head(weights: Arrays, tied: bool) -> bool:
    """Drop an output head that equals the embedding; whether the two are tied.

    The weights decide, not the config: Apple's 0.5B and 1.5B say tied and store a head all the
    same, and fine-tuned copies may say so wrongly. Raises UsageError when there is no head and
    the config says it is not tied.
    """
    if f"{HEAD.removesuffix('weight')}scales" in weights:
        return False
    if HEAD not in weights:
        if not tied:
            raise UsageError("the checkpoint lacks lm_head.weight and its config does not tie it")
        return True
    if EMBEDDING not in weights or not _equal(weights[HEAD], weights[EMBEDDING]):
        return False
    for name in [name for name in weights if name.startswith("language_model.lm_head.")]:
        del weights[name]
    return True


def _equal(left: mx.array, right: mx.array) -> bool:
    """Bit-for-bit, a few rows at a time, so that a difference shows without reading all."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    starts = range(0, left.shape[0], _COMPARE_ROWS)
    return all(
        bool(mx.array_equal(left[at : at + _COMPARE_ROWS], right[at : at + _COMPARE_ROWS]).item())
        for at in starts
    )
