"""Pictures resized on the device, forced onto the CPU here: every byte is Pillow's."""

import io
from threading import Thread

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.Image import Resampling

from mlx_vlm_edge import kernels
from mlx_vlm_edge.kernels import banded
from mlx_vlm_edge.picture import geometry, resize, tiling
from mlx_vlm_edge.picture.device import DeviceImage
from mlx_vlm_edge.picture.image import fit, open_image, open_picture

FILTERS = (Resampling.BILINEAR, Resampling.BICUBIC, Resampling.LANCZOS, Resampling.HAMMING)
SIDE = st.one_of(st.integers(1, 12), st.integers(1, 700))
laws = settings(max_examples=120, deadline=None, derandomize=True)


def drawn(width, height, seed, hard=False):
    """Noise, or pure black and white: then a filter's overshoot is cut off everywhere."""
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return np.where(levels > 127, 255, 0).astype(np.uint8) if hard else levels


def of(levels):
    return DeviceImage(mx.array(levels))


@laws
@given(SIDE, SIDE, st.integers(1, 300), st.integers(1, 300), st.sampled_from(FILTERS),
       st.booleans())  # fmt: skip
def test_a_resize_is_pillow_s_in_every_byte(width, height, w, h, kind, hard):
    levels = drawn(width, height, width * height, hard)
    reference = np.asarray(Image.fromarray(levels).resize((w, h), kind))
    assert np.array_equal(np.array(of(levels).resize((w, h), kind).data), reference)


@pytest.mark.parametrize("kind", FILTERS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    ("size", "target"),
    [((4032, 5), (1024, 2)), ((3, 20_000), (2, 3)), ((20_000, 1), (1, 1)), ((1, 1), (5, 900)),
     ((64, 64), (64, 31)), ((64, 64), (31, 64)), ((64, 64), (64, 64)), ((9000, 3), (6, 2))],
)  # fmt: skip
def test_windows_of_thousands_of_pixels_are_exact_as_well(size, target, kind):
    levels = drawn(*size, 7, hard=True)
    reference = np.asarray(Image.fromarray(levels).resize(target, kind))
    assert np.array_equal(np.array(of(levels).resize(target, kind).data), reference)


@pytest.mark.parametrize("strategy", ["pad", "center_crop", "stretch"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(3, 90), st.integers(3, 90))
def test_fitting_is_that_of_the_host(strategy, width, height, w, h):
    levels, fill = drawn(width, height, width, hard=height % 2 == 0), (9, 250, 77)
    host = np.asarray(fit(Image.fromarray(levels), (w, h), strategy, fill))
    assert np.array_equal(np.array(fit(of(levels), (w, h), strategy, fill).data), host)


@pytest.mark.parametrize("size", [(37, 53), (530, 37), (300, 7), (7, 300), (101, 100), (1, 33)])
def test_tiles_are_those_of_the_host(size):
    levels = drawn(*size, 3)
    host, there = Image.fromarray(levels), of(levels)
    for cut in (
        lambda picture: tiling.split(picture, 96, 32),
        lambda picture: tiling.single(picture, 96, 32),
        lambda picture: tiling.anyres_tiles(picture, 24, [(24, 48), (48, 24), (48, 48)]),
    ):
        assert np.array_equal(np.array(cut(there)), cut(host))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(orientation):
    picture = Image.fromarray(drawn(31, 18, 1))
    exif = picture.getexif()
    exif[274] = orientation
    for form in ("PNG", "JPEG"):
        file = io.BytesIO()
        picture.save(file, form, exif=exif)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue())))
        with kernels.plain():
            there = open_picture(file.getvalue())
        assert np.array_equal(np.array(there.data), np.asarray(upright))


def test_what_is_on_the_device_is_what_the_host_would_read():
    """Whatever the source is, and drafted where that is asked for."""
    photo = io.BytesIO()
    Image.fromarray(drawn(320, 200, 2)).save(photo, "JPEG")
    grey = Image.fromarray(drawn(20, 10, 2)).convert("L")
    for source in (photo.getvalue(), grey, drawn(9, 8, 1)):
        for side in (None, 64):
            host = open_image(source, side)
            with kernels.plain():
                there = open_picture(source, side)
            assert there.size == host.size
            assert np.array_equal(np.array(there.data), np.asarray(host))
            fitted = (np.array(resize.levels(fit(one, (48, 48), "pad"))) for one in (host, there))
            assert np.array_equal(*fitted)
    assert isinstance(open_picture(grey), Image.Image)  # on the CPU they stay with Pillow


