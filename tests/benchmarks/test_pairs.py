"""The arithmetic of the comparison, on values that are given."""

import pytest
from pairs import Pairs, best_attempt, ratio, spread, verdict

EVEN = Pairs([1.0, 1.1, 1.05], [4.0, 4.2, 4.4])
WILD = Pairs([1.0, 2.0, 3.0], [4.0, 4.2, 4.4])


def test_spread_is_of_the_fastest_three_quarters():
    assert spread([10, 11, 12, 30]) == pytest.approx(0.2)
    assert spread([10, 14, 15, 30]) == pytest.approx(0.5)
    assert spread([30, 12, 11, 10]) == spread([10, 11, 12, 30])
    assert spread([7]) == 0


def test_ratios_of_the_minima_and_of_the_pairs():
    found = EVEN.record()
    assert found["ratio_of_minima"] == pytest.approx(4.0)
    assert found["pair_ratios"] == pytest.approx([4.0, 4.2 / 1.1, 4.4 / 1.05])
    assert found["median_pair_ratio"] == pytest.approx(4.0)
    assert found["ours"]["median"] == pytest.approx(1.05)
    assert found["peer"] == {
        "min": 4.0, "median": 4.2, "max": 4.4, "spread": pytest.approx(0.1),
        "values": [4.0, 4.2, 4.4],
    }  # fmt: skip


def test_a_target_is_met_when_both_ratios_reach_it():
    assert verdict([EVEN], 4.0)["met"] is True
    slower_pairs = Pairs([1.0, 1.2, 1.2, 1.2], [4.0, 4.0, 4.0, 4.0])
    assert slower_pairs.record()["ratio_of_minima"] == 4.0
    assert verdict([slower_pairs], 4.0)["met"] is False
    assert verdict([EVEN], None)["met"] is None


@pytest.mark.parametrize(
    ("attempt", "given", "said"),
    [
        (WILD, "", "spread by 200%"),
        (Pairs([1.0], [4.0]), "", "one run"),
        (EVEN, "greedy ids differ", "greedy ids differ"),
    ],
)
def test_no_ratio_is_left_where_there_is_a_refusal(attempt, given, said):
    found = verdict([attempt], 2.0, given)
    assert said in found["refusal"]
    assert found["ratio_of_minima"] is found["median_pair_ratio"] is found["pair_ratios"] is None
    assert found["met"] is None
    assert found["ours"]["values"] == list(attempt.ours)  # the runs stay on record


def test_runs_far_apart_still_tell_what_the_ratio_is_at_least():
    """Our slowest but for the slowest quarter, against the peer's fastest."""
    uneven = Pairs([1.0, 1.1, 1.1, 9.0], [4.4, 5.0, 8.0, 9.0])
    found = verdict([uneven], 4.0)
    assert found["refusal"]
    assert found["at_least"] == pytest.approx(4.0)
    assert found["met"] is True
    assert verdict([uneven], 4.1)["met"] is None
    assert ratio(found).startswith("at least 4.00x: the runs spread")


def test_no_bound_where_the_answers_differ():
    found = verdict([EVEN], 1.0, "greedy ids differ")
    assert found["at_least"] is None
    assert found["met"] is None
    assert ratio(found) == "no ratio: greedy ids differ"


def test_the_attempt_with_the_least_spread_counts():
    assert best_attempt([WILD, EVEN]) is EVEN
    assert verdict([WILD, EVEN], 2.0)["ratio_of_minima"] == pytest.approx(4.0)
