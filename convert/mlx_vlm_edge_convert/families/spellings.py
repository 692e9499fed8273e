"""The names under which releases of transformers have saved one and the same LLaVA-like model.

- the Hub and releases to 4.51: vision_tower.vision_model., language_model.model. and .lm_head
- 4.52 to 5.3: these, or as in memory: model.vision_tower., model.language_model., lm_head
- 5.4 and 5.5: model.vision_tower.vision_model., model.language_model.model., language_model.lm_head
- 5.6 to 5.24: vision_tower., language_model.model., language_model.lm_head
"""

from ..rules import Rule
from .decoder import decoder_rules
from .vit import tower_rules

TOWERS = (
    "vision_tower.vision_model.",
    "vision_tower.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
)
# A decoder's prefix and its head's name.
DECODERS = (
    ("language_model.model.", "language_model.lm_head"),
    ("model.language_model.", "lm_head"),
    ("model.language_model.model.", "language_model.lm_head"),
)
CONNECTOR = "multi_modal_projector."


def transformers_rules() -> tuple[Rule, ...]:
    """Every spelling of tower, connector and decoder -> the native names."""
    return (
        *(rule for prefix in TOWERS for rule in tower_rules(prefix)),
        Rule(rf"(?:model\.)?({CONNECTOR}linear_[12]\.(?:weight|bias))", r"\1"),
        *(rule for prefix, head in DECODERS for rule in decoder_rules(prefix, head)),
    )
