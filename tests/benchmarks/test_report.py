"""Results -> README table and page: the same twice, self-contained, every figure labelled."""

import json
import re
from copy import deepcopy
from html.parser import HTMLParser

import page
import pytest
import report
from mlx_vlm_edge_bench import plots
from pairs import Pairs, verdict

from mlx_vlm_edge.errors import UsageError

README = f"# Title\n\n{report.BEGIN}\nfrom before\n{report.END}\n\nMore.\n"
MACHINE = {
    "chip": "Apple M1 <Max>", "cores": 10, "memory_bytes": 2**35, "os": "macOS 15.1",
    "python": "3.12.1", "versions": {"mlx": "0.32.4"}, "device": "GPU", "mlx_vlm_edge": "0.1.0",
    "commit": "abc", "blas": "not used", "date": "2026-11-21T10:00:00+00:00",
}  # fmt: skip


def figure(value: float) -> dict:
    return {"median": value, "min": value, "max": value, "spread": 0.04, "values": [value]}


def case(side: int, ttft: float) -> dict:
    named = {"ttft": ttft, "ttft_e2e": ttft + 0.02, "decode_tps": 90.0, "peak_memory": 1.5}
    named |= {"stage: vision": ttft * 0.7, "stage: prefill": ttft * 0.3}
    return {
        "model": "fastvlm-0.5b", "weights": "random", "resolution": side, "bits": None,
        "dtype": "bfloat16", "prompt_tokens": 280, "visual_tokens": 256, "runs": 5,
        "figures": {name: figure(value) for name, value in named.items()},
    }  # fmt: skip


def row(name: str, ours: list, peer: list, target: float | None = 2.0, **more) -> dict:
    described = {"id": name, "title": f"row {name}", "unit": "s", "note": "as <noted>"}
    return described | verdict([Pairs(ours, peer)], target, more.get("refusal", ""))


AGAINST = {
    "kind": "against mlx-vlm", "block": "fast BLAS", "machine": MACHINE, "model": "FastVLM-0.5B",
    "ours": {"versions": {"mlx": "0.32.4"}},
    "peer": {"versions": {"mlx-vlm": "0.7.10", "mlx": "0.32.4"}}, "threads": 1, "spread": "so",
    "warm": "warm", "parity": {"f32": {"refusal": "", "ids": [1, 2], "features_off_256": 1e-6}},
    "rows": [
        row("fast", [1.0, 1.1], [4.0, 4.1]),
        row("short", [1.0, 1.1], [1.4, 1.5]),
        row("wild", [1.0, 9.0], [4.0, 4.1]),
        {"id": "none", "title": "row none", "unit": "s", "note": "", "target": 3,
         "not_available": "no cache"},
    ],
}  # fmt: skip
CLAIM = {
    "id": "a", "title": "A claim", "kind": "ms_ratio", "unit": "x", "ours": "us", "against": "them",
    "paper": {"value": 85.1, "unit": "x", "chip": None, "machine": "a Mac", "source": "Table 6",
              "note": ""},
    "verdict": "reproduced", "why": "91 % of it", "figure": 77.5, "sides": [], "how": "in parts",
    "predicted": 60.0,
}  # fmt: skip
BENCH = {"kind": "bench", "machine": MACHINE, "cases": [case(512, 0.08), case(1024, 0.17)]}
CLAIMS = {"kind": "claims", "machine": MACHINE, "claims": [CLAIM]}


@pytest.fixture
def results(tmp_path):
    """A folder with one machine's file, put together from its three records."""
    files = []
    for index, record in enumerate((BENCH, AGAINST, CLAIMS)):
        files.append(tmp_path / f"{index}.json")
        files[-1].write_text(json.dumps(record))
    report.add(tmp_path / "results", "m1-max", files)
    return tmp_path / "results"


def test_rows_measured_again_replace_their_older_selves(results, tmp_path):
    again = deepcopy(AGAINST)
    again["machine"] = {**MACHINE, "date": "2026-11-26T10:00:00+00:00"}
    again["rows"] = [row("short", [1.0, 1.1], [2.4, 2.5])]
    later = tmp_path / "later.json"
    later.write_text(json.dumps(again))
    report.add(results, "m1-max", [later])
    rows = report.read(results / "m1-max.json")["against_mlx_vlm"]["fast BLAS"]["rows"]
    assert [(one["id"], one["date"][:10]) for one in rows] == [
        ("fast", "2026-11-21"), ("short", "2026-11-26"), ("wild", "2026-11-21"),
        ("none", "2026-11-21"),
    ]  # fmt: skip
    assert rows[1]["ratio_of_minima"] == pytest.approx(2.4)


@pytest.mark.parametrize(
    "other",
    [{"threads": 2}, {"peer": {"versions": {"mlx-vlm": "0.7.11", "mlx": "0.32.4"}}}],
    ids=["other threads", "another peer"],
)
def test_a_comparison_under_other_terms_keeps_no_older_row(results, tmp_path, other):
    again = {**deepcopy(AGAINST), **other, "rows": [row("short", [1.0, 1.1], [2.4, 2.5])]}
    later = tmp_path / "later.json"
    later.write_text(json.dumps(again))
    report.add(results, "m1-max", [later])
    record = report.read(results / "m1-max.json")["against_mlx_vlm"]["fast BLAS"]
    assert [one["id"] for one in record["rows"]] == ["short"]


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["report.py", *map(str, arguments)])
    report.main()


