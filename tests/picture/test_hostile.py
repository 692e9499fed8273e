"""Small pictures and slow servers that once cost minutes, gigabytes, or started a program."""

import contextlib
import gc
import io
import shutil
import socket
import struct
import subprocess
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.picture import fetch, image, rgb, video
from mlx_vlm_edge.picture.image import open_image
from mlx_vlm_edge.picture.pdf import Page
from mlx_vlm_edge.picture.tiling import single
from mlx_vlm_edge.picture.video import Video, read_video

HOSTILE = Path(__file__).parent / "hostile"


def message(source):
    with pytest.raises(UsageError) as caught:
        open_image(source)
    text = str(caught.value)
    assert "\n" not in text
    assert text.isprintable()
    return text


# Programs


def test_postscript_is_never_run(monkeypatch, tmp_path):
    def started(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(subprocess, "check_call", started)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    program = HOSTILE / "eps_named.jpg"
    assert "in no format known" in message(program)
    assert "in no format known" in message(program.read_bytes())
    assert "PostScript" in message(Image.open(program))
    for index in range(2):
        shutil.copy(program, tmp_path / f"{index}.png")
    with pytest.raises(UsageError, match="in no format known"):
        read_video(Video(tmp_path), 1.0, 4)
    with pytest.raises(UsageError):
        read_video(Video(program), 1.0, 4)


@pytest.mark.parametrize("form", ["DDS", "BLP", "PSD", "FITS"])
def test_formats_that_are_not_read_are_not_decoded(form):
    heads = {"DDS": b"DDS |\0\0\0", "BLP": b"BLP2", "PSD": b"8BPS\0\1", "FITS": b"SIMPLE  ="}
    assert "in no format known" in message(heads[form] + bytes(200))


@pytest.mark.parametrize("form", ["AVIF", "JPEG2000", "TGA", "ICO", "PCX", "QOI", "SGI", "HEIF"])
def test_rarer_formats_whole_and_damaged(form):
    if form == "HEIF":
        pytest.importorskip("pi_heif").register_heif_opener()
    Image.init()
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    try:
        Image.fromarray(pixels).save(buffer, form)
    except (KeyError, OSError, RuntimeError) as error:
        pytest.skip(f"this Pillow writes no {form}: {error}")
    content = buffer.getvalue()
    assert open_image(content).size == (32, 32)
    rng = np.random.default_rng(1)
    for _ in range(30):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[rng.integers(12, len(damaged), 5)] = rng.integers(0, 256, 5)
        for data in (damaged.tobytes(), content[: rng.integers(12, len(content))]):
            try:
                open_image(data)
            except UsageError as error:
                assert "\n" not in str(error)  # noqa: PT017  (either outcome is right)


# Memory


def test_a_side_beyond_the_limit_is_refused_by_the_header(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", None)
    assert "no side may be longer" in message(HOSTILE / "178956970x1.png")


@pytest.mark.parametrize("mode", ["LA", "RGBA", "I;16", "PA"])
def test_a_conversion_holds_one_copy_and_a_strip(mode, monkeypatch):
    picture = Image.new("LA" if mode == "PA" else mode, (200, 300)).convert(mode)
    sizes: list[int] = []
    monkeypatch.setattr(rgb, "STRIP", 2000)
    core_new = Image.Image._new

    def counted(self, core):
        sizes.append(core.size[0] * core.size[1])
        return core_new(self, core)

    monkeypatch.setattr(Image.Image, "_new", counted)
    assert open_image(picture).size == (200, 300)
    assert sorted(sizes)[-1] == 200 * 300
    assert sorted(sizes)[-2] <= 2000


def test_no_two_whole_frames_of_an_animation_are_held(tmp_path):
    path, alive = tmp_path / "a.gif", []
    frames = [Image.new("RGB", (40, 30), (index * 30, 0, 0)) for index in range(8)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000)

    def small(frame):
        gc.collect()
        assert not any(reference() for reference in alive)
        alive.append(weakref.ref(frame))
        return single(frame, 16, 16)

    clip = read_video(Video(path), 1.0, 64, small)
    assert [tile.shape for tile in clip.frames] == [(1, 16, 16, 3)] * 8
    assert clip.size == (40, 30)


def test_an_animation_of_too_many_pixels_is_refused_on_the_way(monkeypatch):
    """64 frames of 4000 x 4000 pixels in 1.5 kB."""
    monkeypatch.setattr(video, "MAX_GIF", 16_000_000 * 3)
    with pytest.raises(UsageError, match="million pixels together"):
        read_video(Video(HOSTILE / "frames4000x64.gif"), 1.0, 1)


def test_tall_pictures_are_read(monkeypatch):
    assert open_image(HOSTILE / "1x1000000.png").size == (1, 1_000_000)
    assert open_image(HOSTILE / "56x43048.gif").size == (56, 43048)


def test_a_pillow_image_has_the_same_limits(monkeypatch):
    monkeypatch.setattr(image, "MAX_PIXELS", 99)
    assert "limit" in message(Image.new("RGB", (10, 10)))


# Sources


def test_open_files_and_file_addresses(tmp_path):
    path = tmp_path / "ä b.png"
    Image.new("RGB", (3, 2)).save(path)
    with path.open("rb") as file:
        assert open_image(file).size == (3, 2)
    assert open_image(io.BytesIO(path.read_bytes())).size == (3, 2)
    assert open_image(path.as_uri()).size == (3, 2)
    assert open_image(f"file://{path}").size == (3, 2)
    assert "another machine" in message("file://host/a.png")
    assert "no such file" in message("file:///no/such.png")
    assert "mode 'rb'" in message(io.StringIO("x"))


def test_addresses_are_sent_in_ascii():
    assert fetch.ascii_url("http://bücher.example/ä b.png?q=ü#x") == (
        "http://xn--bcher-kva.example/%C3%A4%20b.png?q=%C3%BC#x"
    )
    whole = "https://u:p@example.org:8080/a%20b/c;d,e?f=g&h=%2F"
    assert fetch.ascii_url(whole) == whole
    assert "cannot be fetched" in message("http://\udcff.example/a.png")
    assert "cannot be fetched" in message("http://exa\nmple.org:bad/a.png")
    assert "characters" in message("http://example.org/" + "a" * 20_000)


@pytest.mark.parametrize("address", ["http://example.org", "https://example.org", "HTTPS://a.b"])
def test_these_addresses_may_be_asked(address):
    fetch._check_scheme(address, address)


@pytest.mark.parametrize("address", ["ftp://example.org/a.png", "gopher://a/b", "httpx://a/b"])
def test_no_other_addresses_are_asked(address):
    assert "only http, https and file" in message(address)


def test_control_characters_of_a_name_are_not_shown():
    assert "?[31m" in message("\x1b[31m.png")


def test_pages_of_a_pdf(tmp_path):
    pytest.importorskip("pypdfium2", reason="PDF pages need pypdfium2 (the `pdf` extra)")
    path = tmp_path / "two.pdf"
    sheets = [Image.new("RGB", (200, 100), color) for color in ("red", "blue")]
    sheets[0].save(path, save_all=True, append_images=sheets[1:])
    page = open_image(Page(path, 2))
    assert page.size == (2048, 1024)
    assert page.getpixel((900, 500))[2] > 240
    assert "2 pages" in message(path)
    assert "generate --page N; picture.pdf.Page in Python" in message(path)
    assert "no page 3" in message(Page(path, 3))
    sheets[0].save(path)
    assert open_image(path.read_bytes()).getpixel((900, 500))[0] > 240
    assert "cannot be read as a PDF" in message(b"%PDF-1.7 nothing")
    with pytest.raises(UsageError, match="counted from 1"):
        Page(path, 0)
    picture = tmp_path / "a.png"
    sheets[0].save(picture)
    assert "alone has pages" in message(Page(picture, 1))


def test_one_thread_at_a_time_is_in_pdfium(monkeypatch):
    """pypdfium2's documents: the library is not for several threads, whatever they read."""
    inside, most = [], []
    meeting = threading.Barrier(2)

    class Document(list):
        def __init__(self, source):
            super().__init__([self])

        def __enter__(self):
            inside.append(self)
            with contextlib.suppress(threading.BrokenBarrierError):
                meeting.wait(0.2)  # for another thread to get in as well
            return self

        def __exit__(self, *_):
            inside.remove(self)

        def get_size(self):
            most.append(len(inside))
            return 1, 1

        def render(self, scale):
            return self

        def to_pil(self):
            return Image.new("RGB", (1, 1))

        def close(self):
            most.append(len(inside))

    fake = SimpleNamespace(PdfDocument=Document, PdfiumError=ZeroDivisionError)
    monkeypatch.setitem(__import__("sys").modules, "pypdfium2", fake)
    with ThreadPoolExecutor(2) as pool:
        assert [page.size for page in pool.map(open_image, [b"%PDF-1.7"] * 2)] == [(1, 1)] * 2
    assert set(most) == {1}


def test_a_pdf_names_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pypdfium2", None)
    assert "pip install pypdfium2" in message(b"%PDF-1.7 ...")


# Servers


DRIPS = {
    "status": (b"", b"HTTP/1.1 200 OK "),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"x"),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "redirect": (b"HTTP/1.1 302 Go\r\nLocation: /a\r\n\r\n", b"x"),
}


@pytest.fixture
def dripping(monkeypatch):
    """A server that sends a little, again and again, for ever: its start, then its drip."""
    monkeypatch.setenv("no_proxy", "*")
    listener = socket.create_server(("127.0.0.1", 0))
    stopped = threading.Event()
    sent = {}

    def serve():
        while not stopped.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(4096)
                    connection.sendall(sent["start"])
                    while not stopped.wait(0.01):
                        connection.sendall(sent["drip"])
                except OSError:
                    continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield sent, f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
    stopped.set()
    listener.close()


@pytest.mark.parametrize("part", DRIPS)
def test_one_deadline_for_all_that_a_server_sends(part, dripping, monkeypatch):
    sent, address = dripping
    sent["start"], sent["drip"] = DRIPS[part]
    monkeypatch.setattr(fetch, "DOWNLOAD_TIMEOUT", 0.2)
    assert "took longer than 0.2 s" in message(address)


def test_an_announced_size_is_refused_before_it_is_read(dripping, monkeypatch):
    sent, address = dripping
    sent["start"], sent["drip"] = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", b"x"
    assert "larger than 64 MB" in message(address)


def test_headers_count_as_well(dripping, monkeypatch):
    sent, address = dripping
    monkeypatch.setattr(fetch, "MAX_DOWNLOAD", 1 << 12)
    sent["drip"] = b"HTTP/1.1 100 Continue\r\n\r\n" * 50
    sent["start"] = b""
    assert "larger than" in message(address)


def test_a_png_of_a_lying_size_is_one_line():
    header = b"IHDR" + struct.pack(">II", 2**31 - 1, 1) + b"\x08\x02\0\0\0"
    assert message(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + bytes(4))
