"""Idefics3's configs: published defaults, refused values, and no traceback whatever is in them."""

import copy

import pytest

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.models.idefics3 import Model
from mlx_vlm_edge.models.idefics3_config import Config

from ..checkpoint.test_config import WEIRD


def written():
    """A tiny config as `load` hands it over, with every key that is read."""
    return {
        "model_type": "smolvlm",
        "scale_factor": 4,
        "tie_word_embeddings": False,
        "eos_token_id": 5,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu_pytorch_tanh",
            "max_image_size": {"longest_edge": 32},
            "size": {"longest_edge": 128},
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 310,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "preprocessor_config": {
            "size": {"longest_edge": 128},
            "max_image_size": {"longest_edge": 32},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "do_image_splitting": True,
            "do_resize": True,
            "resample": 1,
            "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 32}},
        },
    }


def paths(config, above=()):
    for key, value in config.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, (*above, key))


def changed(path, value):
    config = copy.deepcopy(written())
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return config


def test_no_value_of_a_config_is_a_traceback():
    errors = []
    for path in paths(written()):
        for value in WEIRD:
            try:
                Model(Config.from_dict(changed(path, value)))
            except UsageError as error:
                errors.append(str(error))
    assert len(errors) > 200
    assert not [line for line in errors if "\n" in line]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("text_config",), None, "lacks 'text_config'"),
        (("text_config", "model_type"), "mistral", "model_type 'mistral'"),
        (("vision_config", "hidden_act"), "relu", "hidden_act 'relu'"),
        (("scale_factor",), 3, "scale_factor 3"),
        (("preprocessor_config", "do_resize"), False, "do_resize False"),
        (("preprocessor_config", "resample"), 3, "resample 3"),
        (("preprocessor_config", "size"), {"longest_edge": "x"}, "longest_edge cannot be 'x'"),
        (("preprocessor_config", "size"), {"height": 64, "width": 64}, "size cannot be {'height'"),
        (("preprocessor_config", "max_image_size"), {"shortest_edge": 64}, "max_image_size cannot"),
        (("preprocessor_config", "rescale_factor"), 1.0, "rescale_factor cannot be 1.0"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(path, value, message):
    with pytest.raises(UsageError, match=message):
        Config.from_dict(changed(path, value))


def test_the_processor_goes_before_the_tower_and_null_says_nothing():
    """What the tower says was refused though nothing asks for it."""
    for key in ("size", "max_image_size"):
        assert Config.from_dict(changed(("vision_config", key), {"height": 9})).tile == 32
    for part in ("preprocessor_config", "vision_config"):
        config = changed((part, "size"), {"longest_edge": None})
        assert Config.from_dict(config).longest_edge == 128


def test_the_file_is_named_that_has_a_wrong_size():
    for part, where in (
        ("preprocessor_config", "preprocessor_config.json: size"),
        ("vision_config", "config.json: vision_config: size"),
    ):
        config = changed((part, "size"), {"longest_edge": 0})
        if part == "vision_config":
            del config["preprocessor_config"]["size"]
        with pytest.raises(UsageError, match=where):
            Config.from_dict(config)


def test_what_a_published_config_leaves_out_has_transformers_defaults():
    """SmolVLM 2.2B's says nothing of the 32 heads; nothing says the longest edge of Idefics3's."""
    config = written() | {"model_type": "idefics3", "preprocessor_config": {}}
    for key in ("max_image_size", "size", "layer_norm_eps", "hidden_act"):
        del config["vision_config"][key]
    del config["text_config"]["num_attention_heads"], config["text_config"]["num_key_value_heads"]
    parsed = Config.from_dict(config)
    assert (parsed.tile, parsed.longest_edge, parsed.strategy) == (32, 128, "split")
    assert parsed.text.num_attention_heads == parsed.text.num_key_value_heads == 32
    assert parsed.vision.layer_norm_eps == 1e-6
    assert parsed.video is None
    assert Config.from_dict(written()).video.max_frames == 64