def test_a_second_run_changes_nothing(results, tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(README)
    run(monkeypatch, "--results", results, "--readme", readme)
    once, drawn = readme.read_text(), (results / "index.html").read_text()
    assert "from before" not in once
    assert once.startswith("# Title\n\n")
    assert once.endswith("\n\nMore.\n")
    run(monkeypatch, "--results", results, "--readme", readme)
    assert readme.read_text() == once
    assert (results / "index.html").read_text() == drawn


def test_the_table_has_every_row_and_never_a_withheld_ratio(results):
    table = report.markdown([report.read(results / "m1-max.json")])
    assert "| row fast | 1.000 s | 4.000 s | 4.00x (pairs 3.86x) | 2x, met |" in table
    assert "| 1.40x (pairs 1.38x) | 2x, not met |" in table
    assert "row wild | 1.000 s | 4.000 s | at least 0.44x: the runs spread by 800%" in table
    assert "row none | - | - | not available: no cache | 3x |" in table
    assert "| fastvlm-0.5b, 1024 px, bfloat16 | 256 | 170 ms | 190 ms | - | 90.0 |" in table
    assert "Claims of the papers (1): timings: 1 reproduced." in table
    assert "2026-11-21" in table


def test_a_figure_whose_runs_spread_is_told_as_their_range():
    spread = {**figure(7.24), "values": [6.24, 7.24, 8.44], "spread": 0.35}
    one = case(1024, 7.0)
    one["figures"] |= {"ttft": spread, "ttft_e2e": figure(7.09)}
    _, _, row, _, note = report.case_rows([one]).splitlines()
    assert "| 6.24 s to 8.44 s | 7.09 s (one run) |" in row
    assert note == report.RANGES
    assert report.RANGES not in report.case_rows([case(1024, 7.0)])


@pytest.mark.parametrize(
    "readme", ["no markers", f"{report.BEGIN} only", f"{report.END}\n{report.BEGIN}"]
)
def test_a_readme_without_its_markers_is_refused(readme):
    with pytest.raises(UsageError, match="needs one line"):
        report.put(readme, "table")


def test_a_record_of_another_kind_or_chip_is_refused(results, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"kind": "something"}))
    with pytest.raises(UsageError, match="no record"):
        report.add(results, "m1-max", [other])
    other.write_text(json.dumps({**BENCH, "machine": {**MACHINE, "chip": "Apple M4"}}))
    with pytest.raises(UsageError, match="was made on Apple M4"):
        report.add(results, "m1-max", [other])


def test_blocks_of_the_comparison_stand_side_by_side(results, tmp_path):
    stock = tmp_path / "stock.json"
    stock.write_text(json.dumps({**AGAINST, "block": "stock"}))
    report.add(results, "m1-max", [stock])
    assert set(report.read(results / "m1-max.json")["against_mlx_vlm"]) == {"fast BLAS", "stock"}


class Checker(HTMLParser):
    """Balance of tags, and what would be fetched from elsewhere."""

    void = ("meta", "br", "rect", "line", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.fetched += [value for key, value in attrs if key in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_self_contained(results):
    text = page.page([report.read(results / "m1-max.json")])
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.fetched == []
    assert "script" not in checker.seen
    assert "width=device-width" in text
    assert "prefers-color-scheme: dark" in text
    assert "Apple M1 &lt;Max&gt;" in text
    assert "as &lt;noted&gt;" in text


def test_every_figure_says_how_it_was_got(results):
    text = page.page([report.read(results / "m1-max.json")])
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert len(captions) == 4
    assert all("class='tag" in caption for caption in captions)
    assert text.count('class="s0 here"') == 2  # ours, once on each plot of accuracy
    assert re.search(r"85.1x <span class='tag quoted'>", text)
    assert re.search(r"77.5x <span class='tag measured'>", text)
    assert re.search(r"60x by operations <span class='tag estimated'>", text)
    assert "2 greedy ids equal, vision features within 1e-06" in text


def test_stacked_bars_are_as_long_as_what_they_show():
    drawn = plots.stacked([plots.Bar("a", {"x": 30, "y": 10}), plots.Bar("b", {"x": 20})], "t")
    wide = [float(w) for w in re.findall(r'width="([\d.]+)" height="18"', drawn)]
    assert wide[0] / wide[1] == pytest.approx(3, rel=1e-2)
    assert wide[0] / wide[2] == pytest.approx(1.5, rel=1e-2)
    assert "40 ms" in drawn


def test_points_stand_where_their_values_put_them():
    points = [plots.Point(x, y, 0) for x, y in ((100, 50), (1000, 60), (10000, 70))]
    drawn = plots.scatter(points, ["one"], "t", "y")
    places = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    (x1, y1), (x2, y2), (x3, y3) = places
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)  # logarithmic
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)  # linear, upwards


@pytest.mark.parametrize(
    ("value", "shown"),
    [(6.8, "6.8 ms"), (116.3, "116 ms"), (1297, "1.30 s"), (14124, "14.1 s")],
)
def test_milliseconds_are_written_with_three_digits(value, shown):
    assert plots.milliseconds(value) == shown


def test_ticks_are_round_numbers_in_the_range():
    assert plots.ticks(90, 700) == [100, 200, 500]
    assert plots.nice(13) == 20


def test_a_claim_without_a_figure_is_shown_as_one():
    assert page.amount(None, "x") == "no figure"
    assert page.amount(1.5, "x") == "1.5x"
