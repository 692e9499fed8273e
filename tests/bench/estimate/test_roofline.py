"""The roofline's arithmetic on a chip of round numbers, and how far it is from measured rows."""

from dataclasses import replace

import pytest
from mlx_vlm_edge_bench.estimate import calibration, chips, roofline
from mlx_vlm_edge_bench.estimate.calibration import Row, errors
from mlx_vlm_edge_bench.estimate.outlook import outlook
from mlx_vlm_edge_bench.estimate.roofline import Rates
from mlx_vlm_edge_bench.estimate.work import Work

from mlx_vlm_edge.checkpoint import configs

CHIP = chips.Chip("round", "Round", 1, 1.0, None, 100.0, (8,), None, ())  # 1 TFLOPS, 100 GB/s
FULL = Rates(at_512=0.5, rows=0, attention=0.25, bandwidth=0.5, layer_ms=0.1)


@pytest.fixture(scope="module")
def rows():
    return calibration.rows()


def test_a_stage_takes_the_longer_of_both():
    work = Work(macs=250_000_000, matrices=1000)  # 0.5 GFLOP at 0.5 TFLOPS: 1 ms
    found = roofline.stage("x", work, 10_000_000, CHIP, FULL)  # 10 MB at 50 GB/s: 0.2 ms
    assert (found.ms, found.bound, found.flops) == (pytest.approx(1.0), "compute", 500_000_000)
    found = roofline.stage("x", work, 100_000_000, CHIP, FULL)
    assert (found.ms, found.bound) == (pytest.approx(2.0), "bandwidth")
    attention = roofline.stage("x", Work(attention=250_000_000), 0, CHIP, FULL)
    assert attention.ms == pytest.approx(2.0)
    slower = roofline.stage("x", work, 0, CHIP, FULL, factor=0.5)
    assert slower.ms == pytest.approx(2.0)


def test_few_rows_reach_less_of_the_peak():
    """512 rows reach at_512, whatever `rows` is; half as many as `rows` a third of the full."""
    rates = replace(FULL, rows=64)
    per_row = 1_000_000
    full = 2 * per_row / (0.5 * (512 + 64) / 512) / 1e9  # ms of a row at the full share
    for count in (16, 32, 512):
        work = Work(macs=count * per_row, matrices=per_row)
        assert roofline.stage("x", work, 0, CHIP, rates).ms == pytest.approx((count + 64) * full)
    assert (512 + 64) * full == pytest.approx(2 * 512 * per_row / 0.5 / 1e9)


def test_matrix_units_take_the_place_of_the_peak():
    work = Work(macs=1_000_000_000)
    plain = roofline.stage("x", work, 0, CHIP, roofline.NOW).ms
    units = roofline.stage("x", work, 0, replace(CHIP, matrix=4.0), roofline.NOW).ms
    assert plain / units == pytest.approx(4 * roofline.MATRIX_AT_512 / roofline.NOW.at_512)


def test_decoding_reads_weights_and_cache_once():
    decoder = calibration.text_model("LLaMA-2-7B")
    found = roofline.decode(decoder, 100, CHIP, None, FULL)
    read = (decoder.parameters - decoder.head) * 2 + 100 * 524_288
    assert found.nbytes == read
    assert found.ms == pytest.approx(read / 50e6 + 32 * 0.1)
    assert roofline.decode(decoder, 100, CHIP, 4, FULL).nbytes < read / 3


def test_an_outlook_adds_its_stages():
    found = outlook(
        "fastvlm-0.5b", configs.read("fastvlm-0.5b"), chips.find("m1-max"), text_tokens=24
    )
    assert [stage.name for stage in found.stages] == ["vision", "connector", "prefill"]
    assert found.ttft == sum(stage.ms for stage in found.stages)
    assert found.rate == 1000 / found.step.ms
    assert found.ttft_engine == pytest.approx(
        116.3 + sum(stage.ms for stage in found.stages[1:]), rel=1e-3
    )
    assert found.as_json()["kind"] == "estimate, not measured"


def test_a_lone_patch_embedding_has_no_neural_engine():
    config = configs.read("eve-7b")
    found = outlook("eve-7b", config, chips.find("m1-max"), text_tokens=24)
    assert found.ttft_engine is None


