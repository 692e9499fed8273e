"""ImageIO by way of pyobjc, with a stand-in for Quartz: which calls, which layouts, which refusals.

Nobody has seen the real one; `doctor --selftest` holds it to Pillow's pixels on the user's Mac.
"""

import io
import sys
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_edge.doctor import pixels
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.loading.load import LoadOptions, start_loading
from mlx_vlm_edge.picture import imageio
from mlx_vlm_edge.picture.image import open_image

SIZE = (37, 23)


@pytest.fixture(scope="module")
def content():
    noise = np.random.default_rng(1).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
    written = io.BytesIO()
    Image.fromarray(noise).save(written, "JPEG", quality=95)
    return written.getvalue()


class Quartz(ModuleType):
    """What of Quartz is called, over Pillow's pixels, each row with some bytes behind it."""

    def __init__(self, channels=4, info=5, order=0, change=lambda levels: levels):
        super().__init__("Quartz")
        self.calls, self.channels, self.info, self.change = [], channels, info | order, change

    def CGImageSourceCreateWithData(self, data, options):  # noqa: N802
        self.calls.append("source")
        return data if data[:2] == b"\xff\xd8" else None

    def CGImageSourceCreateImageAtIndex(self, source, index, options):  # noqa: N802
        self.calls.append(f"image {index}")
        return self.change(np.asarray(Image.open(io.BytesIO(source))))

    def CGImageGetWidth(self, image):  # noqa: N802
        return image.shape[1]

    def CGImageGetHeight(self, image):  # noqa: N802
        return image.shape[0]

    def CGImageGetBitsPerComponent(self, image):  # noqa: N802
        return 8

    def CGImageGetBitsPerPixel(self, image):  # noqa: N802
        return 8 * self.channels

    def CGImageGetBytesPerRow(self, image):  # noqa: N802
        return self.channels * image.shape[1] + 12

    def CGImageGetBitmapInfo(self, image):  # noqa: N802
        return self.info

    def CGImageGetDataProvider(self, image):  # noqa: N802
        return image

    def CGDataProviderCopyData(self, image):  # noqa: N802
        self.calls.append("data")
        height, width, _ = image.shape
        rows = np.full((height, width, self.channels), 7, np.uint8)
        rows[..., :3] = image
        behind = np.zeros((height, 12), np.uint8)
        return np.concatenate([rows.reshape(height, -1), behind], axis=1).tobytes()[:-12]


@pytest.fixture
def on_a_mac(monkeypatch):
    """A Mac with a Quartz; and the option, unless a test takes it away."""

    def install(quartz):
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setitem(sys.modules, "Quartz", quartz)
        monkeypatch.setattr(imageio, "find_spec", lambda name: quartz)
        monkeypatch.setenv(imageio.VARIABLE, "ImageIO")
        return quartz

    return install


@pytest.mark.parametrize(
    ("channels", "info", "order"), [(4, 5, 0), (4, 5, 0x4000), (3, 0, 0)], ids=str
)
def test_pixels_are_those_of_the_image_in_its_own_order_of_calls(
    content, on_a_mac, channels, info, order
):
    quartz = on_a_mac(Quartz(channels, info, order))
    image = open_image(content)
    assert quartz.calls == ["source", "image 0", "data"]
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(content))))


def test_it_is_turned_as_without_it(content, on_a_mac):
    image = Image.open(io.BytesIO(content))
    exif = image.getexif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    image.save(turned, "JPEG", exif=exif, quality="keep")
    want = np.asarray(open_image(turned.getvalue()))
    on_a_mac(Quartz())
    assert np.array_equal(np.asarray(open_image(turned.getvalue())), want)
    assert want.shape == (*SIZE, 3)


@pytest.mark.parametrize(
    "quartz",
    [
        Quartz(4, 2),  # alpha first
        Quartz(4, 5, 0x2000),  # blue first
        Quartz(2, 0),
        Quartz(change=lambda levels: levels[1:]),
    ],
    ids=["alpha first", "little-endian", "16 bits", "another size"],
)
def test_what_lies_otherwise_is_left_to_pillow_and_that_is_told(content, on_a_mac, quartz, capsys):
    want = np.asarray(open_image(content))
    on_a_mac(quartz)
    assert np.array_equal(np.asarray(open_image(content)), want)
    assert capsys.readouterr().err.count("Pillow decodes it") == 1
    assert "data" not in quartz.calls


def test_only_who_asks_has_it(content, on_a_mac, monkeypatch):
    quartz = on_a_mac(Quartz())
    monkeypatch.delenv(imageio.VARIABLE)
    open_image(content)
    assert quartz.calls == []


@pytest.mark.parametrize(
    ("platform", "word", "said"),
    [
        ("linux", "imageio", "ImageIO is macOS's"),
        ("darwin", "imageio", "pip install pyobjc-framework-Quartz"),
        ("darwin", "magick", "imageio is known"),
    ],
)
def test_where_it_cannot_be_had_one_line_says_so_before_a_model_is_looked_for(
    content, monkeypatch, platform, word, said
):
    monkeypatch.setattr(imageio.sys, "platform", platform)
    monkeypatch.setattr(imageio, "find_spec", lambda name: None)
    monkeypatch.setenv(imageio.VARIABLE, word)
    with pytest.raises(UsageError, match=said):
        open_image(content)
    with pytest.raises(UsageError, match=said):
        start_loading("no-such-model", LoadOptions())


@pytest.mark.parametrize(
    ("change", "right", "said"),
    [
        (lambda levels: levels, True, "every byte is Pillow's"),
        (lambda levels: levels ^ 1, True, "off by 1.00 levels on average, at most 1"),
        (lambda levels: levels[..., ::-1], False, "2 are taken"),
        (lambda levels: levels[::-1], False, "2 are taken"),
        (lambda levels: levels[1:], False, "not decoded"),
    ],
    ids=["equal", "near", "blue first", "upside down", "cropped"],
)
def test_the_selftest_judges_its_pixels(on_a_mac, change, right, said):
    on_a_mac(Quartz(change=change))
    (outcome,) = [check for check in pixels.pictures([]) if check[0] == "a JPEG by ImageIO"]
    assert outcome[1] is right
    assert said in outcome[2]


def test_the_selftest_says_where_there_is_none():
    (outcome,) = [check for check in pixels.pictures([]) if check[0] == "a JPEG by ImageIO"]
    assert outcome[1:] == (None, imageio.lacking())
