"""Claims: the schema, the counts, the verdicts, and the way one is run."""

import json
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx_vlm_edge_bench.claims import counted as claim_counts
from mlx_vlm_edge_bench.claims import read as claims
from mlx_vlm_edge_bench.claims import run as claim_run
from mlx_vlm_edge_bench.claims import table as claim_table
from mlx_vlm_edge_bench.claims import timed as claim_parts
from mlx_vlm_edge_bench.claims.read import Part, Subject, verdict
from mlx_vlm_edge_bench.claims.timed import PartTimer

from mlx_vlm_edge.errors import UsageError

PAPER = {"value": 85.1, "unit": "x", "chip": "M1 Max", "machine": "a Mac", "source": "Table 10"}
OURS = {"name": "small", "parts": [{"part": "prefill", "model": "smolvlm-256m", "tokens": 4}]}
AGAINST = {"name": "large", "parts": [{"part": "prefill", "model": "smolvlm-256m", "tokens": 8}]}
CLAIM = {
    "id": "a-ratio", "title": "A is sooner than B", "kind": "ms_ratio", "paper": PAPER,
    "ours": OURS, "against": AGAINST, "better": "higher",
}  # fmt: skip


def read(tmp_path, *entries):
    (tmp_path / "some.json").write_text(json.dumps(entries))
    return claims.read(tmp_path)


@pytest.fixture
def claim(tmp_path):
    return read(tmp_path, CLAIM)[0]


def test_a_claim_is_read(claim):
    assert claim.ours.parts == (Part("prefill", "smolvlm-256m", tokens=4),)
    assert claim.paper.value == 85.1
    assert claim.timed
    assert claim.unit == "x"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "hours"}, "kind 'hours'"),
        ({"better": "equal"}, "better of ms_ratio is higher or lower"),
        ({"against": None}, "needs 'against'"),
        ({"kind": "ms", "better": "lower"}, "takes no 'against'"),
        ({"colour": 1}, "'colour' is not known"),
        ({"ours": {"name": "x"}}, "either parts or not_runnable"),
        ({"ours": {"name": "x", "parts": [{"part": "tail", "model": "m"}]}}, "part 'tail'"),
        ({"ours": {"name": "x", "parts": [{"part": "prefill", "model": "m"}]}}, "'tokens'"),
        ({"ours": {"name": "x", "parts": [{"part": "language", "model": "m"}]}}, "no time"),
        ({"paper": {**PAPER, "page": 3}}, "'page' is not known"),
        ({"paper": {"value": 1}}, "'unit' is missing"),
    ],
)
def test_data_that_break_the_schema_are_refused(tmp_path, change, said):
    with pytest.raises(UsageError, match="a-ratio") as refused:
        read(tmp_path, {**CLAIM, **change})
    assert said in str(refused.value)


def test_an_id_is_there_once_and_unknown_ones_are_refused(tmp_path, claim):
    with pytest.raises(UsageError, match="a-ratio is there twice"):
        read(tmp_path, CLAIM, CLAIM)
    with pytest.raises(UsageError, match="no claim is called 'b'"):
        claims.chosen([claim], ["a-ratio", "b"])
    assert claims.chosen([claim], []) == claims.chosen([claim], ["a-ratio"]) == [claim]


@pytest.mark.parametrize(
    ("kind", "better", "paper", "ours", "same", "word"),
    [
        ("ms_ratio", "higher", 10, 9.0, False, "reproduced"),
        ("ms_ratio", "higher", 10, 8.9, False, "not reproduced"),
        ("ms_ratio", "lower", 9, 10.0, False, "reproduced"),
        ("ms_ratio", "lower", 9, 10.1, False, "not reproduced"),
        ("ms", "lower", 90, 100, True, "reproduced"),
        ("ms", "lower", 90, 101, True, "not reproduced"),
        ("ms", "lower", 90, 1, False, "not compared"),
        ("tokens", "equal", 256, 256, False, "reproduced"),
        ("tokens", "equal", 256, 258, False, "not reproduced"),
    ],
)
def test_verdicts(claim, kind, better, paper, ours, same, word):
    claim = replace(claim, kind=kind, better=better, paper=replace(claim.paper, value=paper))
    assert verdict(claim, ours, same).word == word


