"""Flat configs of LLaVA's kin: all that the decoder reads reaches it, whoever wrote the file."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from mlx_vlm_edge_convert.families import cambrian, fastvlm_config, llava, llava_onevision

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.language.llama import KEYS, TextConfig, rope_periods
from mlx_vlm_edge.language.moe_llava import TextConfig as MoETextConfig

GOLDEN = Path(__file__).parents[1] / "golden"
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 96, "use_sliding_window": True, "sliding_window": 1 << 20,
}  # fmt: skip
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
FLAT = {
    "llava": lambda text: llava.from_original({**text, "mm_projector_type": "mlp2x_gelu"}),
    "cambrian": cambrian._translated,
    "onevision": llava_onevision.nested,
}


class Read(Mapping):
    """A config that notes what is asked of it."""

    def __init__(self, config):
        self.config, self.asked = config, set()

    def __getitem__(self, key):
        self.asked.add(key)
        return self.config[key]

    def __iter__(self):
        return iter(self.config)

    def __len__(self):
        return len(self.config)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_every_key_that_is_read_is_named(kind):
    config = Read(TEXT)
    TextConfig.from_dict(config, kind)
    assert config.asked == {*KEYS, "tie_word_embeddings"}


@pytest.mark.parametrize("family", FLAT)
def test_every_named_key_is_moved(family):
    moved = FLAT[family](dict.fromkeys(KEYS, "said"))["text_config"]
    assert moved.items() >= dict.fromkeys(KEYS, "said").items()


@pytest.mark.parametrize("family", FLAT)
def test_rope_parameters_count_in_a_flat_config(family):
    """transformers 5's form; rope_theta became 10000 in silence."""
    text = FLAT[family]({**TEXT, "rope_parameters": LLAMA_3, "head_dim": 32})["text_config"]
    read = TextConfig.from_dict(text, "llama")
    assert (read.rope_theta, read.rope_scaling, read.head_dim) == (500000.0, LLAMA_3, 32)
    yarn = FLAT[family]({**TEXT, "rope_parameters": {**LLAMA_3, "rope_type": "yarn"}})
    with pytest.raises(UsageError, match="yarn"):
        rope_periods(TextConfig.from_dict(yarn["text_config"], "llama"))


def test_rope_parameters_count_in_fast_vlm():
    native = fastvlm_config.from_transformers({"text_config": {"rope_parameters": LLAMA_3}}, {})
    read = TextConfig.from_dict({**TEXT, **native}, "qwen2")
    assert (read.rope_theta, read.rope_scaling) == (500000.0, LLAMA_3)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("base", ["stablelm", "phi", "qwen"])
def test_a_scaling_that_moe_llava_has_not_is_refused(base, key):
    config = json.loads((GOLDEN / f"moe_llava_{base}" / "config.json").read_text())
    with pytest.raises(UsageError, match=key):
        MoETextConfig.of({**config, key: LLAMA_3}, base)
    used = MoETextConfig.of({**config, key: None}, base)
    with pytest.raises(UsageError, match="20000"):
        MoETextConfig.of({**config, key: {"rope_theta": 20000.0}}, base)
    with pytest.raises(UsageError, match="partial_rotary_factor"):
        MoETextConfig.of({**config, key: {"partial_rotary_factor": 0.1}}, base)
    share = used.rotary_dims / used.head_dim
    for none in (
        {},
        {"type": "default"},
        {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share},
    ):
        assert MoETextConfig.of({**config, key: none}, base) == used
