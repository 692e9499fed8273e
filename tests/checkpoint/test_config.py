"""config.json values of the wrong type or sign: one line naming the key, whatever the value."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from mlx_vlm_edge.checkpoint.config import (
    check,
    first,
    fits,
    number,
    read_config,
    reading_values,
    says_tied,
)
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.language import llama, persimmon
from mlx_vlm_edge.models import family, fastvlm

WEIRD = [None, "x", -1, 0, [], {}, 3.5, True, [1, 2]]


@pytest.mark.parametrize(
    ("value", "hint", "want"),
    [
        (3, int, True),
        (True, int, False),
        (3.0, int, False),
        (3, float, True),
        (True, float, False),
        (True, bool, True),
        ("a", str, True),
        (None, int | None, True),
        ("a", int | None, False),
        ((1, 2), tuple[int, ...], True),
        ((1, "a"), tuple[int, ...], False),
        ([1, 2], tuple[int, ...], False),
        ((), tuple[int, ...], True),
        ((1, 2), tuple[int, int], True),
        ((1, 2, 3), tuple[int, int], False),
        ((None, (7, 7)), tuple[tuple[int, int] | None, ...], True),
        ({}, Mapping[str, Any], True),
        (3, Mapping[str, Any] | None, False),
        (object(), Any, True),
    ],
)
def test_fits(value, hint, want):
    assert fits(value, hint) is want


def test_check_names_the_field():
    @dataclass
    class Sizes:
        width: int
        ratios: tuple[float, ...] = (1.0,)

    check(Sizes(3), positive=True)
    with pytest.raises(UsageError, match="width cannot be 'wide'"):
        check(Sizes("wide"))
    with pytest.raises(UsageError, match="ratios must be above zero"):
        check(Sizes(3, (1.0, 0.0)), positive=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, 1 << 40])
def test_check_refuses_numbers_that_cannot_be(value):
    @dataclass
    class Scales:
        theta: float
        more: tuple[float, ...] = (1.0,)

    for positive in (False, True):
        with pytest.raises(UsageError, match="theta"):
            check(Scales(value), positive=positive)
        with pytest.raises(UsageError, match="more"):
            check(Scales(1.0, (2.0, value)), positive=positive)


def test_check_refuses_more_layers_than_any_model_has():
    @dataclass
    class Deep:
        num_hidden_layers: int

    check(Deep(126))
    with pytest.raises(UsageError, match="more than any model"):
        check(Deep(2147483647))


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, 0, -1, 0.0, [], {}, "1", True, False, 1 << 40]
)
def test_a_number_is_finite_and_above_zero(value):
    with pytest.raises(UsageError, match="theta"):
        number({"theta": value}, "theta", 3)


def test_a_number_may_be_missing_or_null_where_it_has_a_default():
    assert number({"theta": 2}, "theta") == 2.0
    assert number({"theta": None}, "theta", 3) == number({}, "theta", 3) == 3.0
    with pytest.raises(UsageError, match="lacks 'theta'"):
        number({}, "theta")
    assert [first(None, value, 1) for value in (0, [], False, None)] == [0, [], False, 1]


@pytest.mark.parametrize(
    "error",
    [KeyError("a"), TypeError("x\ny"), ValueError(), ZeroDivisionError(), RecursionError(),
     RuntimeError("[reshape] no")],
)  # fmt: skip
def test_the_net_makes_one_line(error):
    with (
        pytest.raises(UsageError, match=r"^config\.json: a value is of the wrong kind \(.+\): .+$"),
        reading_values("config.json"),
    ):
        raise error


ROPES: list[tuple[dict[str, Any], str]] = [
    ({"rope_theta": []}, "rope_theta"),
    ({"rope_theta": False}, "rope_theta"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rope_theta": math.nan}, "rope_theta"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
    ({"rope_scaling": []}, "rope_scaling"),
    ({"rope_scaling": False}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
    ({"rope_scaling": {"type": "linear", "factor": math.nan}}, "factor"),
    ({"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 8}}, "factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "original_max"),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                          "original_max_position_embeddings": 8}},
        "high_freq_factor",
    ),
    ({"num_key_value_heads": 0}, "num_key_value_heads"),
    ({"head_dim": []}, "head_dim"),
    ({"num_attention_heads": 0}, "size or rope"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), ROPES)
def test_a_decoder_takes_no_number_that_cannot_be(changes, says):
    from mlx_vlm_edge.language.llama import TextConfig, rope_periods

    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    config = {**dict.fromkeys(sizes, 8), "num_attention_heads": 2, **changes}
    with pytest.raises(UsageError, match=says):
        rope_periods(TextConfig.from_dict(config, "llama"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layer_norm_eps": math.nan}, "layer_norm_eps"),
        ({"rope_theta": []}, "rope_theta"),
        ({"partial_rotary_factor": 2.0}, "partial_rotary_factor"),
        ({"num_attention_heads": 3}, "fits no heads"),
        ({"vocab_size": "8"}, "vocab_size"),
    ],
)
def test_persimmon_takes_no_number_that_cannot_be(changes, says):
    from mlx_vlm_edge.language.persimmon import TextConfig

    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    config = {**dict.fromkeys(sizes, 8), "num_attention_heads": 2}
    assert TextConfig.from_dict({**config, "max_position_embeddings": None}).rope_theta == 25000
    with pytest.raises(UsageError, match=says):
        TextConfig.from_dict({**config, **changes})


def _paths():
    from ..reference.native import config

    written = config()
    yield from ((key,) for key in written)
    yield from (("vision_config", key) for key in written["vision_config"])


def test_no_value_of_a_config_is_a_traceback():
    """Each key of the native config.json set to each weird value: read, or refused in a line."""
    from ..reference.native import config

    errors = []
    for path in _paths():
        for value in WEIRD:
            written = config()
            written["vision_config"] = dict(written["vision_config"])
            place = written if len(path) == 1 else written["vision_config"]
            place[path[-1]] = value
            try:
                family(written)
                fastvlm.Model(fastvlm.Config.from_dict(written))
            except UsageError as error:
                errors.append(str(error))
    assert len(errors) > 100
    assert not [line for line in errors if "\n" in line]


@pytest.mark.parametrize("key", fastvlm.ONLY)
def test_settings_that_are_not_supported_are_refused(key):
    from ..reference.native import config

    with pytest.raises(UsageError, match=key):
        fastvlm.Config.from_dict(config(**{key: "other"}))


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [
        (None, None, True),  # transformers' default
        (True, None, True), (False, None, False), (None, True, True), (None, False, False),
        (False, True, True),  # as transformers writes SmolVLM
        (True, False, True), (False, False, False), (True, True, True),
    ],
)  # fmt: skip
def test_a_head_is_tied_where_either_config_says_so_or_neither_speaks(outer, inner, tied):
    key = "tie_word_embeddings"
    config = {} if outer is None else {key: outer}
    assert says_tied({**config, "text_config": {} if inner is None else {key: inner}}) is tied
    if inner is None:
        assert says_tied(config) is says_tied({**config, "text_config": None}) is tied


@pytest.mark.parametrize(
    ("own", "more", "want"),
    [
        (None, None, None), (1, None, 1), (None, 2, 2), (1, 2, [1, 2]), (1, 1, 1),
        (1, [2, 1], [1, 2]), ([3, 1], [2, 3], [3, 1, 2]), ([], [7], 7),
    ],
)  # fmt: skip
def test_the_ends_of_both_files_count_the_config_s_first(tmp_path, own, more, want):
    for name, ids in (("config.json", own), ("generation_config.json", more)):
        (tmp_path / name).write_text(json.dumps({} if ids is None else {"eos_token_id": ids}))
    assert read_config(tmp_path).get("eos_token_id") == want


def test_the_context_that_a_config_leaves_out():
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    config = {**dict.fromkeys(sizes, 8), "num_attention_heads": 2}
    for read, context in (
        (lambda config: llama.TextConfig.from_dict(config, "llama"), 32768),
        (persimmon.TextConfig.from_dict, 16384),
    ):
        assert read(config).max_position_embeddings == context
        assert read(config | {"max_position_embeddings": None}).max_position_embeddings == context
        assert read(config | {"max_position_embeddings": 99}).max_position_embeddings == 99
