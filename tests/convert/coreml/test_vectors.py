"""The preprocessing's test vectors: computed pictures, and files that have a trap each."""

import base64
import io
import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
from mlx_vlm_edge_convert.coreml.vectors import (
    DATE,
    FORMAT,
    SAMPLES,
    display_p3,
    source,
    write_vectors,
)
from PIL import Image, ImageCms

from mlx_vlm_edge.picture.image import fit, open_image


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    pixels = {
        function: SimpleNamespace(size=size, strategy="pad", fill=(1, 2, 3))
        for function, size in (("main", (40, 60)), ("main_32x16", (16, 32)))
    }
    content = json.loads((folder / write_vectors(folder, pixels)).read_text())
    assert content["format"] == FORMAT
    return content


def test_a_source_is_whole_number_arithmetic():
    # 40 * 40 * 2 // 7 + 11 * 21 + (4 + 2) % 2 * 90, of green
    assert source(50, 20)[11, 40, 1] == (457 + 231) % 256


def test_samples_are_of_the_fitted_pictures(vectors):
    (further,) = vectors["sizes"]
    assert (further["height"], further["width"]) == (16, 32)
    for size, cases in (((60, 40), vectors["resized"]), ((32, 16), further["resized"])):
        assert (cases[-1]["width"], cases[-1]["height"]) == size
        for case in cases:
            picture = Image.fromarray(source(case["width"], case["height"]))
            values = np.asarray(fit(picture, size, "pad", (1, 2, 3)))
            assert len(case["samples"]) == SAMPLES
            assert all(values[y, x].tolist() == rgb for x, y, *rgb in case["samples"])


def test_the_files_are_what_they_say(vectors):
    for entry in vectors["files"]:
        rgb = np.asarray(open_image(base64.b64decode(entry["file"])))
        assert rgb.tobytes() == base64.b64decode(entry["rgb"])
        assert rgb.shape == (entry["height"], entry["width"], 3)
    sizes = {entry["name"]: (entry["width"], entry["height"]) for entry in vectors["files"]}
    assert sizes["on its side"] == sizes["plain"][::-1]


def test_the_profile_has_no_hour_of_its_own():
    assert display_p3()[24:36] == struct.pack(">6H", *DATE)


def test_the_profile_is_display_p3s():
    profile = ImageCms.ImageCmsProfile(io.BytesIO(display_p3()))
    primaries = profile.profile.red_primary[1], profile.profile.green_primary[1]
    # CIE xyY for D50; in sRGB red's x is 0.648.
    assert primaries[0][:2] == pytest.approx((0.68, 0.32), abs=0.003)
    assert primaries[1][:2] == pytest.approx((0.288, 0.684), abs=0.02)