def test_another_thread_may_use_the_pixels():
    """A server reads pictures in a request's thread and computes in another."""
    levels = resize.levels(of(drawn(90, 60, 1)).resize((40, 40), Resampling.BICUBIC))
    resize.begin(levels)
    sums = []
    thread = Thread(target=lambda: sums.append(levels.astype(mx.int32).sum().item()))
    thread.start()
    thread.join()
    assert sums == [int(np.array(levels).sum())]


@laws
@given(st.integers(1, 5000), st.integers(1, 400), st.sampled_from(FILTERS))
def test_parts_of_weights_are_exact_in_tf32_and_their_sums_in_float32(total, size, kind):
    """Whatever the order of a sum: no partial sum leaves the whole numbers that float32 has."""
    from mlx_vlm_edge.picture.resample import FILTERS as KERNELS
    from mlx_vlm_edge.picture.resample import PRECISION, Axis

    starts, weights = Axis(total, size, *KERNELS[kind]).taps(0, size)
    laid = banded.bands(starts, weights, total, np.zeros(size, int), PRECISION)
    parts = np.array(laid.matrices).astype(np.int64)
    assert np.array_equal(parts, np.array(laid.matrices))
    assert np.abs(parts).max() <= 1 << 11
    for at in range(0, parts.shape[2], banded.DEEP):
        assert 255 * np.abs(parts[:, :, at : at + banded.DEEP]).sum(2).max() < 1 << 24
    high, low = parts[:, : banded.TOGETHER], parts[:, banded.TOGETHER :]
    whole = (high * laid.step + low).sum(2).reshape(-1)[:size]
    assert np.array_equal(whole, weights.sum(1))


def test_weights_that_cannot_be_exact_are_refused():
    with pytest.raises(ValueError, match="cannot be split"):
        banded.bands(np.zeros(1, int), np.full((1, 3), 1 << 26), 3, np.zeros(1, int), 22)


def test_a_picture_is_uploaded_once_and_nothing_waits(monkeypatch):
    """From bytes to pixels of the model's size: no evaluation, and layouts come from the cache."""
    levels = drawn(400, 300, 5)
    with kernels.plain():
        resize.levels(fit(open_picture(levels), (64, 64), "pad"))
        monkeypatch.setattr(mx, "eval", lambda *arrays: pytest.fail("waits"))
        monkeypatch.setattr(banded, "bands", lambda *what: pytest.fail("computed again"))
        fitted = resize.levels(fit(open_picture(levels), (64, 64), "pad"))
    assert fitted.dtype == mx.uint8


def test_pillow_s_order_of_the_two_sides(monkeypatch):
    """What the wheels of three versions do; the installed one is held to it by the bytes above."""
    cases = [((100, 300), (50, 149)), ((100, 300), (50, 200)), ((2, 300), (2, 100)),
             ((100, 80), (200, 79)), ((100, 80), (200, 81))]  # fmt: skip
    rules = {(12, 1): [0, 0, 0, 0, 0], (12, 2): [0, 0, 1, 0, 0], (13, 0): [1, 0, 1, 1, 0]}
    for version, expected in rules.items():
        monkeypatch.setattr(geometry, "_pillow", lambda version=version: version)
        assert [geometry.height_first(*case) for case in cases] == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(1, 400), st.integers(1, 90), st.integers(1, 90),
       st.sampled_from(FILTERS))  # fmt: skip
def test_strips_in_several_threads_are_pillow_s_resize(width, height, w, h, kind):
    picture = Image.fromarray(drawn(width, height, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resize, "LARGE", 1)
        patch.setattr(resize, "STRIP", 17)
        patch.setattr(resize, "_processors", lambda: 3)
        ours = resize.resized(picture, (w, h), kind)
        fitted = fit(picture, (w, h), "center_crop")
    assert np.array_equal(np.asarray(ours), np.asarray(picture.resize((w, h), kind)))
    cover = geometry.cover_size(picture.size, (w, h))
    left, top = (cover[0] - w) // 2, (cover[1] - h) // 2
    whole = picture.resize(cover, Resampling.BICUBIC).crop((left, top, left + w, top + h))
    assert np.array_equal(np.asarray(fitted), np.asarray(whole))


def test_a_fault_of_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(resize, "_processors", lambda: 2)

    def fail(start, end):
        raise MemoryError

    with pytest.raises(MemoryError):
        resize._in_strips(1000, fail)
