"""The comparison: who runs when, what is refused, and both programs for real where they are."""

import ctypes.util
import os
import sys
from pathlib import Path

import against_mlx_vlm as against
import numpy as np
import pytest
import rows as table
from sides import FailedError, Side, environment

PEER = os.environ.get("MLX_VLM_PYTHON")
FAST = "libopenblas.so.0"  # where it is installed: the peer's tower takes a minute without
BLAS = FAST if ctypes.util.find_library("openblas") else "stock"
PROMPT = table.chat(table.QUESTION)


class Scripted:
    """A worker that gives the replies it was made with, and notes its turn."""

    def __init__(self, name: str, replies: dict, turns: list) -> None:
        self.name, self.replies, self.turns = name, replies, turns

    def ask(self, order: dict) -> dict:
        self.turns.append(self.name)
        reply = self.replies[order["do"]]
        if order["do"] == "features":
            np.save(order["file"], reply)
            return {}
        return reply(order) if callable(reply) else reply


def bench_of(tmp_path: Path, **more) -> against.Bench:
    sides = Side("ours", sys.executable, "stock", 1), Side("peer", sys.executable, "stock", 1)
    bench = against.Bench(
        *sides, None, {}, tmp_path / "a.jpg", tmp_path / "b.jpg", tmp_path, None, **more
    )
    bench.record = {"parity": {"f32": {"refusal": ""}}, "rows": []}
    return bench


def row_of(**more) -> table.Row:
    return table.Row("some", "some row", 2.0, order={"do": "time"}, runs=3, **more)


def measured(tmp_path: Path, ours, peer, row=None) -> tuple[dict, list]:
    turns: list = []
    workers = Scripted("ours", {"time": ours}, turns), Scripted("peer", {"time": peer}, turns)
    return against.measure(bench_of(tmp_path), row or row_of(), workers), turns


def test_runs_alternate_and_the_order_turns_round(tmp_path):
    found, turns = measured(tmp_path, {"seconds": 1.0}, {"seconds": 3.0})
    assert turns == ["ours", "peer", "ours", "peer", "peer", "ours", "ours", "peer"]
    assert found["ratio_of_minima"] == 3.0
    assert found["met"] is True
    assert len(found["attempts"]) == 1


def test_short_runs_are_repeated_until_a_sample_is_long_enough(tmp_path):
    found, turns = measured(tmp_path, {"seconds": 0.05}, {"seconds": 1.0})
    assert turns.count("ours") == 1 + 3 * 4  # 0.2 s a sample
    assert turns.count("peer") == 1 + 3
    assert found["ours"]["values"] == pytest.approx([0.05] * 3)


def test_a_row_is_tried_again_while_its_runs_lie_apart(tmp_path):
    times = iter([1, 1, 2, 3, 1, 1, 2, 3, 1, 1, 1, 1])
    found, _ = measured(tmp_path, lambda order: {"seconds": float(next(times))}, {"seconds": 3.0})
    assert len(found["attempts"]) == 3
    assert found["attempts"][0]["values"][0] == [1.0, 2.0, 3.0]
    assert found["ratio_of_minima"] == 3.0


def test_different_answers_leave_no_ratio(tmp_path):
    found, _ = measured(tmp_path, {"seconds": 1.0, "found": 5}, {"seconds": 3.0, "found": 6})
    assert "answers differ" in found["refusal"]
    assert found["ratio_of_minima"] is None


def test_what_a_version_lacks_is_said(tmp_path):
    found, _ = measured(tmp_path, {"missing": "no prefix cache"}, {"seconds": 3.0})
    assert found["not_available"] == "no prefix cache"
    assert "not available (no prefix cache)" in against.line(found)


FEATURES = np.linspace(1, 2, 12, dtype=np.float32)
IDS = [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"ids": {"ids": [7, -200, 9]}}, "different prompt ids"),
        ({"answer": {"ids": [1, 2, 3, 5]}}, "greedy ids differ"),
        ({"features": FEATURES * 1.0001}, "off by"),
    ],
)
def test_parity_names_what_differs(tmp_path, changed, said):
    replies = {"ids": {"ids": [7, -200, 8]}, "answer": {"ids": IDS}, "features": FEATURES}
    ours = {**replies, "ids": {"ids": [7, -200, -200, 8]}}
    workers = Scripted("ours", ours, []), Scripted("peer", replies | changed, [])
    refusal = against.parity(bench_of(tmp_path), workers)["refusal"]
    assert said in refusal
    assert bool(refusal) == bool(changed)


def test_parity_is_not_shown_by_a_constant_answer(tmp_path):
    replies = {"ids": {"ids": [7]}, "answer": {"ids": [1, 1, 1]}, "features": FEATURES}
    workers = Scripted("ours", replies, []), Scripted("peer", replies, [])
    assert "constant" in against.parity(bench_of(tmp_path), workers)["refusal"]


def test_no_ratio_without_parity(tmp_path):
    bench = bench_of(tmp_path)
    bench.record["parity"]["f32"]["refusal"] = "greedy ids differ"
    replies = {"time": {"seconds": 1.0}}
    workers = Scripted("ours", replies, []), Scripted("peer", replies, [])
    found = against.measure(bench, row_of(), workers)
    assert found["refusal"] == "greedy ids differ"
    assert "no ratio: greedy ids differ" in against.line(found)


@pytest.mark.parametrize(
    ("peer", "said"), [({"mlx": "0.33"}, "MLX differs"), ({}, "matrix library differs")]
)
def test_an_unfair_pair_is_refused(tmp_path, peer, said):
    def replies(versions, gflops):
        blas = {"gflops": gflops, "status": ""}
        return {"versions": {"versions": {"mlx": "0.32", **versions}}, "blas": blas}

    bench = bench_of(tmp_path)
    bench.record["machine"] = {}
    workers = Scripted("ours", replies({}, 90), []), Scripted("peer", replies(peer, 2), [])
    with pytest.raises(FailedError, match=said):
        against.describe(bench, workers)


