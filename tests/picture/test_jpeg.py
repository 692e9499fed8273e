"""JPEGs decoded straight into an array: Pillow's bytes, and Pillow's verdict on what is amiss."""

import gc
import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlx_vlm_edge import kernels
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.picture import jpeg
from mlx_vlm_edge.picture.image import open_image, open_picture


def content(width, height, seed=0, mode="RGB", **options):
    across, down = np.arange(width), np.arange(height)[:, None]
    waves = [np.sin(across / 9 + k) * 60 + np.cos(down / 7) * 60 + 128 for k in range(3)]
    noise = np.random.default_rng(seed).normal(0, 12, (height, width, 3))
    levels = (np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def pillow(source):
    with Image.open(io.BytesIO(source)) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.fixture
def decoded(monkeypatch):
    """Whether each picture was decoded into the array."""
    done, decode = [], jpeg.decode
    monkeypatch.setattr(jpeg, "decode", lambda *what: done.append(decode(*what)) or done[-1])
    return done


def both(source):
    with kernels.plain():
        there = np.array(open_picture(source).data)
    host = np.asarray(open_image(source))
    assert np.array_equal(host, there)
    return host


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 100), st.sampled_from([0, 1, 2]),
       st.booleans(), st.booleans(), st.sampled_from([0, 3]))  # fmt: skip
def test_every_byte_is_pillow_s(width, height, quality, sampling, progressive, optimize, restart):
    source = content(width, height, quality=quality, subsampling=sampling, optimize=optimize,
                     progressive=progressive, restart_marker_blocks=restart)  # fmt: skip
    assert np.array_equal(both(source), pillow(source))


def test_what_is_a_plain_photo_is_decoded_into_the_array(decoded, tmp_path):
    path = tmp_path / "photo"
    path.write_bytes(content(90, 70))
    both(content(90, 70))
    both(path)
    assert decoded == [True] * 4


def test_the_first_picture_of_several_in_a_file(decoded):
    file, more = io.BytesIO(), Image.open(io.BytesIO(content(50, 40, 1)))
    Image.open(io.BytesIO(content(60, 50))).save(file, "MPO", save_all=True, append_images=[more])
    assert Image.open(file).format == "MPO"
    assert np.array_equal(both(file.getvalue()), pillow(file.getvalue()))
    assert decoded == [True] * 2


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colours_are_left_to_pillow(mode, decoded):
    source = content(40, 30, mode=mode)
    assert np.array_equal(both(source), pillow(source))
    assert decoded == []


def test_a_file_much_larger_than_its_picture_is_not_read_at_once(tmp_path, decoded):
    source = content(40, 30)
    path = tmp_path / "photo"
    path.write_bytes(source + bytes(40 * 30 * jpeg.DENSEST + jpeg.HEAD))
    assert np.array_equal(both(path), pillow(source))
    assert decoded == []


def message(source):
    with pytest.raises(UsageError) as caught:
        both(source)
    return str(caught.value)


def test_pillow_decides_what_is_damaged(decoded):
    whole = content(300, 200)
    assert "truncated" in message(whole[: len(whole) // 2])
    assert decoded == [False]
    spoiled = bytearray(whole)
    spoiled[len(whole) // 2 : len(whole) // 2 + 40] = bytes(range(40))
    assert np.array_equal(both(bytes(spoiled)), pillow(bytes(spoiled)))
    assert np.array_equal(both(whole + b"more"), pillow(whole))


def test_a_header_that_says_more_than_may_be_is_refused_before_anything_is_decoded(decoded):
    source = bytearray(content(64, 64))
    at = source.index(b"\xff\xc0")
    source[at + 5 : at + 9] = struct.pack(">HH", 65_000, 65_000)
    assert "limit" in message(bytes(source))
    assert decoded == []


def test_without_the_library_pillow_decodes(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "simplejpeg", None)
    source = content(64, 48)
    assert np.array_equal(both(source), pillow(source))


def test_pixels_lie_where_they_were_decoded(monkeypatch):
    """No copy: the picture is the array, in another mode."""
    source, buffers, decode = content(64, 48), [], jpeg.decode
    monkeypatch.setattr(jpeg, "decode", lambda *what: buffers.append(what[1]) or decode(*what))
    picture = open_image(source)
    gc.collect()
    assert picture.mode == "RGB"
    before = picture.getpixel((5, 6))
    buffers[0][6, 5, :3] += 1
    assert picture.getpixel((5, 6)) == tuple((level + 1) % 256 for level in before)
