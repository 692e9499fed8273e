"""Operations: FastViTHD's against a count on Apple's own code, the rest against plain formulas."""

import json
from pathlib import Path

import pytest
from mlx_vlm_edge_bench.estimate import predicted_flops, vision
from mlx_vlm_edge_bench.estimate.connector import ldp, ldpv2, mlp
from mlx_vlm_edge_bench.estimate.parts import parts_of

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.errors import UsageError

COUNTED = json.loads((Path(__file__).parents[2] / "golden/fastvithd_gmacs.json").read_text())
TOWER = configs.read("fastvlm-0.5b")["vision_config"]


@pytest.mark.parametrize("side", map(int, COUNTED))
def test_fastvithd_is_counted_as_apples_code_is(side):
    works = vision.fastvithd(TOWER, side, side)
    ours = {name: round((work.macs + work.attention) / 1e9, 3) for name, work in works.items()}
    total = sum(work.macs + work.attention for work in works.values())
    assert {"total": round(total / 1e9, 3), **ours} == COUNTED[str(side)]


def test_a_side_that_is_no_multiple_of_64_is_refused():
    with pytest.raises(UsageError, match="image size 1000: FastViTHD takes multiples of 64"):
        predicted_flops(configs.read("fastvlm-0.5b"), 1000)


def test_a_picture_that_is_not_square_costs_by_its_area():
    half = sum(work.macs for work in vision.fastvithd(TOWER, 512, 1024).values())
    square = sum(work.macs for work in vision.fastvithd(TOWER, 1024, 1024).values())
    assert half == pytest.approx(square / 2, rel=1e-4)  # but for conv_exp's two small layers


# GMACs of a tile by the project's fact sheets, computed on torch's meta device.
@pytest.mark.parametrize(
    ("alias", "gmacs"), [("idefics3-8b", 306), ("smolvlm-2.2b", 333), ("smolvlm-256m", 106)]
)
def test_a_siglip_tile(alias, gmacs):
    found = parts_of(configs.read(alias))
    assert (found.vision.macs + found.vision.attention) / found.view.tiles / 1e9 == pytest.approx(
        gmacs, rel=0.01
    )


def test_connectors_are_the_published_sizes():
    """Of MobileVLM-1.7B's (width 2048), by the README of the models."""
    assert mlp(576, 1024, 2048).parameters + 20_480 == ldpv2(24, 1024, 2048).parameters == 6_316_032
    assert ldp(24, 1024, 2048).parameters == 18_936_832


def test_prefill_and_decode_of_llama_7b():
    """2 FLOPs per parameter of a layer and position, and 4 d per pair of positions and layer."""
    decoder = parts_of(configs.read("llava-1.5-7b")).decoder
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert decoder.matrices * 32 == layers
    pairs = 512 * 513 // 2
    head = 4096 * 32064
    assert decoder.prefill(512).flops == 2 * 512 * layers + 2 * head + 4 * pairs * 4096 * 32
    assert decoder.step(511).flops == 2 * (layers + head) + 4 * 512 * 4096 * 32
    whole = [decoder.prefill(4).flops - 2 * head, *(decoder.step(n).flops for n in (4, 5))]
    assert sum(whole) == decoder.prefill(6).flops + head * 2, "a prompt, then two tokens"


def test_stages_of_fastvlm():
    found = predicted_flops(configs.read("fastvlm-0.5b"), 512, 24)
    assert found["vision"] == pytest.approx(2 * 59.556e9, rel=1e-4)
    assert found["connector"] == 2 * 64 * (3072 * 896 + 896 * 896)
    decoder = parts_of(configs.read("fastvlm-0.5b"), 512).decoder
    assert found["prefill"] == decoder.prefill(64 + 24).flops
    assert found["decode"] == decoder.step(64 + 24).flops


def test_eve_v2_reads_two_kinds_of_weights_and_computes_with_one():
    found = parts_of(configs.read("eve-7b-hd-v2"))
    plain = parts_of(configs.read("fastvlm-7b")).decoder  # the same language model, of one kind
    assert found.decoder.prefill(100).flops == plain.prefill(100).flops
    assert found.decoder.prefill(100).matrices == 2 * plain.prefill(100).matrices
    assert found.decoder.step(100) == plain.step(100)