def test_without_a_figure_in_the_paper_ours_is_told_alone(claim):
    alone = replace(claim, paper=replace(claim.paper, value=None))
    assert verdict(alone, 4.0, True) == claims.Verdict("not compared", "the paper prints no figure")


def test_a_count_may_be_off_by_what_the_claim_allows(claim):
    counted = replace(claim, kind="params_M", better="equal", within=0.02)
    counted = replace(counted, paper=replace(claim.paper, value=125.1))
    assert verdict(counted, 122.7, True).word == "reproduced"
    assert verdict(replace(counted, within=0.01), 122.7, True) == claims.Verdict(
        "not reproduced", "-1.9%"
    )


def test_counts_are_those_of_the_models():
    def tokens(model, **more):
        return claim_counts.tokens(Part("vision", model, **more))

    assert tokens("fastvlm-0.5b", resolution=1024) == 256
    assert tokens("fastvlm-7b", resolution=768) == 144
    assert tokens("llava-onevision-0.5b", times=10) == 7290
    assert tokens("llava-1.5-7b") == 576
    assert tokens("mobilevlm-v2-1.7b") == tokens("mobilevlm-1.7b") == 144
    assert tokens("smolvlm-256m", times=2) == 128
    folded = claim_counts.parameters(Part("vision", "fastvlm-0.5b"))  # BatchNorm is in neighbours
    assert folded == pytest.approx(122_714_208, rel=5e-4)
    assert claim_counts.parameters(Part("vision", "llava-1.5-7b")) == pytest.approx(
        304e6, rel=0.005
    )
    assert claim_counts.parameters(Part("language", "fastvlm-0.5b")) == 494_032_768
    ldp = claim_counts.parameters(Part("connector", "mobilevlm-v2-1.7b", type="ldp"))
    ldpv2 = claim_counts.parameters(Part("connector", "mobilevlm-v2-1.7b", type="ldpv2"))
    assert ldp - ldpv2 == 12_641_280 - 20_480  # two blocks against one convolution
    assert claim_counts.macs(Part("vision", "fastvlm-0.5b", 1024)) / 1e9 == pytest.approx(
        243.35, rel=1e-3
    )


def test_a_resolution_that_a_tower_does_not_take_is_refused():
    with pytest.raises(UsageError, match="336 only"):
        claim_counts.tokens(Part("vision", "llava-1.5-7b", 1024))


@pytest.mark.parametrize("alias", ["fastvlm-0.5b", "mobilevlm-1.7b", "mobilevlm-v2-1.7b"])
def test_a_connector_is_fed_what_its_tower_makes(alias):
    """The shapes that are counted are the ones that towers and connectors really have."""
    found = claim_parts.model_parts(alias)
    side = 64 if alias.startswith("fastvlm") else 336
    shape = claim_parts.features_shape(found, side)
    made = found.connector_of(None)(mx.zeros(shape))
    assert made.shape[1] == claim_counts.tokens(Part("vision", alias, side))


class Ticking:
    """A clock on which every look takes a second longer than the one before."""

    def __init__(self):
        self.now, self.step = 0, 0

    def __call__(self):
        self.step += 1
        self.now += self.step
        return self.now


@pytest.fixture
def tiny(monkeypatch):
    """Two layers in place of the models' many, so that parts can be run for real."""
    from mlx_vlm_edge.checkpoint import configs

    real = configs.read

    def few_layers(alias):
        config = real(alias)
        text = config.get("text_config", config)
        text["num_hidden_layers"] = 2
        text["vocab_size"] = 256
        return config

    monkeypatch.setattr(configs, "read", few_layers)
    claim_parts.model_parts.cache_clear()
    yield
    claim_parts.model_parts.cache_clear()


MACHINE = {"chip": "AMD EPYC", "device": "CPU"}


