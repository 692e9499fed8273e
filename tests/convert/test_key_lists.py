"""Every tensor of the published full-size checkpoints is mapped, with its shape, unallocated."""

import gzip
import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_vlm_edge_convert.families import decoder, fastvlm
from mlx_vlm_edge_convert.families.fastvlm_config import derive_geometry

from ..memory import Peak

KEYS = Path(__file__).parents[1] / "golden" / "keys"
SIZES = ("0.5b", "1.5b", "7b")
TIED = ("0.5b", "1.5b")


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    with gzip.open(KEYS / f"{name}_keys.json.gz", "rt") as file:
        return {key: tuple(shape) for key, shape in json.load(file).items()}


def unallocated(listed: dict[str, tuple[int, ...]]) -> dict[str, mx.array]:
    return {name: mx.zeros(shape, dtype=mx.bfloat16) for name, shape in listed.items()}


@pytest.fixture(autouse=True)
def nothing_is_allocated():
    peak = Peak()
    yield
    assert peak.bytes < 10_000_000


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", ["apple_llava", "transformers_native"])
def test_a_published_checkpoint_becomes_the_native_key_set(size, layout):
    want = shapes(f"fastvlm_{size}_mlxvlm")
    source = unallocated(shapes(f"fastvlm_{size}_{layout}"))
    got = {name: tuple(array.shape) for name, array in fastvlm.rename(source).items()}
    if size in TIED:  # the head is dropped by comparing values, which these arrays do not have
        assert got.pop(decoder.HEAD) == want["language_model.model.embed_tokens.weight"] or layout
    if layout == "transformers_native":  # its vocabulary is padded, its CLIP head left out
        del want[fastvlm.CLIP_HEAD]
        for name in {decoder.EMBEDDING, decoder.HEAD} & want.keys():
            rows = want[name][0] + 64
            assert got[name][0] == rows
            want[name] = (rows, want[name][1])
    assert got == want


@pytest.mark.parametrize("form", ["trainform", "inference"])
def test_timms_encoder_becomes_the_native_tower(form):
    want = {k: v for k, v in shapes("fastvlm_0.5b_mlxvlm").items() if k.startswith(fastvlm.TOWER)}
    del want[fastvlm.CLIP_HEAD]
    source = unallocated(shapes(f"fastvit_mci3_{form}_timm"))
    tower = {f"{fastvlm.TIMM_TOWER}{name}": array for name, array in source.items()}
    got = {name: tuple(array.shape) for name, array in fastvlm.rename(tower).items()}
    assert got == want


def test_the_published_geometry_is_derived_from_shapes():
    geometry = derive_geometry(unallocated(shapes("fastvlm_0.5b_mlxvlm")))
    assert geometry == {
        "layers": [2, 12, 24, 4, 2],
        "embed_dims": [96, 192, 384, 768, 1536],
        "mlp_ratios": [4, 4, 4, 4, 4],
        "token_mixers": ["repmixer", "repmixer", "repmixer", "attention", "attention"],
        "pos_embs_shapes": [None, None, None, [7, 7], [7, 7]],
        "downsamples": [True] * 5,
        "down_patch_size": 7,
        "repmixer_kernel_size": 3,
        "cls_ratio": 2.0,
        "projection_dim": 768,
    }
