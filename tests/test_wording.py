"""How names, sizes and errors are said."""

import pytest

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.wording import first_line, gigabytes, some


def test_the_first_few_names_and_how_many_more():
    assert some(["b", "a"]) == "a, b"
    assert some("cab") == "a, b, c"
    assert some("dcab") == "a, b, c and 1 more"
    assert some("dcab", limit=1) == "a and 3 more"


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [
        (999_000_000, "999 MB"),
        (1_000_000_000, "1.00 GB"),
        (1_524_000_000, "1.52 GB"),
        (4e5, "400 kB"),
    ],
)
def test_sizes_are_in_powers_of_ten(nbytes, said):
    assert gigabytes(nbytes) == said


def test_an_error_is_its_first_line_or_its_type():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(ValueError("\n two")) == "two"
    assert first_line(MemoryError()) == "MemoryError"


def test_an_error_is_one_printable_line_whatever_it_quotes():
    assert str(UsageError("a: no such file")) == "a: no such file"
    assert str(UsageError("a\x1b[31m\nb\tc")) == "a?[31m b c"
    long = str(UsageError("start" + "x" * 100_000 + "end"))
    assert len(long) < 1100
    assert long.startswith("start")
    assert long.endswith("end")