def test_a_ratio_is_measured_side_by_side(claim, tiny, monkeypatch):
    order = []
    whole = claim_parts.Prompt.prefill_all
    monkeypatch.setattr(
        claim_parts.Prompt,
        "prefill_all",
        lambda self: (order.append(self._length), whole(self))[1],
    )
    said = []
    setting = claim_run.Setting(MACHINE, 2, False)
    timer = PartTimer(in_parts=False)
    record = claim_run.run(claim, setting, timer, said.append)
    assert order == [4, 8] * 3  # a warm-up and two runs, in turn
    assert said == ["making random weights", "warm-up", "run 1 of 2", "run 2 of 2"]
    assert len(record["sides"]) == 2
    assert record["predicted"] > 1
    assert record["how"] == "run whole"


def test_the_ratio_is_of_the_medians_and_the_verdict_follows(claim, tiny):
    timer = PartTimer(in_parts=False)
    timer.timed = lambda part: iter([9.0] + [part.tokens / 4] * 3).__next__
    record = claim_run.run(claim, claim_run.Setting(MACHINE, 3, False), timer, lambda text: None)
    assert record["figure"] == 2.0
    assert record["verdict"] == "not reproduced"
    assert record["sides"][0]["median"] == 1000
    assert record["sides"][0]["first"] == 9000
    text = claim_table.claim(record, 60)
    assert "2 x = 2,000.0 ms, spread 0% (large) / 1,000.0 ms" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 60
    assert "by operations (an estimate)" in " ".join(text.split())


def test_no_verdict_when_the_runs_spread(claim, tiny):
    timer = PartTimer(in_parts=False)
    timer.timed = lambda part: iter([1.0, 1.0, 1.5, 1.0]).__next__
    record = claim_run.run(claim, claim_run.Setting(MACHINE, 3, False), timer, lambda text: None)
    assert record["figure"] is None
    assert record["verdict"] == "not compared"
    assert "spread by 50%" in record["why"]


def test_a_model_that_cannot_be_run_says_why(claim):
    other = Subject("Cambrian-1-8B", not_runnable="its encoders are not here", quoted=5085)
    record = claim_run.run(
        replace(claim, against=other), claim_run.Setting(MACHINE, 1, False), PartTimer(True), print
    )
    assert record["verdict"] == "not runnable here"
    assert record["why"] == "Cambrian-1-8B (the paper's 5,085): its encoders are not here"
    assert "ours" not in claim_table.claim(record).split("verdict")[0].split("paper")[1]


def test_milliseconds_are_not_run_on_a_cpu_unless_named(claim):
    single = replace(claim, kind="ms", against=None, better="lower")
    record = claim_run.run(single, claim_run.Setting(MACHINE, 1, False), PartTimer(True), print)
    assert record["verdict"] == "not compared"
    assert "milliseconds of M1 Max say nothing on a CPU" in record["why"]
    assert "name the claim" in record["why"]


def test_what_does_not_fit_is_not_run(claim, monkeypatch):
    monkeypatch.setattr(claim_run.memory, "free_memory", lambda: 1_000_000_000)
    record = claim_run.run(claim, claim_run.Setting(MACHINE, 1, False), PartTimer(True), print)
    assert record["verdict"] == "not runnable here"
    assert "1.00 GB are free" in record["why"]
    assert record["predicted"] > 1  # by operations, whether it can be run or not


def test_in_parts_a_tile_counts_for_all_and_two_chunks_for_a_prefill(tiny, monkeypatch):
    monkeypatch.setattr(claim_parts, "CHUNK", 8)
    clock = Ticking()
    timer = PartTimer(True, clock)
    prefill = Part("prefill", "smolvlm-256m", tokens=80)
    # looks at the clock: 2 and 4 for the first chunk (4 - 2), then 3 and 4 steps for the last
    assert timer.timed(prefill)() == (2 + 4) / 2 * 10
    assert "its last 8 positions" in timer.how(prefill)
    assert timer.how(Part("prefill", "smolvlm-256m", tokens=24)) == ""
    assert timer.how(Part("vision", "smolvlm-256m", times=10)) == "one tile times 10"
    assert PartTimer(False).how(Part("vision", "smolvlm-256m", times=10)) == ""


