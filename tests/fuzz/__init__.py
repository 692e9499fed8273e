"""Inputs spoiled on purpose, by fixed seeds: `make fuzz`, and a little of it in the tests."""

from .checkpoints import (
    prepare_bundles,
    prepare_configs,
    prepare_models,
    prepare_safetensors,
    prepare_torch,
)
from .harness import Inputs
from .pictures import prepare as prepare_pictures
from .remote import prepare_addresses, prepare_hub
from .texts import prepare_messages, prepare_prompts, prepare_templates, prepare_tokenizers

# A class's inputs, and its share of them.
CLASSES = {
    item.name: (item, share)
    for item, share in (
        (Inputs("pictures", prepare_pictures), 12),
        (Inputs("configs", prepare_configs), 12),
        (Inputs("models", prepare_models), 1),
        (Inputs("safetensors", prepare_safetensors), 15),
        (Inputs("torch zips and pickles", prepare_torch), 15),
        (Inputs("bundles", prepare_bundles), 8),
        (Inputs("tokenizers", prepare_tokenizers), 5),
        (Inputs("chat templates", prepare_templates), 12),
        (Inputs("messages", prepare_messages), 4),
        (Inputs("prompts", prepare_prompts), 8),
        (Inputs("addresses", prepare_addresses), 8),
        (Inputs("Hub answers", prepare_hub), 8),
    )
}
