"""`--resolution auto` and `--ttft-budget`, from the flag to what is told."""

import json
from dataclasses import replace

import numpy as np
import pytest
from mlx_vlm_edge_bench import budget
from mlx_vlm_edge_bench.bench import cases, last, table
from mlx_vlm_edge_bench.estimate import chips
from PIL import Image

from mlx_vlm_edge import generate, load
from mlx_vlm_edge.cli import main
from mlx_vlm_edge.cli.flags import milliseconds
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.loading.load import LoadOptions

from ..demo import SIDE, VISUAL
from ..picture.test_detail import page


@pytest.fixture
def pictures(tmp_path):
    page(16).save(tmp_path / "page.png")
    Image.new("RGB", (1600, 1200), "red").save(tmp_path / "plain.png")
    return tmp_path


@pytest.fixture
def ask(capfd):
    def run(*arguments):
        code = main(["generate", "--model", "demo", "-p", "What?", "--max-tokens", "1", *arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_every_picture_has_its_own_size_and_it_is_told(ask, pictures):
    images = ["--image", str(pictures / "page.png"), str(pictures / "plain.png")]
    code, out, err = ask("--resolution", "auto", "--json", *images)
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert told["picture_sizes"] == [[SIDE, SIDE], [128, 128]]
    assert told["visual_tokens"] == VISUAL + 4
    _, out, err = ask("--resolution", "auto", "--verbose", *images)
    assert f"images as the model sees them: {SIDE} x {SIDE}, 128 x 128" in err


def test_in_python_and_within_a_limit():
    model, processor = load("demo", resolution="auto", max_resolution=128)
    image = np.asarray(page(16))
    whole = generate(model, processor, "What?", [image], max_tokens=1, full=True)
    assert whole.picture_sizes == ((128, 128),)
    for options, message in (
        ({"resolution": "large"}, "pixels or auto, not 'large'"),
        ({"max_resolution": 64}, "max_resolution limits resolution auto"),
        ({"resolution": "auto", "max_resolution": "512"}, "max_resolution must be a whole number"),
        ({"resolution": "auto", "max_resolution": 0}, "max_resolution must be a whole number"),
        ({"resolution": "auto", "max_resolution": 127}, "the smallest size is 128 pixels"),
        ({"resolution": "auto", "vision_backend": "coreml"}, "a Core ML package has one size"),
    ):
        with pytest.raises(UsageError, match=message):
            load("demo", **options)


def test_other_families_have_no_auto(models_folder):
    with pytest.raises(UsageError, match="resolution auto: FastVLM alone has it"):
        load(str(models_folder), resolution="auto")


@pytest.fixture(scope="module")
def models_folder():
    from ..conftest import GOLDEN

    return GOLDEN.parent / "mobilevlm_v2"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ttft-budget", "200ms"], "--ttft-budget chooses among sizes"),
        (["--resolution", "512", "--ttft-budget", "200ms"], "--ttft-budget chooses among sizes"),
        (["--resolution", "auto", "--ttft-budget", "soon"], "give a time, as 200ms"),
        (["--resolution", "auto", "--ttft-budget", "0ms"], "give a time, as 200ms"),
    ],
)
def test_a_mistake_is_one_line(ask, pictures, flags, message):
    code, out, err = ask("--image", str(pictures / "plain.png"), *flags)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_size_that_is_none_is_the_parsers_to_refuse(ask, pictures):
    code, _, err = ask("--image", str(pictures / "plain.png"), "--resolution", "large")
    assert code == 2
    assert "invalid value 'large': pixels or auto" in err


def test_times_are_read():
    assert milliseconds("200ms") == milliseconds("200") == milliseconds("0.2s") == 200


@pytest.fixture
def bench_file(tmp_path, monkeypatch):
    monkeypatch.setenv(last.VARIABLE, str(tmp_path / "deep" / "bench.json"))
    return tmp_path / "deep" / "bench.json"


def case(**stages):
    figures = {f"stage: {name}": {"median": value} for name, value in stages.items()}
    whole = {"ttft_e2e": {"median": sum(stages.values()) + 0.05}}
    return {"model": "fastvlm-0.5b", "bits": None, "resolution": None, "figures": figures | whole}


