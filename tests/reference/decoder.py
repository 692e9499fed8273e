"""transformers' Qwen2 and Llama at a tiny size, with variance-preserving random weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import torchvision_shim
from .fastvlm import spread
from .variance import randomise

torchvision_shim.install()

from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen2 one kv head": {"num_key_value_heads": 1, "rope_theta": 1e6},
    "llama": {},
    "llama biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    "llama wide head": {"head_dim": 32, "tie_word_embeddings": True},
    "llama llama3": {"rope_parameters": LLAMA3},
    "llama linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
}


@dataclass
class Reference:
    """A decoder, the config.json it would have, and its weights in float32."""

    model: nn.Module
    config: dict[str, Any]
    model_type: str
    weights: dict[str, Any]

    @torch.no_grad()
    def logits(self, ids: Any) -> Any:
        """float64 [L, V] of ids int[L]."""
        return self.model(torch.tensor(ids)[None]).logits[0].double().numpy()


def build(kind: str, width: int = 64, seed: int = 0) -> Reference:
    """One of KINDS: its first word is the model type."""
    model_type = kind.split()[0]
    settings = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **KINDS[kind],
    }
    if "rope_theta" in settings:
        parameters = {"rope_type": "default", "rope_theta": settings["rope_theta"]}
        settings["rope_parameters"] = parameters
    make = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
    config_class, model_class = make[model_type]
    ours = {key: value for key, value in settings.items() if key != "rope_theta"}
    torch.manual_seed(seed)
    model = model_class(config_class(**ours)).float().eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(0, settings["vocab_size"], (1, 48))
    randomise(model, lambda: model(ids), seed, spread)
    if settings["tie_word_embeddings"]:
        model.tie_weights()
    tied = settings["tie_word_embeddings"]
    weights = {
        name: tensor.clone().numpy()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    return Reference(model.double(), ours, model_type, weights)
