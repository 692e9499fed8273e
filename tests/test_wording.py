"""How names, sizes and errors are said."""

import pytest

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.wording import first_line, gigabytes, printable, some


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\ttext\nof two lines", "plain\ttext\nof two lines"),
        ("a\x1b]0;title\x07b\x1b[2J", r"a\x1b]0;title\x07b\x1b[2J"),
        ("over\rwritten \x9b1A", r"over\x0dwritten \x9b1A"),
        ("photo\u202egpj.exe", r"photo\u202egpj.exe"),
        ("é 中 👩‍🔬 \xa0", "é 中 👩‍🔬 \xa0"),
    ],
)
def test_what_would_command_a_terminal_is_spelt_out(text, shown):
    assert printable(text) == shown


def test_a_line_that_may_change_and_one_that_may_not_end():
    assert printable("\r1/2\x1b[K\x1b[31m", progress=True) == "\r1/2\x1b[K\\x1b[31m"
    assert printable("one\ntwo", lines=False) == r"one\ntwo"
