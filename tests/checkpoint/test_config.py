"""config.json values of the wrong type or sign: one line naming the key, whatever the value."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from mlx_vlm_edge.checkpoint.config import check, fits
from mlx_vlm_edge.errors import UsageError
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
