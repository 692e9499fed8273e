"""docs/server.md: its examples run against the demo model, and its limits are the real ones."""

import re
import shlex
import subprocess

import pytest

from mlx_vlm_edge.server.limits import Limits
from mlx_vlm_edge.server.requests import ChatRequest, CompletionRequest

from ..demo import IMAGES, ROOT

TEXT = (ROOT / "docs" / "server.md").read_text()
ADDRESS = "http://127.0.0.1:8080"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_the_python_runs(address, tmp_path, monkeypatch, capsys):
    pytest.importorskip("openai", reason="the client is not installed")
    (tmp_path / "photo.jpg").write_bytes((IMAGES / "shapes.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(code.replace(ADDRESS, address), {})
    assert capsys.readouterr().out.strip()


def test_the_curl_command_is_answered(address):
    (command,) = [text for text in blocks("bash") if text.startswith("curl")]
    arguments = shlex.split(command.replace(ADDRESS, address))
    done = subprocess.run(
        [*arguments, "--silent", "--fail", "--noproxy", "*"], capture_output=True, check=False
    )
    assert b'"chat.completion"' in done.stdout, done.stderr


def test_every_field_is_named():
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields} - {"stream_options"}
    assert [name for name in sorted(fields) if f"`{name}`" not in TEXT] == []


def test_every_address_is_named(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert [path for path in paths if path not in TEXT] == []


def test_the_limits_are_the_real_ones():
    rows = dict(re.findall(r"^\| `--max-([\w-]+)` \| ([\d,]+)", TEXT, re.MULTILINE))
    values = {name.replace("-", "_"): int(value.replace(",", "")) for name, value in rows.items()}
    values["body_bytes"] *= 2**20
    assert values == {name: getattr(Limits(), name) for name in values}
    assert set(values) == {name for name, kind in Limits.__annotations__.items() if kind is int}
