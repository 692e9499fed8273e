"""The roofline's arithmetic on a chip of round numbers, and how far it is from measured rows."""

from dataclasses import replace

import pytest
from mlx_vlm_edge_bench.estimate import calibration, chips, roofline
from mlx_vlm_edge_bench.estimate.calibration import Row, errors
from mlx_vlm_edge_bench.estimate.costs import plan_of, prompt_cost
from mlx_vlm_edge_bench.estimate.outlook import outlook
from mlx_vlm_edge_bench.estimate.roofline import Rates

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.loading.counting import Work

CHIP = chips.Chip("round", "Round", 1, 1.0, None, 100.0, (8,), None, ())  # 1 TFLOPS, 100 GB/s
FULL = Rates(at_512=0.5, rows=0, attention=0.25, bandwidth=0.5, layer_ms=0.1)


@pytest.fixture(scope="module")
def rows():
    return calibration.rows()


def test_a_stage_takes_the_longer_of_both():
    macs, megabyte = 250_000_000, 1_000_000  # 0.5 GFLOP at 0.5 TFLOPS: 1 ms; at 50 GB/s 0.02 ms
    found = roofline.stage("x", Work(macs=macs, weights=10 * megabyte), CHIP, FULL)
    assert (found.ms, found.bound, found.flops) == (pytest.approx(1.0), "compute", 500_000_000)
    work = Work(macs=macs, weights=60 * megabyte, activations=40 * megabyte)
    found = roofline.stage("x", work, CHIP, FULL)
    assert (found.ms, found.bound) == (pytest.approx(2.0), "bandwidth")
    assert found.nbytes == 100 * megabyte
    attention = roofline.stage("x", Work(attention=macs), CHIP, FULL)
    assert attention.ms == pytest.approx(2.0)
    slower = roofline.stage("x", Work(macs=macs), CHIP, FULL, quantised=True)
    assert slower.ms == pytest.approx(1 / roofline.QUANTISED[CHIP.older])


def test_few_rows_reach_less_of_the_peak():
    """512 rows reach at_512, whatever `rows` is; half as many as `rows` a third of the full."""
    rates = replace(FULL, rows=64)
    per_row = 1_000_000
    full = 2 * per_row / (0.5 * (512 + 64) / 512) / 1e9  # ms of a row at the full share
    for count in (16, 32, 512):
        work = Work(macs=count * per_row, matrices=per_row)
        assert roofline.stage("x", work, CHIP, rates).ms == pytest.approx((count + 64) * full)
    assert (512 + 64) * full == pytest.approx(2 * 512 * per_row / 0.5 / 1e9)


def test_matrix_units_take_the_place_of_the_peak():
    work = Work(macs=1_000_000_000)
    plain = roofline.stage("x", work, CHIP).ms
    units = roofline.stage("x", work, replace(CHIP, matrix=4.0)).ms
    assert plain / units == pytest.approx(4 * roofline.MATRIX_AT_512 / roofline.NOW.at_512)


def test_decoding_reads_weights_and_cache_once():
    """Llama-2-7B by hand: all but the embedding, and keys and values of 101 positions."""
    width, inner, vocabulary, layers = 4096, 11008, 32000, 32
    matrices = layers * (4 * width**2 + 3 * width * inner) + vocabulary * width
    read = 2 * (matrices + (2 * layers + 1) * width) + 101 * 524_288
    found = calibration.decode("LLaMA-2-7B", 100, CHIP, None, FULL)
    assert found.nbytes == pytest.approx(read, rel=2e-3)  # and activations
    assert found.ms == pytest.approx(found.nbytes / 50e6 + 32 * 0.1)
    assert calibration.decode("LLaMA-2-7B", 100, CHIP, 4, FULL).nbytes < read / 3


def outlook_of(alias, chip, bits=None, **more):
    plan = plan_of(configs.read(alias), bits)
    return outlook(alias, plan, prompt_cost(plan), chips.find(chip), **more)


def test_an_outlook_adds_its_stages():
    found = outlook_of("fastvlm-0.5b", "m1-max")
    assert [stage.name for stage in found.stages] == ["vision", "connector", "prefill"]
    assert found.ttft == sum(stage.ms for stage in found.stages)
    assert found.rate == 1000 / found.step.ms
    assert found.ttft_engine == pytest.approx(
        116.3 + sum(stage.ms for stage in found.stages[1:]), rel=1e-3
    )
    assert found.as_json()["kind"] == "estimate, not measured"
    assert found.as_json()["bits"] == 16


def test_bits_are_those_of_the_layers():
    assert outlook_of("fastvlm-0.5b", "m1", 2).bits == (2,)
    faster, slower = (outlook_of("fastvlm-7b", "m1", bits).step.ms for bits in (2, 4))
    assert faster < slower


def test_a_context_below_its_own_prompt_is_refused():
    with pytest.raises(UsageError, match=r"--context 285: the prompt alone has 286 positions"):
        outlook_of("fastvlm-0.5b", "m1", context=285)
    assert outlook_of("fastvlm-0.5b", "m1", context=286).context == 286


def test_a_lone_patch_embedding_has_no_neural_engine():
    assert outlook_of("eve-7b", "m1-max").ttft_engine is None


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
    off = errors(picked(rows, table, figure))
    print(f"{table} {figure}: median {off.median:.1%}, worst {off.worst.error:+.1%}")
    assert off.median <= BOUNDS[table, figure][0]
    assert abs(off.worst.error) <= BOUNDS[table, figure][1]


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
    far = Row("t", "g", "vision", "ms", 10, 25, fitted=True)
    off = errors([fitted, repeated, *free, other, misprint, far])
    assert (off.median, off.worst.error, off.counted) == (pytest.approx(0.3), 0.5, 2)
    assert off.worst_of_all is far


def test_the_papers_ratio_is_near_and_todays_is_not():
    """85x is the ratio of two estimates by the paper's rates within 20 %: 14,124 ms over 166."""
    found = {row.name: row.estimated for row in calibration.paper() if row.figure == "TTFT"}
    ratio = (
        found["LLaVA-OneVision Qwen2-0.5B 1152 px, 7290 tokens"]
        / found["FastVLM Qwen2-0.5B 1024 px, 256 tokens"]
    )
    assert ratio == pytest.approx(85, rel=0.2)