def test_a_last_chunk_sees_all_positions_before_it(tiny):
    """In parts or whole, the last position's logits come from as many keys."""
    found = claim_parts.model_parts("smolvlm-256m")
    timer = PartTimer(True)
    timer._filled(Part("prefill", "smolvlm-256m", tokens=8))
    chunk = claim_parts.Prompt(found, 8)
    caches = chunk.cache_of(24)
    mx.eval(chunk.logits(caches))
    assert [cache.offset for cache in caches] == [32, 32]


def test_the_table_lists_claims_at_any_width(claim):
    told = "1 of 1 can be run where there is memory for them."
    assert claim_table.listed([claim], 80) == f"a-ratio  A is sooner than B\n\n{told}"
    assert claim_table.listed([claim], 30).splitlines()[0] == "a-ratio"


def test_the_list_tells_what_no_machine_can_run(claim):
    other = replace(claim, against=Subject("Cambrian-1-8B", not_runnable="no encoders"))
    lines = claim_table.listed([claim, replace(other, id="b")], 80).splitlines()
    assert lines[-3:] == [
        "1 of 2 can be run where there is memory for them.",
        "Not runnable:",
        "b        Cambrian-1-8B: no encoders",
    ]


def test_a_summary_keeps_counts_and_timings_apart(claim):
    """A count that is reproduced says nothing of speed."""
    other = Subject("Cambrian-1-8B", not_runnable="its encoders are not here", quoted=5085)
    setting = claim_run.Setting(MACHINE, 1, False)
    record = claim_run.run(replace(claim, against=other), setting, PartTimer(True), print)
    count = {**record, "id": "b", "kind": "tokens_ratio", "figure": 84.0, "verdict": "reproduced"}
    text = claim_table.summary([record, count], 80)
    assert text.splitlines() == [
        "counts          paper          ours",
        "b              85.1 x          84 x  reproduced",
        "counts, 1: 1 reproduced",
        "",
        "timings         paper          ours",
        "a-ratio        85.1 x             -  not runnable here",
        "timings, 1: 1 not runnable here",
    ]
    assert "not runnable here: a-ratio" in claim_table.summary([record], 40)


DECODE = {"part": "decode", "model": "smolvlm-256m", "tokens": 4, "times": 6, "bits": 4}
SPEED = {
    **CLAIM, "kind": "tokens_per_s", "against": None,
    "ours": {"name": "small", "parts": [*OURS["parts"], DECODE]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ours": OURS}, "need a 'decode' part"),
        ({"kind": "tokens_per_s_ratio", "against": AGAINST}, "need a 'decode' part"),
        (
            {"kind": "ms_ratio", "against": {"name": "x", "parts": [{**DECODE, "times": 5}]}},
            "as many tokens",
        ),
        ({"ours": {"name": "x", "parts": [{**DECODE, "bits": 7}]}}, "bits are"),
        ({"ours": {"name": "x", "parts": [{**DECODE, "tokens": None}]}}, "'tokens'"),
    ],
)
def test_tokens_per_second_are_of_an_answer(tmp_path, change, said):
    with pytest.raises(UsageError) as refused:
        read(tmp_path, {**SPEED, **change})
    assert said in str(refused.value)


def test_tokens_per_second_are_the_answers_tokens_by_all_its_parts(tmp_path, tiny):
    speed = read(tmp_path, SPEED)[0]
    assert speed.ours.decoded == 6
    timer = PartTimer(in_parts=False)
    timer.timed = lambda part: iter([9.0] + [1.0 if part.tokens else 0] * 3).__next__
    setting = claim_run.Setting(MACHINE, 3, named=True)
    record = claim_run.run(speed, setting, timer, lambda text: None)
    assert record["figure"] == 3.0  # tokens by 1 s of prefill and 1 s of decoding
    assert record["verdict"] == "not compared"  # the paper's are of another chip
    assert "3 tokens/s = 2,000.0 ms" in " ".join(claim_table.claim(record, 200).split())


