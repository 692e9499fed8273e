"""`doctor --model`: a published model is pulled, checked and asked; its report has no paths."""

import io
import json
from pathlib import Path

import pytest

from mlx_vlm_edge.cli import main
from mlx_vlm_edge.doctor import published

from ..hub.test_models import cache, online  # noqa: F401  (fixtures)
from ..reference import tokenizer


@pytest.fixture
def hub(online, golden, tmp_path, monkeypatch):  # noqa: F811
    """A stand-in for the Hub that has the golden model in Apple's layout."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(folder)
    weights = (golden / "model_apple_llava.safetensors").read_bytes()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["config.json"] = (golden / "config_apple_llava.json").read_bytes()
    online.large = {"model.safetensors": weights}
    online.files = files | online.large
    monkeypatch.chdir(tmp_path)
    return online


def test_a_report(hub, capsys, tmp_path):
    assert main(["doctor", "--model", "fastvlm-0.5b", "--yes"]) == 0
    shown = capsys.readouterr()
    assert "fastvlm-0.5b: " in shown.out
    assert shown.out.count("first token after") == 3
    text = (tmp_path / "report-fastvlm-0.5b.json").read_text()
    told = json.loads(text)
    assert told["problems"] == []
    assert told["commit"] == "0123456789abcdef0123456789abcdef01234567"
    assert told["files held to the Hub's hashes"] == len(hub.files)
    assert [row["ttft_e2e"] > 0 for row in told["answers"]] == [True] * 3
    assert told["weights"] > 50
    assert str(tmp_path) not in text
    sent = len(hub.sent)
    assert main(["doctor", "--model", "fastvlm-0.5b", "--json", "--report", "again.json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights_sha256"] == told["weights_sha256"]
    assert len(hub.sent) == sent, "what is here is not fetched again, nor asked about"


def test_it_asks_before_it_fetches(hub, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert main(["doctor", "--model", "fastvlm-0.5b"]) == 2
    said = capsys.readouterr().err
    assert "pull apple/FastVLM-0.5B (2 MB, licence apple-amlr)? [y/N]" in said
    assert hub.sent == []
    assert not Path("report-fastvlm-0.5b.json").exists()


def test_a_changed_file_is_reported_and_nothing_is_loaded(hub, capsys, tmp_path, monkeypatch):
    assert main(["doctor", "--model", "fastvlm-0.5b", "--yes"]) == 0
    monkeypatch.setattr(published, "load", None)
    weights = next((tmp_path / "hub").glob("*/snapshots/*/model.safetensors")).resolve()
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\0\0\0\0")
    assert main(["doctor", "--model", "fastvlm-0.5b"]) == 1
    told = json.loads(Path("report-fastvlm-0.5b.json").read_text())
    assert told["problems"] == ["model.safetensors: not the bytes of the Hub"]
    assert "WRONG model.safetensors" in capsys.readouterr().out


def test_a_weight_that_nothing_takes_is_a_problem(hub, capsys):
    config = json.loads(hub.files["config.json"])
    config["num_hidden_layers"] -= 1
    hub.files["config.json"] = json.dumps(config).encode()
    assert main(["doctor", "--model", "fastvlm-0.5b", "--yes"]) == 1
    assert "WRONG " in capsys.readouterr().out


def test_where_the_report_goes_is_checked_before_anything_is_fetched(hub, capsys):
    arguments = ["doctor", "--model", "fastvlm-0.5b", "--yes"]
    assert main([*arguments, "--report", "no/such/folder.json"]) == 2
    assert "--report names another file" in capsys.readouterr().err
    assert hub.sent == []


def test_texts_lose_what_is_personal(monkeypatch):
    monkeypatch.setattr(published, "_user", lambda: "ada")
    monkeypatch.setattr(published.platform, "node", lambda: "adas-mac.local")
    monkeypatch.setenv("HOME", "/Users/ada")
    told = published.without_paths(
        {"a": ["/Users/ada/models/x: damaged", "on adas-mac.local", 3], "b": "Adam, /tmp/ada/y"}
    )
    assert told == {"a": ["~/models/x: damaged", "on ...", 3], "b": "Adam, /tmp/.../y"}