@pytest.mark.parametrize("flag", ["--runs", "--threads"])
def test_counts_below_one_are_refused_in_one_line(monkeypatch, capsys, flag):
    monkeypatch.setattr("sys.argv", ["against_mlx_vlm.py", "--peer-python", "python", flag, "0"])
    with pytest.raises(SystemExit, match="2"):
        against.parse()
    assert capsys.readouterr().err.endswith(f"error: {flag} 0: give 1 or more\n")


def test_both_sides_get_the_same_blas_and_threads(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("LD_PRELOAD", "other.so")
    ours, peer = environment("ours", "some.so", 2), environment("peer", "some.so", 2)
    for side in (ours, peer):
        assert side["LD_PRELOAD"] == "some.so"
        assert side["MLX_VLM_EDGE_BLAS"] == "off"
        assert side["OPENBLAS_NUM_THREADS"] == "2"
    assert "PYTHONPATH" not in peer
    assert "LD_PRELOAD" not in environment("ours", "stock", 1)


def test_rows_are_the_targets(tmp_path):
    found = {row.id: row.target for row in table.rows(tmp_path / "a.jpg", tmp_path / "b.jpg")}
    assert found == {
        "fixed": 6, "fixed-whole": None, "cold": 4, "cold-torch": 5, "vision-256": None,
        "vision-512": 4, "vision-1024": 4, "prefill-f32": 1.8, "prefill-q4": 10, "ttft-f32": 4.5,
        "ttft-q4": None, "second-f32": 10, "decode-f32": 1.1, "decode-q4": 1.0, "memory-f32": 1.2,
        "memory-q4": 1.3, "jpeg": 3, "jpeg-draft": 6,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(checkpoint) -> Path:
    """The random checkpoint, for pictures of 128 pixels."""
    return table.view(checkpoint, 128, checkpoint.parent / "128")


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    return table.draw(tmp_path_factory.mktemp("picture") / "picture.jpg", 160, 120)


def test_our_worker_does_every_order(folder, picture, tmp_path):
    image = str(picture)
    side = Side("ours", sys.executable, BLAS, 1)
    worker = side.open()
    try:
        assert worker.ask({"do": "load", "folder": str(folder)})["seconds"] > 0
        answer = {"do": "answer", "prompt": PROMPT, "image": image, "tokens": 3, "side": 128}
        ids = worker.ask(answer)["ids"]
        assert len(set(ids)) > 1
        first = worker.ask({"do": "time_ttft", "prompt": PROMPT, "image": image, "side": 128})
        assert first["found"] == ids[0]
        small = worker.ask(answer | {"side": 64})["ids"]
        assert small != ids  # the side is really used
        decode = {"do": "time_decode", "prompt": table.chat("Hi", image=False), "tokens": 3}
        assert len(worker.ask(decode)["found"]) == 3
        prefill = {"do": "time_prefill", "ids": [5, -200, 6], "visual": 9, "width": 896}
        assert worker.ask(prefill)["found"] >= 0
        assert worker.ask({"do": "time_vision", "image": image, "side": 128})["seconds"] > 0
        file = str(tmp_path / "pixels.npy")
        worker.ask({"do": "pixels", "image": image, "side": 128, "file": file})
        assert np.load(file).shape == (1, 128, 128, 3)
        assert "torch" not in worker.ask({"do": "versions"})["imported"]
    finally:
        worker.close()
    order = {"folder": str(folder), "prompt": PROMPT, "image": image}
    seconds, reply = side.once({"do": "ready", **order})
    assert seconds > reply["inside"] > 0
    assert side.once({"do": "memory", "tokens": 2, **order})[1]["rss"] > 100e6


def test_a_worker_that_ends_is_quoted(tmp_path):
    worker = Side("ours", sys.executable, "stock", 1).open()
    with pytest.raises(FailedError, match="no such"):
        worker.ask({"do": "load", "folder": str(tmp_path / "nothing")})
    worker.close()


def test_the_view_of_a_checkpoint_changes_the_picture_size_only(folder):
    from mlx_vlm_edge.checkpoint.files import read_json

    assert read_json(folder / "config.json")["vision_config"]["image_size"] == 128
    assert read_json(folder / "preprocessor_config.json")["crop_size"]["height"] == 128
    assert (folder / "model.safetensors").is_symlink()
    assert read_json(folder.parent / "full" / "config.json")["vision_config"]["image_size"] == 192


@pytest.mark.skipif(not PEER, reason="needs MLX_VLM_PYTHON, an interpreter with mlx-vlm")
def test_both_programs_agree_and_are_timed(folder, picture, tmp_path, monkeypatch):
    sides = Side("ours", sys.executable, BLAS, 1), Side("peer", str(PEER), BLAS, 1)
    bench = against.Bench(*sides, None, {"f32": folder}, picture, picture, tmp_path, 1)
    bench.record = {"machine": {}, "parity": {}, "rows": []}
    every = {row.id: row for row in table.rows(picture, picture)}
    monkeypatch.setattr(against, "PARITY_SIDES", (64,))
    monkeypatch.setattr(against, "TRIES", 1)
    chosen = [every[name] for name in ("jpeg", "decode-f32", "cold")]
    against.compare(bench, chosen, lambda record: None)
    assert bench.record["parity"]["f32"]["refusal"] == ""
    assert [row["id"] for row in bench.record["rows"]] == [row.id for row in chosen]
    assert {row["refusal"] for row in bench.record["rows"]} == {"one run has no spread"}
    assert bench.record["rows"][0]["checked"]["exact"]