def test_the_last_bench_decides(bench_file):
    """The tower's and the prefill's seconds go with their operations; the rest stays."""
    options = LoadOptions(resolution="auto")
    last.remember(case(vision=0.8, prefill=0.15), None)
    assert last.recall("fastvlm-0.5b", None, None) == last.Measured(
        None, 0.8, 0.15, pytest.approx(0.05)
    )
    assert budget.largest_within("fastvlm-0.5b", options, 1001)[0] == 1024
    side, told = budget.largest_within("fastvlm-0.5b", options, 400)
    assert side == 512  # a quarter of the tower's 800 ms, and of the prompt's tokens more
    assert told.startswith("up to 512 px, about ")
    assert "by the last bench of fastvlm-0.5b at 1024 px" in told
    with pytest.raises(UsageError, match=r"--ttft-budget 90ms: even 256 px would take about 1\d\d"):
        budget.largest_within("fastvlm-0.5b", options, 90)


def test_fewer_visual_tokens_leave_room_for_a_larger_size(bench_file):
    """A bench has all of them; sizes that have not as many as are asked for are left out."""
    last.remember(case(vision=0.2, prefill=0.8), None)
    whole = LoadOptions(resolution="auto")
    assert budget.largest_within("fastvlm-0.5b", whole, 700)[0] == 768
    few = replace(whole, visual_tokens=64, token_method="pool")
    assert budget.largest_within("fastvlm-0.5b", few, 700)[0] == 1024
    with pytest.raises(UsageError, match="even 512 px would take"):
        budget.largest_within("fastvlm-0.5b", few, 60)
    with pytest.raises(UsageError, match="the picture has 256 and no more"):
        budget.largest_within("fastvlm-0.5b", replace(whole, visual_tokens=257), 700)


def test_without_a_bench_it_is_the_estimate_of_a_mac(bench_file, monkeypatch):
    options = LoadOptions(resolution="auto")
    monkeypatch.setattr(chips, "own", lambda: chips.find("m1-max"))
    assert "an estimate for M1 Max" in budget.largest_within("fastvlm-0.5b", options, 5000)[1]

    def unknown():
        raise UsageError("no Mac")

    monkeypatch.setattr(chips, "own", unknown)
    with pytest.raises(UsageError, match="bench --model fastvlm-0"):
        budget.largest_within("fastvlm-0.5b", options, 200)


def test_a_bench_that_cannot_be_read_is_none(bench_file):
    bench_file.parent.mkdir()
    sound = {"resolution": None, "vision": 0.8, "prefill": 1, "rest": 0.0}
    damaged: list[object] = [{"old": 1}, [1], "x", None]
    for key in sound:
        damaged += [sound | {key: value} for value in ("1", True, [], -1, float("nan"))]
    for entry in damaged:
        bench_file.write_text(json.dumps({"fastvlm-0.5b as it is as it is": entry}))
        assert last.recall("fastvlm-0.5b", None, None) is None
    for content in ("", "[]"):
        bench_file.write_text(content)
        assert last.recall("fastvlm-0.5b", None, None) is None
    bench_file.write_text(json.dumps({"fastvlm-0.5b as it is as it is": sound}))
    assert last.recall("fastvlm-0.5b", None, None) == last.Measured(**sound)


@pytest.mark.parametrize(
    ("flags", "usual"),
    [
        ([], True),
        (["--resolution", "64", "--max-tokens", "3"], True),
        (["--prompt-tokens", "64"], False),
        (["--image", "page.png"], False),
        (["--vision-backend", "coreml"], False),
    ],
)
def test_only_a_usual_bench_is_remembered(pictures, flags, usual, monkeypatch, capfd):
    remembered = []
    one = {"model": "demo"}
    monkeypatch.chdir(pictures)
    monkeypatch.setattr(cases, "check", lambda _: None)
    monkeypatch.setattr(cases, "run", lambda *_: [one])
    monkeypatch.setattr(table, "case", lambda *_: "")
    monkeypatch.setattr(last, "remember", lambda case, _: remembered.append(case))
    assert main(["bench", "--model", "demo", *flags]) == 0
    assert remembered == ([one] if usual else [])


def test_bench_leaves_what_the_budget_takes(bench_file, ask, pictures, capfd):
    arguments = ["--model", "demo", "--runs", "1", "--max-tokens", "1", "--no-cold"]
    assert main(["bench", *arguments]) == 0
    capfd.readouterr()
    flags = ["--resolution", "auto", "--ttft-budget", "60s", "--json"]
    code, out, err = ask("--image", str(pictures / "page.png"), *flags)
    assert code == 0
    assert json.loads(out)["picture_sizes"] == [[SIDE, SIDE]]
    assert err.startswith(f"note: up to {SIDE} px")
