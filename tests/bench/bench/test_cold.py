"""The clock of a fresh process, on small ones that say what they should."""

import sys

import pytest
from mlx_vlm_edge_bench.bench.cold import cold_run

from mlx_vlm_edge.errors import UsageError

REPORT = '{"inside": {"import": 1.0, "load": 2.0}, "rss": 0.5, "peak_memory": 0.25}'


def script(code):
    return [sys.executable, "-c", code]


def test_the_time_is_up_to_the_first_line():
    looks = iter([10.0, 17.0])
    found = cold_run(script(f"print('first token'); print('''{REPORT}''')"), lambda: next(looks))
    assert found.ttft_cold == 7.0
    assert found.inside == {"start": 4.0, "import": 1.0, "load": 2.0}
    assert (found.rss, found.peak_memory) == (0.5, 0.25)


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit('no such model')",
        "import sys; print('first token'); sys.exit('no such model')",
        "import sys; sys.stderr.write('x' * 200000 + '\\nno such model\\n')",
    ],
)
def test_a_process_that_fails_says_why(code):
    with pytest.raises(UsageError, match="no such model; --no-cold"):
        cold_run(script(code))


def test_another_first_line_is_no_first_token():
    with pytest.raises(UsageError, match="said 'hello'"):
        cold_run(script("print('hello'); print('{}')"))
