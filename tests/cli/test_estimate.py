"""`mlx-vlm-edge estimate` as a user runs it: tables, JSON, one line for a mistake."""

import json
import subprocess

import pytest

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.cli import main
from mlx_vlm_edge.cli.estimate import table

from ..test_imports import HEAVY, command, modules_after, packages


def run(capsys, *arguments):
    code = main(["estimate", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_one_model_on_one_chip(capsys):
    code, out, err = run(capsys, "--model", "fastvlm-0.5b", "--chip", "m1-max")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("estimate, not measured: fastvlm-0.5b at 16 bits on M1 Max")
    assert "256 visual and 30 text tokens" in lines[1]
    cells = {line.split("  ")[0]: line.split() for line in lines}
    assert cells["vision"][1] == "486.7"
    stages = [float(cells[name][3]) for name in ("vision", "connector", "prefill")]
    assert float(cells["first token"][4]) == pytest.approx(sum(stages), abs=0.2)
    assert cells["decode, a token"][-1] == "bandwidth"
    assert "of 32 GB" in out
    assert "UNCONFIRMED" not in out
    assert max(map(len, lines)) <= 110


def test_json_has_what_the_table_has(capsys):
    arguments = ("--chip", "m5-max", "--bits", "4", "--resolution", "512", "--prompt-tokens", "100")
    code, out, _ = run(capsys, "--model", "fastvlm-7b", *arguments, "--context", "1000", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["kind"] == "estimate, not measured"
    assert (found["bits"], found["visual_tokens"], found["text_tokens"]) == (4, 64, 100)
    assert found["unconfirmed"] == ["GPU clock", "matrix units"]
    assert found["memory"]["cache"] == 1000 * 57344
    assert found["ttft_ms"] == pytest.approx(sum(stage["ms"] for stage in found["stages"]))


def test_every_kind_of_model_on_every_kind_of_chip(capsys):
    chips = ["m1", "m4-pro", "m5-max", "a17-pro"]
    models = ["fastvlm-7b", "llava-1.5-7b", "mobilevlm-1.7b", "eve-7b", "fuyu-8b", "smolvlm-256m"]
    code, out, err = run(capsys, "--model", *models, "--chip", *chips)
    assert (code, err) == (0, "")
    assert out.startswith("estimate, not measured")
    lines = out.splitlines()[2:]
    assert len(lines) == len(models) * len(chips)
    assert sum("too large for 8 GB" in line for line in lines) == 4
    assert all(("unconfirmed" in line) == ("m5-max" in line) for line in lines)


def test_several_are_a_list_in_json(capsys):
    _, out, _ = run(capsys, "--chip", "m1", "m2", "--json")
    assert [item["chip"]["id"] for item in json.loads(out)] == ["m1", "m2"]


def test_the_size_of_the_picture_counts_where_the_family_says_so(capsys):
    def tokens(*arguments):
        _, out, _ = run(capsys, "--chip", "m1", "--json", *arguments)
        return json.loads(out)["visual_tokens"]

    onevision = ("--model", "llava-onevision-0.5b", "--image-size")
    assert tokens(*onevision, "1152x1152") == 7371
    assert tokens(*onevision, "640x480") == 2929
    assert tokens("--image-size", "640x480") == 256


def test_a_folder_is_estimated_from_its_own_config(capsys, tmp_path):
    config = configs.read("smolvlm-256m")
    processor = config.pop("preprocessor_config") | {"do_image_splitting": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    code, out, _ = run(capsys, "--model", str(tmp_path), "--chip", "m1", "--json")
    assert code == 0
    assert json.loads(out)["visual_tokens"] == 64
    assert run(capsys, "--model", "demo", "--chip", "m1")[0] == 0


def test_a_hub_id_is_its_alias_where_it_is_not_downloaded(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    _, named, _ = run(capsys, "--model", "apple/FastVLM-0.5B", "--chip", "m1", "--json")
    _, alias, _ = run(capsys, "--model", "fastvlm-0.5b", "--chip", "m1", "--json")
    assert json.loads(named) == json.loads(alias) | {"model": "apple/FastVLM-0.5B"}
    code, _, err = run(capsys, "--model", "someone/else", "--chip", "m1")
    assert code == 2
    assert "someone/else is not on this machine" in err


def test_chips_have_their_sources(capsys):
    code, out, _ = run(capsys, "--chips")
    assert code == 0
    assert "m1-max" in out
    assert "unconfirmed: GPU clock, matrix units" in out
    assert "  D4167: https://github.com/ggml-org/llama.cpp/discussions/4167" in out
    listed = json.loads(run(capsys, "--chips", "--json")[1])
    assert listed["chips"]["m1-max"]["bandwidth_gbs"][0]["tag"] == "S"


def test_calibration_prints_every_row(capsys):
    code, out, _ = run(capsys, "--calibration")
    listed = json.loads(run(capsys, "--calibration", "--json")[1])
    assert code == 0
    assert len(out.splitlines()) > len(listed) > 200
    assert out.count("median error") == 9
    assert {row["table"] for row in listed} == {"paper", "mlx_lm", "llama_cpp", "m5_over_m4"}
    assert "FastVLM Qwen2-0.5B 1024 px, 256 tokens" in out


def test_without_a_chip_it_is_this_macs_or_asked_for(capsys, monkeypatch):
    done = subprocess.CompletedProcess([], 0, stdout="Apple M2 Pro\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert "on M2 Pro, 19 GPU cores" in run(capsys)[1]

    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert err == (
        "mlx-vlm-edge: error: this machine is no Mac: name a chip, --chip m1-max (see --chips)\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chip", "m1-mx"], "did you mean m1-max"),
        (["--model", "fastvlm-05b"], "did you mean fastvlm-0.5b"),
        (["--model", ""], "no model is called ''"),
        (["--model", "./nothing"], "./nothing: no such folder"),
        (["--bits", "7"], "invalid choice: 7"),
        (["--resolution", "500"], "FastViTHD takes multiples of 64"),
        (["--resolution", "0"], "FastViTHD takes multiples of 64"),
        (["--image-size", "640x"], "--image-size '640x': give pixels, as 1024 or WIDTHxHEIGHT"),
        (["--image-size", "0x5"], "--image-size '0x5': give pixels"),
        (["--prompt-tokens", "-1"], "--prompt-tokens -1: what this model puts around a question"),
        (["--prompt-tokens", "100000"], "longer than the model's context of 32,768"),
        (["--context", "0"], "--context 0: the prompt alone has 286 positions"),
        (["--context", "5"], "--context 5: the prompt alone has 286 positions"),
        (["--image-size", "99999x99999"], "would be refused"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    code, out, err = run(capsys, "--chip", "m1", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_folder_of_another_model_is_one_line(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    code, _, err = run(capsys, "--model", str(tmp_path), "--chip", "m1")
    assert code == 2
    assert "model_type 'bert' is not supported" in err


def test_nothing_heavy_is_imported():
    """The model's own code and mlx, which count; its help and its lists need neither."""
    light = {"mlx", "PIL", "numpy", "tokenizers"}
    for arguments in (["--help"], ["--chips"]):
        assert packages(modules_after(command("estimate", *arguments))) & (light | HEAVY) == set()
    loaded = modules_after(command("estimate", "--model", "fastvlm-0.5b", "--chip", "m1"))
    assert packages(loaded) & HEAVY == set()


def test_columns_of_numbers_go_to_the_right():
    assert table([["x", "n"], ["a", "1"], ["bcd", "20"]]) == "x     n\na     1\nbcd  20"


def test_fewer_visual_tokens_have_their_price(capsys):
    arguments = ("--model", "llava-1.5-7b", "--chip", "m5-max", "--json")
    whole, fewer = (
        json.loads(run(capsys, *arguments, *more)[1])
        for more in ((), ("--visual-tokens", "0.25", "--token-method", "dpp"))
    )
    assert fewer["visual_tokens"] * 4 == whole["visual_tokens"] == 576
    stages = {stage["name"]: stage for stage in fewer["stages"]}
    assert stages["reduce"]["flops"] > 0
    assert stages["reduce"]["ms"] < 0.03 * (whole["ttft_ms"] - fewer["ttft_ms"])
    assert run(capsys, *arguments, "--visual-tokens", "577")[0] == 2
