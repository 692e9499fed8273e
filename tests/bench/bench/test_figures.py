"""The arithmetic of every figure, on runs with known times."""

import pytest
from mlx_vlm_edge_bench.bench.figures import (
    ColdRun,
    Figure,
    PlainRun,
    Runs,
    StagedRun,
    added,
    doubts,
    figures,
    ratio,
    unaccounted,
)

AB = ("A", "B")


def staged(vision=0.2, prefill=0.3, rest=0.1, total=None):
    stages = {"image decode": rest, "vision": vision, "connector": 0.05, "prefill": prefill}
    return StagedRun(stages, sum(stages.values()) if total is None else total)


def plain(ttft_e2e, decode_tps=10.0, generated=8):
    return PlainRun(ttft_e2e, decode_tps, 100, 64, generated, 1.5)


def test_a_figure_has_the_median_the_minimum_and_the_spread():
    figure = Figure((3.0, 2.0, 2.5, 4.0), first=9.0)
    assert (figure.median, figure.minimum, figure.spread) == (2.75, 2.0, 1.0)
    assert figure.scaled(1000) == Figure((3000, 2000, 2500, 4000), 9000)
    assert figure.record() == {
        "median": 2.75, "min": 2.0, "max": 4.0, "spread": 1.0, "first": 9.0,
        "values": [3.0, 2.0, 2.5, 4.0],
    }  # fmt: skip


def test_a_median_that_would_mislead_is_doubted():
    """Runs that spread too far; a part that came out above its whole."""
    steady = {"ttft": Figure((2.0, 2.1)), "ttft_e2e": Figure((2.2, 2.3)), "rss": Figure((1.0,))}
    assert doubts(steady) == {}
    wide = doubts(steady | {"ttft": Figure((2.0, 2.6))})
    assert list(wide) == ["ttft", "ttft_e2e"]
    assert wide["ttft"] == "its runs spread by 30%, more than 25%"
    above = doubts(steady | {"ttft": Figure((2.4, 2.5))})
    assert above == dict.fromkeys(
        ("ttft", "ttft_e2e"), "ttft, a part of ttft_e2e, came out above it"
    )


def test_one_run_has_no_spread():
    assert Figure((3.0,)).spread is None


def test_sums_go_run_by_run():
    total = added([Figure((1.0, 5.0), 9.0), Figure((5.0, 1.0), 1.0)])
    assert total == Figure((6.0, 6.0), 10.0)
    assert added([Figure((1.0,), 2.0), Figure((1.0,))]).first is None


def test_a_ratio_is_of_medians():
    assert ratio(Figure((6.0, 6.2, 6.1)), Figure((2.0, 2.1, 2.0)), AB).value == pytest.approx(3.05)


@pytest.mark.parametrize(
    ("over", "under", "said"),
    [
        ((1.0, 1.26), (1.0, 1.0), "the runs of A spread by 26%"),
        ((1.0, 1.0), (1.0, 2.0), "the runs of B spread by 100%"),
        ((1.0,), (1.0, 1.0), "A was run once"),
    ],
)
def test_a_ratio_is_refused_when_a_side_spreads(over, under, said):
    found = ratio(Figure(over), Figure(under), AB)
    assert found.value is None
    assert said in found.refusal


def test_a_quarter_of_spread_is_still_a_ratio():
    assert ratio(Figure((1.0, 1.25)), Figure((1.0, 1.0)), AB).value == 1.125


def test_ttft_is_vision_and_prefill_and_nothing_else():
    assert staged(vision=0.2, prefill=0.3, rest=7.0).ttft == 0.5
    assert StagedRun({"prefill": 0.3, "tokenise": 1.0}, 1.3).ttft == 0.3  # no vision encoder


def test_what_the_stages_leave_out_is_a_share_of_the_total():
    assert staged().unaccounted == 0
    runs = [staged(), StagedRun({"prefill": 0.9}, 1.0), StagedRun({"prefill": 1.02}, 1.0)]
    assert unaccounted(runs) == pytest.approx(0.1)


def test_figures_leave_the_warm_up_out_and_keep_it():
    runs = Runs(
        [staged(9.0), staged(0.2), staged(0.4)],
        [plain(9.0), plain(0.5, 10.0), plain(1.0, 20.0)],
        [ColdRun(8.0, {"load": 5.0}, 2.0, 1.0), ColdRun(3.0, {"load": 1.0}, 2.5, 1.0)],
    )
    found = figures(runs)
    assert found["ttft"].values == pytest.approx((0.5, 0.7))
    assert found["ttft"].first == pytest.approx(9.3)
    assert found["ttft_e2e"] == Figure((0.5, 1.0), 9.0)
    assert found["ttft_cold"] == Figure((3.0,), 8.0)
    assert found["cold: load"] == Figure((1.0,), 5.0)
    assert found["rss"] == Figure((2.5,), 2.0)
    assert found["stage: vision"] == Figure((0.2, 0.4), 9.0)
    assert found["staged total"].values == pytest.approx((0.65, 0.85))
    assert found["prompt_tps"].values == (200, 100)
    assert found["prefill_tps"].values == pytest.approx((100 / 0.3, 100 / 0.3))
    assert found["decode_tps"] == Figure((10.0, 20.0), 10.0)
    assert found["peak_memory"].median == 1.5


def test_no_decode_rate_of_a_single_token_and_no_cold_figures_without_cold_runs():
    found = figures(Runs([staged(), staged()], [plain(1.0, 0.0, 1), plain(1.0, 0.0, 1)]))
    assert "decode_tps" not in found
    assert "ttft_cold" not in found
    assert "rss" not in found