def test_the_configs_own_bits_are_the_default():
    config = configs.read("fastvlm-0.5b")
    chip = chips.find("m1")
    quantised = {**config, "quantization": {"bits": 4, "group_size": 64}}
    assert outlook("x", config, chip, text_tokens=1).bits == 16
    assert outlook("x", quantised, chip, text_tokens=1).bits == 4
    assert outlook("x", quantised, chip, text_tokens=1, bits=8).bits == 8
    for odd in (None, {}, {"bits": "x"}, {"bits": 99}):
        assert outlook("x", {**config, "quantization": odd}, chip, text_tokens=1).bits == 16


def picked(rows, table, figure):
    return [row for row in rows if (row.table, row.figure) == (table, figure)]


# Table, figure: bounds of the median and of the worst error of what was not fitted.
BOUNDS = {
    ("paper", "vision"): (0.19, 0.19),
    ("paper", "prefill"): (0.12, 0.44),
    ("paper", "TTFT"): (0.10, 0.37),
    ("mlx_lm", "prompt"): (0.04, 0.05),
    ("mlx_lm", "generation"): (0.02, 0.08),
    ("llama_cpp", "prompt"): (0.02, 0.13),
    ("llama_cpp", "generation"): (0.04, 0.20),
    ("m5_over_m4", "TTFT"): (0.13, 0.15),
    ("m5_over_m4", "generation"): (0.04, 0.07),
}


@pytest.mark.parametrize(("table", "figure"), BOUNDS)
def test_errors_stay_inside_what_is_printed(rows, table, figure):
    middle, worst = errors(picked(rows, table, figure))
    print(f"{table} {figure}: median {middle:.1%}, worst {worst.error:+.1%} ({worst.name})")
    assert middle <= BOUNDS[table, figure][0]
    assert abs(worst.error) <= BOUNDS[table, figure][1]


def test_bounds_are_of_every_table(rows):
    assert {(row.table, row.figure) for row in rows} == set(BOUNDS)


def test_what_was_fitted_on_one_row_fits_it(rows):
    parts = [r for r in rows if r.table in ("paper", "mlx_lm") and r.fitted and r.figure != "TTFT"]
    assert len(parts) == 5
    assert max(abs(row.error) for row in parts) < 0.005


def test_medians_are_over_the_rows_they_are_said_to_be(rows):
    """The shares of llama.cpp's table that the rates are taken from."""
    prompts = [r for r in picked(rows, "llama_cpp", "prompt") if r.fitted]
    generations = [r for r in picked(rows, "llama_cpp", "generation") if r.fitted]
    assert (len(prompts), len(generations)) == (24, 48)
    for found in (prompts, generations):
        ranked = sorted(row.error for row in found)
        assert abs(ranked[len(ranked) // 2]) < 0.03


def test_every_published_row_is_there(rows):
    """25 rows of the paper's table have figures, 18 of them with an encoder that is known here."""
    assert len(picked(rows, "paper", "prefill")) == 25
    assert len(picked(rows, "paper", "TTFT")) == len(picked(rows, "paper", "vision")) == 18
    assert (
        len(
            {
                row.name.split(",")[0] + row.name.split(",")[1]
                for row in picked(rows, "llama_cpp", "prompt")
            }
        )
        == 29
    )


def test_repeated_and_fitted_figures_are_counted_once_or_not():
    fitted = Row("t", "a", "vision", "ms", 10, 10, fitted=True)
    repeated = Row("t", "b", "vision", "ms", 50, 50, times=5)
    free = [Row("t", name, "vision", "ms", 20, 30) for name in "cd"]
    other = Row("t", "e", "vision", "ms", 40, 44)
    misprint = Row("t", "f", "vision", "ms", 1, 100, note="a misprint")
    middle, worst = errors([fitted, repeated, *free, other, misprint])
    assert (middle, worst.error) == (pytest.approx(0.3), 0.5)


def test_the_papers_ratio_is_near_and_todays_is_not():
    """85x is the ratio of two estimates by the paper's rates within 20 %: 14,124 ms over 166."""
    found = {row.name: row.estimated for row in calibration.paper() if row.figure == "TTFT"}
    ratio = (
        found["LLaVA-OneVision Qwen2-0.5B 1152 px, 7290 tokens"]
        / found["FastVLM Qwen2-0.5B 1024 px, 256 tokens"]
    )
    assert ratio == pytest.approx(85, rel=0.2)
