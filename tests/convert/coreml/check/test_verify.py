"""The front door of verification: what is too far from MLX, or no number, does not stay."""

from types import SimpleNamespace

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.check.verify import saved_and_checked
from mlx_vlm_edge_convert.coreml.parity import Check, Parity, distance

from mlx_vlm_edge.errors import UsageError


class Part:
    """Writes a package, and has `errors` in its comparisons."""

    name = "vision"

    def __init__(self, *errors, limit=1e-2):
        self.parity = tuple(Parity("vision", f"case {i}", e, limit) for i, e in enumerate(errors))

    def warnings(self):
        return ["it is only a double"]

    def verified(self, path):
        path.mkdir()
        (path / "weights").touch()
        return self, Check(self.parity)


def test_a_package_that_passes_stays(tmp_path):
    said = []
    part, check = saved_and_checked(Part(1e-3, 1e-2), tmp_path / "a.mlpackage", said.append)
    assert check.parity == part.parity
    assert (tmp_path / "a.mlpackage").is_dir()
    assert said[1:] == [
        "  vision: it is only a double",
        "  vision, case 0: relative error 1.00e-03", "  vision, case 1: relative error 1.00e-02",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "errors", [(float("nan"),), (1e-3, float("nan")), (1e-3, 2e-2), (float("inf"),)]
)
def test_a_package_that_fails_does_not_stay(tmp_path, errors):
    with pytest.raises(
        UsageError, match=r"the exported vision is wrong: off by .*nothing was kept"
    ):
        saved_and_checked(Part(*errors), tmp_path / "a.mlpackage", lambda _: None)
    assert [*tmp_path.iterdir()] == []


def test_neither_does_one_whose_check_is_interrupted(tmp_path):
    part = Part(1e-3)
    part.warnings = SimpleNamespace()  # which is not to be called
    with pytest.raises(TypeError):
        saved_and_checked(part, tmp_path / "a.mlpackage", lambda _: None)
    assert [*tmp_path.iterdir()] == []


def test_an_output_of_nan_is_infinitely_far():
    """And so is no largest error that a `max` over several would lose."""
    sound, nan = np.ones(3), np.array([1, np.nan, 1])
    assert max(distance(x, sound) for x in (sound, nan)) == np.inf
    assert max(distance(x, sound) for x in (nan, sound)) == np.inf
    assert distance(np.ones(4), sound) == distance(None, sound) == np.inf
    assert distance(np.full(3, 0.5), np.zeros(3)) == pytest.approx(np.sqrt(0.75))
    assert not Parity("vision", "case", distance(sound, nan), 1e-2).passed