def test_a_decode_feeds_each_token_to_the_next_step(tiny, monkeypatch):
    """4 bits, all the tokens that are asked for, or in parts those in the middle of them."""
    part = Part("decode", "smolvlm-256m", tokens=4, times=6, bits=4)
    widths = []
    language_model = claim_parts.model_parts("smolvlm-256m", 4).language_model
    embed = type(language_model).embed
    monkeypatch.setattr(
        type(language_model), "embed",
        lambda self, ids: (widths.append(ids.shape), embed(self, ids))[1],
    )  # fmt: skip
    assert PartTimer(in_parts=False).timed(part)() > 0
    assert widths == [(1, 1)] * 6
    assert {layer.bits for layer in language_model.modules() if "scales" in layer} == {4}
    monkeypatch.setattr(claim_parts, "DECODED", 2)
    timer = PartTimer(in_parts=True, clock=Ticking())
    assert timer.timed(part)() == 2 * 6 / 2  # seconds of two steps, thrice
    assert timer.how(part) == "2 tokens in the middle of 6"
    assert len(widths) == 8


def test_a_model_that_has_no_room_is_measured_in_its_first_layers(claim, tiny, monkeypatch):
    monkeypatch.setattr(claim_parts, "LAYERS", 1)
    timer = PartTimer(in_parts=True, clock=Ticking())
    parts = [part for subject in claim.subjects for part in subject.parts]
    whole = timer.missing(parts)
    monkeypatch.setattr(claim_run, "ALLOWANCE", 0)
    monkeypatch.setattr(claim_run.memory, "usable", lambda: whole - 1)
    record = claim_run.run(claim, claim_run.Setting(MACHINE, 1, False), timer, lambda text: None)
    assert record["verdict"] != "not runnable here"
    assert record["how"] == "in parts: 1 of 2 layers of smolvlm-256m, all alike"
    assert timer.timed(parts[0])() % 2 == 0  # whole seconds of one layer, twice
    refused = claim_run.run(
        claim, claim_run.Setting(MACHINE, 1, False), PartTimer(in_parts=False), print
    )
    assert refused["verdict"] == "not runnable here"


def test_towers_that_no_model_has_are_counted_as_published():
    """GMAC of timm's convnext_large at 320 px; parameters of the trunks without their heads."""
    large = Part("vision", "tower:convnext-l", 320)
    assert claim_counts.macs(large) / 1e9 == pytest.approx(70.12, rel=1e-3)
    assert claim_counts.parameters(large) == pytest.approx(196.2e6, rel=1e-3)
    huge = Part("vision", "tower:convnext-xxl", 512)
    assert claim_counts.macs(huge) / 1e9 == pytest.approx(791.86, rel=1e-3)
    assert claim_counts.parameters(huge) == pytest.approx(843.4e6, rel=1e-3)
    assert claim_counts.tokens(huge) == 256
    paper, released = (
        sum(claim_counts.macs(Part("vision", f"tower:{name}", side)) for name, side in towers)
        for towers in ([("dinov2-l-518", 518)], [("dinov2-g-378", 378)])
    )
    assert paper / 1e9 == pytest.approx(506.8, rel=0.01)
    assert released > paper
    with pytest.raises(UsageError, match="no tower is called 'other'"):
        claim_counts.tokens(Part("vision", "tower:other", 320))
    with pytest.raises(UsageError, match="needs a resolution"):
        claim_counts.tokens(Part("vision", "tower:convnext-l"))


def test_the_shipped_claims_follow_the_schema_and_can_be_counted():
    """Every count comes out as the claim says; every timed part is one that can be built."""
    known = claims.read()
    assert len(known) > 50
    setting = claim_run.Setting(MACHINE, 1, False)
    for claim in known:
        runnable = not any(subject.not_runnable for subject in claim.subjects)
        if runnable and not claim.timed:
            record = claim_run.run(claim, setting, PartTimer(True), lambda text: None)
            assert record["figure"] > 0, claim.id
        for part in (part for subject in claim.subjects for part in subject.parts):
            assert claim_counts.flops(Subject("one", (part,))) > 0, claim.id
            found = claim_parts.model_parts(part.model)
            if part.part == "vision":
                claim_parts.side_of(found, part.resolution)
