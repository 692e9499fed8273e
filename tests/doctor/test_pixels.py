"""The self-test of pixels: every byte is Pillow's here, and a planted fault is told."""

import pytest

from mlx_vlm_edge.doctor import pixels
from mlx_vlm_edge.doctor.selftest import places
from mlx_vlm_edge.kernels import banded
from mlx_vlm_edge.picture import device, imageio, jpeg


def told():
    truth, others = places()
    return {name: (right, said) for name, right, said in pixels.pictures([truth, *others])}


def test_every_byte_is_pillow_s_here():
    outcomes = told()
    by_imageio, said = outcomes.pop("a JPEG by ImageIO")
    assert by_imageio is (None if imageio.lacking() else True), said
    assert len(outcomes) > 2
    assert {right for right, _ in outcomes.values()} == {True}


@pytest.mark.parametrize(
    ("module", "name", "fault"),
    [
        (device, "height_first", lambda *_: True),
        (banded, "_levels", lambda sums, precision: (sums >> precision).astype(banded.mx.uint8)),
        (banded, "SIGNIFICANT", 2),
    ],
)
def test_a_fault_of_the_device_s_form_is_told(module, name, fault, monkeypatch):
    device._layout.cache_clear()
    monkeypatch.setattr(module, name, fault)
    try:
        wrong = [said for name, (right, said) in told().items() if not right and "resized" in name]
        assert len(wrong) > 1
    finally:
        device._layout.cache_clear()


def test_a_decoder_of_other_bytes_is_told(monkeypatch):
    decode = jpeg.decode

    def spoil(content, buffer):
        done = decode(content, buffer)
        buffer[5, 6, 1] ^= 1
        return done

    monkeypatch.setattr(jpeg, "decode", spoil)
    name = "a JPEG decoded into an array"
    assert told()[name] == (False, "other bytes: on the host, on the device")
    monkeypatch.setattr(jpeg, "decode", lambda *_: False)
    assert told()[name][0] is False
    monkeypatch.setattr(pixels, "find_spec", lambda _: None)
    assert told()[name][0] is None
