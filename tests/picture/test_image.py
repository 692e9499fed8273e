"""Pictures from every source and in every pixel format, and the three ways to the model's size."""

import base64
import http.server
import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, features

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.picture import fetch, image, resize
from mlx_vlm_edge.picture.image import fit, open_image

from ..reference import torchvision_shim

CLIP_FILL = (122, 116, 104)
ODD_SIZES = [(37, 53), (53, 37), (64, 64), (300, 7), (7, 300), (101, 100), (640, 481), (33, 1)]


def noise(width, height, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(picture, form="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def message(source):
    with pytest.raises(UsageError) as caught:
        open_image(source)
    text = str(caught.value)
    assert "\n" not in text
    return text


# Sources


def test_every_source_gives_the_same_pixels(tmp_path):
    pixels = noise(21, 13)
    content = png(Image.fromarray(pixels))
    path = tmp_path / "a picture"  # no suffix: the content decides
    path.write_bytes(content)
    uri = "data:text/html;base64," + base64.b64encode(content).decode()
    for source in (path, str(path), content, bytearray(content), uri, Image.open(path), pixels):
        assert np.array_equal(np.asarray(open_image(source)), pixels)


def test_data_uris():
    content = png(Image.fromarray(noise(5, 4)))
    packed = base64.urlsafe_b64encode(content).decode().rstrip("=")
    percent = "data:image/png," + "".join(f"%{byte:02x}" for byte in content)
    for uri in (
        f"data:;base64,{packed}",
        f"DATA:image/jpeg;BASE64,{packed[:8]}\n{packed[8:]}",
        percent,
    ):
        assert open_image(uri).size == (5, 4)
    assert "base64" in message("data:image/png;base64,!!!")
    assert "comma" in message("data:image/png")


class Site(http.server.BaseHTTPRequestHandler):
    content = png(Image.fromarray(noise(6, 3)))

    def do_GET(self):
        place = self.path.strip("/")
        if place == "loop" or place == "away":
            self.send_response(302)
            self.send_header("Location", "/loop" if place == "loop" else "ftp://127.0.0.1/a.png")
            self.end_headers()
            return
        self.send_response(404 if place == "lost" else 200)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        for _ in range(20 if place == "slow" else 1):
            self.wfile.write(b"x" * 5000 if place in ("big", "slow") else self.content)
            time.sleep(0.02 if place == "slow" else 0)

    def log_message(self, *_):
        pass


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_urls(site, monkeypatch):
    assert open_image(f"{site}/picture").size == (6, 3)
    assert "404" in message(f"{site}/lost")
    assert "cannot be fetched" in message("http://127.0.0.1:1/closed.png")
    assert "only http" in message(f"{site}/away")
    assert "only http" in message("ftp://example.org/a.png")
    assert "302" in message(f"{site}/loop")
    assert "cannot be fetched" in message("http://[bad/")
    monkeypatch.setattr(fetch, "MAX_DOWNLOAD", 2**12)
    assert "larger than" in message(f"{site}/big")
    monkeypatch.setattr(fetch, "MAX_DOWNLOAD", 2**26)
    monkeypatch.setattr(fetch, "DOWNLOAD_TIMEOUT", 0)
    assert "took longer" in message(f"{site}/slow")


def test_unreadable_sources_are_one_line_with_the_name(tmp_path):
    empty = tmp_path / "empty.png"
    empty.touch()
    text = tmp_path / "notes.jpg"
    text.write_text("not a picture at all")
    assert "empty.png: is empty" in message(empty)
    assert "notes.jpg: not an image" in message(text)
    assert "directory" in message(tmp_path)
    assert "gone.png: no such file" in message(tmp_path / "gone.png")
    assert "name is empty" in message("")
    assert message("a\0b.png")
    assert "regular" in message("/dev/null")
    assert "is empty" in message(b"")
    assert "cannot read an image from int" in message(3)
    assert "..." in message("x" * 5000)
    assert len(message("x" * 5000)) < 200


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_and_damaged_files_never_pass_or_crash(form, tmp_path):
    content = png(Image.fromarray(noise(64, 48)), form)
    path = tmp_path / f"cut.{form.lower()}"
    path.write_bytes(content[: len(content) // 2])
    assert "cut." in message(path)
    rng = np.random.default_rng(1)
    for _ in range(60):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[rng.integers(0, min(len(damaged), 200), 5)] = rng.integers(0, 256, 5)
        try:
            open_image(damaged.tobytes())
        except UsageError as error:
            assert "\n" not in str(error)  # noqa: PT017  (either outcome is right)


def test_heic_names_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pi_heif", None)
    assert "pip install" in message(b"\0\0\0\x18ftypheic" + bytes(100))


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    from zlib import crc32

    header = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    body = b"IDAT" + bytes(10)
    chunks = [
        len(part[4:]).to_bytes(4, "big") + part + crc32(part).to_bytes(4, "big")
        for part in (header, body)
    ]
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    started = time.perf_counter()
    assert "bomb.png" in message(path)
    assert time.perf_counter() - started < 1
    assert "limit" in message(path)


def test_the_pixel_limit(monkeypatch):
    monkeypatch.setattr(image, "MAX_PIXELS", 100)
    assert open_image(noise(10, 10)).size == (10, 10)
    assert "10 x 11 pixels" in message(png(Image.fromarray(noise(10, 11))))
    assert "10 x 11 pixels" in message(noise(10, 11))


# Pixel formats


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(noise(24, 16))
    options = {"lossless": True} if form == "WEBP" else {}
    content = png(picture, form, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert expected.size == ((16, 24) if orientation > 4 else (24, 16))
    assert np.array_equal(np.asarray(open_image(content)), np.asarray(expected))


def test_damaged_exif_does_not_spoil_the_picture():
    content = png(
        Image.fromarray(noise(24, 16)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x07\0"
    )
    assert open_image(content).size == (24, 16)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_alpha_goes_on_white(mode):
    alpha = np.array([[0, 128, 255]], np.uint8)
    picture = Image.fromarray(np.dstack([np.zeros((1, 3, 3), np.uint8), alpha]))
    if mode != "RGBA":
        steps = {"LA": ["LA"], "PA": ["PA"], "RGBa": ["RGBa"], "La": ["LA", "La"]}[mode]
        for step in steps:
            picture = picture.convert(step)
    assert picture.mode == mode
    assert np.asarray(open_image(picture))[0].tolist() == [[255] * 3, [127] * 3, [0] * 3]


def test_transparent_palettes_and_color_keys(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert np.asarray(open_image(png(palette)))[0].tolist() == [[255, 0, 0], [0, 0, 255]]
    for form, transparency in (("PNG", 0), ("PNG", b"\0\xff"), ("GIF", 0)):
        content = png(palette, form, transparency=transparency)
        assert np.asarray(open_image(content))[0].tolist() == [[255, 255, 255], [0, 0, 255]]
    keyed = png(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))
    assert np.asarray(open_image(keyed))[0].tolist() == [[255, 255, 255]]
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 2, 4))
    held_in_the_palette = clear.quantize()
    assert "transparency" not in held_in_the_palette.info
    for source in (held_in_the_palette, png(held_in_the_palette, "WEBP", lossless=True)):
        assert np.asarray(open_image(source))[0, ::3].tolist() == [[0, 0, 255], [255, 255, 255]]
    grey = png(Image.new("L", (1, 1), 7), transparency=7)
    assert np.asarray(open_image(grey))[0].tolist() == [[255, 255, 255]]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(form):
    values = np.array([[0, 128, 257, 32768, 65278, 65535]], np.uint16)
    expected = [0, 0, 1, 128, 254, 255]
    for source in (
        png(Image.fromarray(values), form),
        values,
        Image.fromarray(values.astype(np.int32)),
    ):
        assert np.asarray(open_image(source))[0, :, 0].tolist() == expected
    big_endian = Image.frombytes("I;16B", (6, 1), values.astype(">u2").tobytes())
    assert np.asarray(open_image(big_endian))[0, :, 2].tolist() == expected


def test_grey_bilevel_cmyk_and_animations():
    grey = noise(9, 8, channels=1)
    assert np.array_equal(np.asarray(open_image(png(Image.fromarray(grey))))[:, :, 1], grey)
    bits = Image.fromarray(grey).convert("1")
    assert set(np.unique(np.asarray(open_image(png(bits))))) == {0, 255}
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for source in (cmyk, png(cmyk, "TIFF"), png(cmyk, "JPEG")):
        red = np.asarray(open_image(source))[4, 4]
        assert red[0] > 250
        assert red[1] < 5
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    for form in ("GIF", "PNG", "WEBP"):
        moving = png(frames[0], form, save_all=True, append_images=frames[1:])
        assert np.asarray(open_image(moving))[0, 0].tolist() == pytest.approx([255, 0, 0], abs=3)


def test_arrays():
    assert np.array_equal(
        np.asarray(open_image(noise(5, 4, 1)[:, :, None]))[:, :, 2], noise(5, 4, 1)
    )
    assert open_image(noise(5, 4)[:, ::-1]).size == (5, 4)
    clear = np.dstack([noise(2, 2), np.zeros((2, 2), np.uint8)])
    assert np.asarray(open_image(clear)).min() == 255
    for wrong in (
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros(4, np.uint8),
    ):
        assert "uint8" in message(wrong)
    assert "no pixels" in message(np.zeros((0, 4, 3), np.uint8))
    assert "floating-point" in message(Image.new("F", (2, 2)))


# Sizes


def expand2square(picture, color):
    """As in LLaVA's mm_utils.py."""
    width, height = picture.size
    side = max(width, height)
    square = Image.new(picture.mode, (side, side), color)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("fill", [(0, 0, 0), CLIP_FILL])
def test_pad_equals_padding_the_whole_canvas_first(size, fill, monkeypatch):
    picture = Image.fromarray(noise(*size))
    monkeypatch.setattr(resize, "STRIP", 50)
    for side in (64, 96, 336):
        reference = expand2square(picture, fill).resize((side, side), Image.Resampling.BICUBIC)
        ours = fit(picture, (side, side), "pad", fill)
        assert np.array_equal(np.asarray(ours), np.asarray(reference))


@pytest.fixture(scope="module")
def clip():
    torchvision_shim.install()
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    def process(picture, side):
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            do_rescale=False,
            do_normalize=False,
        )
        pixels = np.asarray(processor(picture, return_tensors="np")["pixel_values"][0])
        return pixels.transpose(1, 2, 0)

    return process


@pytest.mark.parametrize("size", ODD_SIZES[:-1])
def test_center_crop_and_pad_equal_transformers(size, clip):
    picture = Image.fromarray(noise(*size, seed=3))
    for side in (64, 91):
        ours = np.asarray(fit(picture, (side, side), "center_crop"))
        assert np.array_equal(ours, clip(picture, side))
        padded = np.asarray(fit(picture, (side, side), "pad", CLIP_FILL))
        assert np.array_equal(padded, clip(expand2square(picture, CLIP_FILL), side))


def test_targets_that_are_not_square():
    picture = Image.fromarray(noise(40, 30))
    for strategy in ("pad", "center_crop", "stretch"):
        assert fit(picture, (128, 64), strategy).size == (128, 64)
        assert fit(picture, (64, 128), strategy).size == (64, 128)
    padded = np.asarray(fit(picture, (128, 64), "pad"))
    assert padded[:, 0].max() == 0
    assert padded[32, 64].max() > 0
    direct = picture.resize((128, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(fit(picture, (128, 64), "stretch")), np.asarray(direct))


THIN = [(3, 700), (700, 3), (1, 2000), (40, 900), (1, 30), (30, 1), (5000, 11)]


@pytest.mark.parametrize("size", THIN)
@pytest.mark.parametrize("drafted", [False, True])
def test_long_thin_pictures_are_padded_and_cropped_pixel_for_pixel(size, drafted):
    """What is never computed for them is padding, or cut off again."""
    picture = Image.fromarray(noise(*size, seed=5))
    kind = Image.Resampling.HAMMING if drafted else Image.Resampling.BICUBIC
    if drafted:
        picture.info[image.DRAFTED] = True
    for side in (64, 91):
        padded = expand2square(picture, CLIP_FILL).resize((side, side), kind)
        ours = fit(picture, (side, side), "pad", CLIP_FILL)
        assert np.array_equal(np.asarray(ours), np.asarray(padded))
        width, height = size
        wide = width > height
        cover = (int(side * width / height), side) if wide else (side, int(side * height / width))
        left, top = (cover[0] - side) // 2, (cover[1] - side) // 2
        whole = picture.resize(cover, kind)
        cropped = whole.crop((left, top, left + side, top + side))
        ours = fit(picture, (side, side), "center_crop")
        assert np.array_equal(np.asarray(ours), np.asarray(cropped))


@pytest.mark.parametrize("strategy", ["pad", "center_crop"])
def test_a_thread_of_a_million_pixels_costs_what_its_pixels_cost(strategy, monkeypatch):
    """In proportion to its length, not to the square of it: no canvas, nothing enlarged whole."""
    sizes = []
    new = Image.Image._new

    def counted(self, core):
        sizes.append(core.size[0] * core.size[1])
        return new(self, core)

    for size in ((300_000, 1), (1, 300_000)):
        thread = Image.new("RGB", size, (255, 0, 0))
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "_new", counted)
            assert fit(thread, (336, 336), strategy, CLIP_FILL).size == (336, 336)
    assert max(sizes) <= 8 * 300_000


@pytest.mark.parametrize(("side", "want"), [(64, (150, 100)), (200, (300, 200)), (201, (600, 400))])
def test_a_jpeg_may_be_decoded_at_a_part_of_its_size(side, want, tmp_path):
    """As small as no side is below what is asked for; nothing but JPEGs, and only when asked."""
    picture = Image.fromarray(noise(600, 400))
    path = tmp_path / "photo.jpg"
    picture.save(path, quality=90)
    assert open_image(path, side).size == want
    assert open_image(path.read_bytes(), side).size == want
    assert open_image(path).size == (600, 400)
    assert open_image(png(picture), side).size == (600, 400)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(png(picture, "JPEG", exif=exif), side).size == want[::-1]


@pytest.mark.parametrize("size", [(1200, 900), (900, 1200)])
@pytest.mark.parametrize("strategy", ["pad", "center_crop", "stretch"])
def test_no_copy_of_the_whole_picture_is_made(size, strategy, monkeypatch):
    """A photo of 36 MB stays one of 36 MB: every image made on the way to the model is smaller."""
    made = []
    new = Image.Image._new

    def counted(self, core):
        made.append(core.size[0] * core.size[1])
        return new(self, core)

    picture = Image.fromarray(noise(*size))
    monkeypatch.setattr(Image.Image, "_new", counted)
    fit(picture, (128, 128), strategy)
    assert made
    assert max(made) <= size[0] * size[1] * 0.3


def test_import_is_cheap():
    import subprocess
    import sys

    heavy = "PIL", "numpy", "urllib.request"
    code = (
        f"import sys, mlx_vlm_edge.picture.image; print([m for m in {heavy} if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    output = subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True)
    assert output.strip() == "[]"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "JPEG2000", "BMP", "GIF"])
def test_a_header_tells_the_size_of_the_upright_picture(form, orientation, tmp_path, monkeypatch):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / "picture"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(path, form, exif=exif)
    size = image.check_header(str(path))
    assert open_image(path).size == size
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was decoded"))
        assert image.check_header(str(path)) == size
    if form in ("JPEG", "PNG", "WEBP", "TIFF"):
        assert size == ((20, 30) if orientation > 4 else (30, 20))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_png_may_tell_after_its_pixels_how_it_lies(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = png(Image.new("RGB", (30, 20)), exif=exif)
    at = content.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(content[at : at + 4])
    last = content.index(b"IEND") - 4
    moved = content[:at] + content[end:last] + content[at:end] + content[last:]
    size = (20, 30) if orientation == 6 else (30, 20)
    assert image.check_header(moved) == open_image(moved).size == size
