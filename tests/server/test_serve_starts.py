"""What `mlx-vlm-edge serve` refuses before it loads or listens: origins, addresses,
adapters, sizes."""

import pytest

from mlx_vlm_edge.cli import main

pytest.importorskip("uvicorn")


def refused(capsys, *flags):
    assert main(["serve", "--port", "0", *flags]) == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ("--cors-origin", "example.org"),
            "--cors-origin example.org: write it as browsers send it",
        ),
        (("--cors-origin", "https://example.org/"), "without a path"),
        (("--host", "300.1.1.1", "--api-key", "x"), "choose another --host or --port"),
        (("--adapter", "a=one", "--adapter", "a=two"), "two are named a"),
        (("--adapter", "a=one:2000"), "scale 2000.0 is no number from -1000 to 1000"),
        (("--adapter", "a=nowhere"), "adapter nowhere: no such folder"),
        (("--adapter", "nowhere"), "adapter nowhere: no such folder"),
        (("--adapter", "a:b=nowhere"), "--adapter a:b=nowhere: give NAME=DIR, with a name of"),
        (("--adapter", "a="), "--adapter a=: give NAME=DIR"),
        (("--max-memory", "much"), "'much' is no size of memory"),
        (("--visual-tokens", "many"), "visual tokens 'many': give a number"),
    ],
)
def test_what_can_never_work_is_refused_at_once(capsys, flags, told):
    (line,) = refused(capsys, "-m", "demo", *flags)
    assert told in line
