"""The claims as data: they follow the schema, and say what the papers say."""

import json
from pathlib import Path

import pytest
from mlx_vlm_edge_bench.claims import read as claims

from mlx_vlm_edge.hub.models import ALIASES

FOLDER = Path(claims.__file__).parent / "data"
TABLE = FOLDER.parent / "table6.json"
KNOWN = claims.read(FOLDER)
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
        assert all(part.model in ALIASES for part in subject.parts)


def test_claimed_milliseconds_are_of_one_machine():
    assert {claim.paper.chip for claim in KNOWN if claim.kind == "ms"} == {"M1 Max"}


def test_ttfts_are_those_of_the_papers_table():
    printed = {row["ttft_ms"] for row in json.loads(TABLE.read_text())["rows"]}
    ours = {c.paper.value for c in KNOWN if c.id.startswith("ttft-") and c.kind == "ms"}
    tiled = {918, 1263, 3721}  # 2048 px: another table's
    assert ours - tiled <= printed
