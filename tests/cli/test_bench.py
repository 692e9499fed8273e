"""`bench` as a user runs it, on the demo model."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import count

import pytest
from mlx_vlm_edge_bench.bench import cases, energy, table
from mlx_vlm_edge_bench.bench.saved import writable

from mlx_vlm_edge.cli import main
from mlx_vlm_edge.errors import UsageError

QUICK = ["bench", "--model", "demo", "--runs", "1", "--max-tokens", "3"]


@pytest.fixture
def clean(monkeypatch):
    monkeypatch.delenv("MLX_VLM_EDGE_MODEL", raising=False)
    monkeypatch.setenv("COLUMNS", "80")


def refused(capsys, *arguments):
    assert main(["bench", *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    lines = told.err.strip().splitlines()
    assert len(lines) == 1, told.err
    return lines[0]


@pytest.mark.parametrize("flag", [["--json"], ["--json", "-"]])
def test_json_without_a_file_is_all_of_standard_output(flag, capsys, tmp_path, clean, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK, "--resolution", "128", "--no-cold", *flag]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["cases"][0]["resolution"] == 128
    assert "ttft_e2e" in told.err
    assert list(tmp_path.iterdir()) == []


def test_a_case_is_printed_and_saved(capsys, tmp_path, clean):
    path = tmp_path / "out.json"
    assert main([*QUICK, "--resolution", "128", "192", "--no-cold", "--json", str(path)]) == 0
    told = capsys.readouterr()
    for name in ("ttft ", "ttft_e2e", "image decode", "preprocess", "tokenise", "vision",
                 "connector", "prefill", "first sample", "decode", "x first"):  # fmt: skip
        assert name in told.out
    assert "run 1 of 1" in told.err
    assert max(map(len, told.out.splitlines())) <= 80
    record = json.loads(path.read_text())
    assert [case["resolution"] for case in record["cases"]] == [128, 192]
    first = record["cases"][0]
    assert first["visual_tokens"] == 4
    assert first["generated"] == 3
    assert first["stages_add_up"]
    assert first["figures"]["ttft"]["median"] < first["figures"]["staged total"]["median"]
    assert "interrupted" not in record
    assert record["machine"]["blas"]
    assert os.listdir(tmp_path) == ["out.json"]


def test_a_fresh_process_is_timed_from_its_start(capsys, tmp_path, clean):
    path = tmp_path / "out.json"
    assert main([*QUICK, "--random-weights", "--bits", "8", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())["cases"][0]["figures"]
    inside = [
        figures[f"cold: {name}"]["values"][0] for name in ("start", "import", "load", "answer")
    ]
    assert all(seconds > 0 for seconds in inside)
    assert sum(inside) == pytest.approx(figures["ttft_cold"]["values"][0])
    assert figures["rss"]["median"] > 0.01
    out = capsys.readouterr().out
    assert "random weights" in out
    assert "first answer" in out


def test_prompt_tokens_are_exact(capsys, tmp_path, clean):
    path = tmp_path / "out.json"
    assert main([*QUICK, "--no-cold", "--prompt-tokens", "64", "--json", str(path)]) == 0
    case = json.loads(path.read_text())["cases"][0]
    assert case["prompt_tokens"] - case["visual_tokens"] == 64


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "fastvlm-0.5"], "did you mean fastvlm-0.5b"),
        (["--model", "fastvlm-0.5", "--random-weights"], "did you mean fastvlm-0.5b"),
        (["--model", "demo", "--resolution", "100"], "demo: image size 100"),
        (["--model", "fastvlm-0.5b", "--random-weights", "--resolution", "256", "500"], "500"),
        (["--model", "demo", "--runs", "0"], "--runs must be 1 or more"),
        (["--model", "demo", "--max-tokens", "0"], "--max-tokens must be 1 or more"),
        (["--model", "demo", "--bits", "3"], "--bits"),
        (["--model", "demo", "--image", "/no/such.png"], "--image /no/such.png"),
        (["--model", "demo", "--json", "/no/such/folder/x.json"], "--json /no/such/folder"),
        (["--model", "demo", "--json", "/"], "is a folder"),
        (["--claims", "no-such-claim"], "no claim is called 'no-such-claim'"),
        (["--claims", "--model", "demo"], "--model is not for --claims"),
        (["--claims", "--vision-backend", "coreml"], "--vision-backend is not for --claims"),
        (["--claims", "--max-tokens", "32"], "--max-tokens is not for --claims"),
        (["--claims", "--prompt-tokens", "0"], "--prompt-tokens is not for --claims"),
        (["--model", "demo", "--in-parts"], "--in-parts is for --claims"),
        (["--claims", "--runs", "0"], "--runs must be 1 or more"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(capsys, clean, monkeypatch, arguments, said):
    monkeypatch.setattr(cases, "run", lambda *given: pytest.fail("was run"))
    assert said in refused(capsys, *arguments)


def test_random_weights_that_will_not_fit_are_refused(capsys, clean, monkeypatch):
    monkeypatch.setattr(cases.memory, "free_memory", lambda: 1_000_000_000)
    assert main(["bench", "--model", "fastvlm-0.5b", "--random-weights"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "fastvlm-0.5b would take" in line
    assert "1.00 GB are there" in line


def test_energy_that_cannot_be_measured_is_one_line(capsys, clean, monkeypatch):
    monkeypatch.setattr(energy, "unavailable", lambda: energy.ONLY_MACOS)
    assert main([*QUICK, "--no-cold", "--energy"]) == 0
    assert capsys.readouterr().out.count("energy:") == 1


def test_energy_that_was_not_measured_costs_no_case(capsys, clean, monkeypatch, tmp_path):
    def failed(*_):
        raise energy.NotMeasuredError(energy.NOT_ENDED)

    monkeypatch.setattr(energy, "unavailable", lambda: "")
    monkeypatch.setattr(energy, "measure", failed)
    path = tmp_path / "out.json"
    assert main([*QUICK, "--no-cold", "--energy", "--json", str(path)]) == 0
    assert "energy: not measured: powermetrics" in capsys.readouterr().out
    (case,) = json.loads(path.read_text())["cases"]
    assert (case["energy"], case["energy_note"]) == (None, energy.NOT_ENDED)


@pytest.mark.parametrize(
    ("owner", "measures", "results", "flags"),
    [
        ("mlx_vlm_edge_bench.bench.cases", "_case", "cases", ["--resolution", "128", "192"]),
        ("mlx_vlm_edge_bench.curve.run", "_point", "points", ["--visual-tokens", "2"]),
        ("mlx_vlm_edge_bench.claims.run", "run", "claims", []),
    ],
)
def test_an_error_after_the_first_result_leaves_it(
    owner, measures, results, flags, capsys, clean, monkeypatch, tmp_path
):
    module = importlib.import_module(owner)
    once, calls = getattr(module, measures), count()

    def second_fails(*given):
        if next(calls):
            raise UsageError("out of luck")
        return once(*given)

    monkeypatch.setattr(module, measures, second_fails)
    monkeypatch.setattr("mlx_vlm_edge_bench.curve.questions.available", lambda: False)
    path = tmp_path / "out.json"
    asked = {
        "cases": [*QUICK, "--no-cold"],
        "points": ["bench", "--model", "demo", "--runs", "1"],
        "claims": ["bench", "--claims", "tokens-fastvlm-1024", "params-ldpv2"],
    }[results]
    assert main([*asked, *flags, "--json", str(path)]) == 2
    record = json.loads(path.read_text())
    assert len(record[results]) == 1
    assert record["interrupted"]
    assert capsys.readouterr().err.strip().endswith("error: out of luck")


def test_ctrl_c_ends_with_one_line_and_what_there_is(tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "mlx_vlm_edge", *QUICK, "--no-cold", "--max-tokens", "50"]
    command += ["--resolution", "128", *["1024"] * 30, "--json", str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        for line in running.stdout:
            if "peak memory" in line:
                break
        time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in told
    assert "of 31 cases measured" in told.strip().splitlines()[-1]
    assert json.loads(path.read_text())["interrupted"]
    assert os.listdir(tmp_path) == ["out.json"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), writable(str(path)):
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.json"]
    with writable(str(path)) as save:
        save({"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(UsageError, match="cannot be written"), writable(str(tmp_path / "x" / "y")):
        pytest.fail("was let in")


@pytest.mark.parametrize("arguments", [["bench", "--help"], ["bench", "--claims", "list"]])
def test_help_and_the_list_load_no_mlx(arguments):
    code = (
        f"import sys; from mlx_vlm_edge.cli import main\ntry: main({arguments})\n"
        "except SystemExit: pass\nassert not {'mlx', 'numpy', 'PIL'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_generate_does_not_import_the_benchmark():
    code = (
        "import sys, mlx_vlm_edge.generation.loop, mlx_vlm_edge.loading.load\n"
        "assert not [name for name in sys.modules if 'edge.bench' in name or 'estimate' in name]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def a_record(**more):
    def figure(*values):
        return {"values": list(values), "first": 9.0, "median": values[0]}

    return {
        "model": "fastvlm-0.5b", "resolution": 1024, "bits": None, "dtype": "float32",
        "weights": "random weights", "prompt_tokens": 300, "visual_tokens": 256, "generated": 8,
        "runs": 3, "cold_runs": 0, "unaccounted": 0.01, "stages_add_up": True, "energy": None,
        "figures": {
            "ttft": figure(1.0, 1.1, 1.0), "ttft_e2e": figure(1.2, 1.2, 1.3),
            "stage: vision": figure(0.8, 0.8, 0.8), "stage: prefill": figure(0.2, 0.2, 0.2),
            "staged total": figure(1.2, 1.2, 1.2), "decode_tps": figure(10.0, 11.0, 10.5),
        },
    } | more  # fmt: skip


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_tables_fit_the_terminal(width):
    text = table.case(a_record(), width) + "\n" + table.notes(width)
    assert max(map(len, text.splitlines())) <= max(width, 51)
    assert "1,000.0 ms" in text


def test_stages_that_do_not_add_up_are_flagged():
    assert "WARNING" not in table.case(a_record())
    text = table.case(a_record(unaccounted=0.08, stages_add_up=False))
    assert "WARNING: the stages leave out 8.0% of a run" in text


def test_figures_that_would_mislead_are_flagged():
    wide = a_record()
    wide["figures"]["ttft"] = {"values": [1.0, 1.4, 1.3], "first": 9.0, "median": 1.3}
    text = " ".join(table.case(wide, 60).split())
    assert "WARNING: ttft: its runs spread by 40%, more than 25%: repeat on a quiet" in text
    assert "WARNING: ttft_e2e: ttft, a part of ttft_e2e, came out above it" in text


def test_a_summary_refuses_a_ratio_of_spread_runs():
    wide = a_record(resolution=256)
    wide["figures"]["ttft_e2e"] = {"values": [0.3, 0.6, 0.6], "first": 1.0, "median": 0.6}
    text = table.summary([a_record(), wide, a_record(resolution=512)])
    assert text.count("no ratio") == 1
    assert "spread by 100%" in text
    assert text.splitlines()[1].endswith("1.00")
    assert text.splitlines()[2].endswith("-")


def test_counted_claims_are_printed_and_saved(capsys, tmp_path, clean):
    path = tmp_path / "out.json"
    names = ["tokens-fastvlm-1024", "params-ldpv2", "encoder-ratio-vitamin-224"]
    assert main(["bench", "--claims", *names, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "256 tokens" in out
    assert "counts, 2: 2 reproduced\n" in out
    assert out.strip().endswith("timings, 1: 1 not runnable here")
    assert max(map(len, out.splitlines())) <= 80
    record = json.loads(path.read_text())
    assert [claim["verdict"] for claim in record["claims"]].count("reproduced") == 2
    assert record["machine"]["mlx_vlm_edge"]


def test_ctrl_c_in_claims_ends_with_one_line(capsys, tmp_path, clean, monkeypatch):
    from mlx_vlm_edge_bench.claims import run as claim_run

    whole = claim_run.run

    def pressed(claim, *given):
        if claim.id == "params-ldpv2":
            raise KeyboardInterrupt
        return whole(claim, *given)

    monkeypatch.setattr(claim_run, "run", pressed)
    path = tmp_path / "out.json"
    names = ["tokens-fastvlm-1024", "params-ldpv2"]
    assert main(["bench", "--claims", *names, "--json", str(path)]) == 130
    assert capsys.readouterr().err.strip().endswith("stopped: 1 of 2 claims run")
    assert json.loads(path.read_text())["interrupted"]


def test_a_device_or_pipe_is_not_replaced_by_the_record(tmp_path, capsys):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert main(["bench", "--model", "demo", "--json", str(pipe), "--image", "/nowhere"]) == 2
    error = capsys.readouterr().err
    assert "no regular file" in error
    assert error.count("\n") == 1
    assert pipe.is_fifo()
