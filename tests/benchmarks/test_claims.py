"""The claims as data: they follow the schema, and say what the papers say."""

import json
import re
from pathlib import Path

import pytest
from mlx_vlm_edge_bench.claims import read as claims
from mlx_vlm_edge_bench.claims.timed import TOWER
from mlx_vlm_edge_bench.claims.towers import TOWERS

from mlx_vlm_edge.hub.models import ALIASES

FOLDER = Path(claims.__file__).parent / "data"
TABLE = FOLDER.parent / "table6.json"
KNOWN = claims.read(FOLDER)
NAMES = {*ALIASES, *(f"{TOWER}{name}" for name in TOWERS)}
BY_ID = {claim.id: claim for claim in KNOWN}


def test_what_the_project_is_about_is_there():
    assert BY_ID["ttft-fastvlm-0.5b-1024"].paper.value == 166
    assert BY_ID["ttft-ratio-llava-onevision-0.5b"].paper.value == 85
    assert BY_ID["ttft-ratio-cambrian-1-8b"].against.quoted == 5085
    assert "shared MLP" in BY_ID["params-ratio-ldpv2-ldp"].paper.note
    kinds = {claim.kind for claim in KNOWN}
    assert {"ms", "ms_ratio", "tokens", "params_M", "params_ratio", "tokens_ratio"} <= kinds


@pytest.mark.parametrize("claim", KNOWN, ids=lambda claim: claim.id)
def test_every_claim_has_a_source_and_runs_known_models(claim):
    assert claim.paper.source
    if claim.paper.value is None:  # what the paper says without a figure
        assert claim.paper.note
    else:
        assert claim.paper.machine
        assert claim.paper.value > 0
    for subject in claim.subjects:
        assert subject.parts or subject.not_runnable
        assert all(part.model in NAMES for part in subject.parts)


def test_claimed_times_are_of_the_machines_that_their_papers_name():
    chips: dict[str, set[str | None]] = {}
    for claim in KNOWN:
        if claim.absolute:
            chips.setdefault(claim.paper.source.split(",")[0], set()).add(claim.paper.chip)
    assert chips == {
        "FastVLM": {"M1 Max"},
        "MobileVLM": {"Jetson Orin", "Snapdragon 888"},
        "MobileVLM V2": {"A100", "Jetson Orin"},
    }


def test_tokens_per_second_times_the_total_are_the_answers_256_tokens():
    """How Table 5's speeds are defined, which its paper does not print."""
    for claim in KNOWN:
        if claim.id.startswith("latency-orin-"):
            speed = float(re.search(r"([\d.]+) tokens/s", claim.paper.note)[1])
            assert speed * claim.paper.value / 1000 == pytest.approx(256, rel=0.01)
            assert claim.ours.decoded == 256


def test_what_no_machine_can_run_has_its_reason():
    closed = {claim.id: claim.not_runnable for claim in KNOWN if claim.not_runnable}
    assert set(closed) == {
        "params-ratio-vitamin", "encoder-ratio-vitamin-224",
        "params-ratio-florencevl", "tokens-ratio-florencevl",
        "ttft-ratio-siglip-so400m", "ttft-ratio-convnext",
    }  # fmt: skip
    for why in closed.values():
        assert "ViTamin" in why or "FlorenceVL" in why or "only drawn" in why


def test_ttfts_are_those_of_the_papers_table():
    printed = {row["ttft_ms"] for row in json.loads(TABLE.read_text())["rows"]}
    ours = {c.paper.value for c in KNOWN if c.id.startswith("ttft-") and c.kind == "ms"}
    tiled = {918, 1263, 3721}  # 2048 px: another table's
    assert ours - tiled <= printed
