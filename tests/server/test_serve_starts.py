"""What `mlx-vlm-edge serve` refuses before it loads or listens: origins, addresses,
adapters, sizes."""

import pytest

from mlx_vlm_edge.cli import main
from mlx_vlm_edge.cli.serve import _host_as_sent, _origin_as_sent

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
        (("--cors-origin", "https://Example.org"), "in lower case"),
        (("--cors-origin", "http://example.org:80"), "the usual port"),
        (("--cors-origin", "https://[x"), "write it as browsers send it"),
        (("--allow-host", "https://name"), "--allow-host https://name: give the name alone"),
        (("--allow-host", "name:8080"), "without http://, port or path"),
        (("--allow-host", "[::1]:8080"), "without http://, port or path"),
        (("--allow-host", "name/v1"), "without http://, port or path"),
        (("--allow-host", "*"), "as browsers send it"),
        (("--allow-host", ""), "such as vlm.example.org or ::1"),
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


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("VLM.example.org", "vlm.example.org"),
        ("under_score.local.", "under_score.local."),
        ("10.0.0.7", "10.0.0.7"),
        ("::1", "[::1]"),
        ("[FE80:0::1]", "[fe80::1]"),
        ("fe80::1%eth0", "[fe80::1]"),
    ],
)
def test_hosts_are_compared_as_clients_send_them(name, sent):
    assert _host_as_sent(name) == sent


@pytest.mark.parametrize(
    "origin",
    ["https://example.org", "http://localhost:3000", "http://[::1]:8080", "http://10.0.0.7"],
)
def test_origins_that_browsers_send_are_taken(origin):
    assert _origin_as_sent(origin) == origin
