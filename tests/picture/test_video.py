"""Videos as frames: which are taken, from a folder, a GIF or a film, and what SmolVLM2 is told."""

import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_edge import load
from mlx_vlm_edge.cli import batch
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.picture.video import Video, chosen_frames, number_in_words, read_video


def shade(index):
    """A frame that tells its number by its colour."""
    return Image.new("RGB", (40, 30), (index * 5, 255 - index * 5, 128))


@pytest.fixture
def folder(tmp_path):
    for index in range(12):
        shade(index).save(tmp_path / f"frame{index}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    return tmp_path


@pytest.fixture
def gif(tmp_path):
    frames = [shade(index) for index in range(30)]
    path = tmp_path / "clip.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=200)
    return path


def numbers(clip):
    """The numbers of the frames, read back from their colours."""
    return [round(np.asarray(frame)[0, 0, 0] / 5) for frame in clip.frames]


@pytest.mark.parametrize(
    ("total", "duration", "fps", "limit"),
    [(50, 5.0, 1.0, 64), (300, 10.0, 2.0, 64), (3000, 100.0, 1.0, 8), (1, 0.04, 1.0, 64),
     (10, 100.0, 1.0, 64), (2400, 100.0, 1.0, 64), (7, 3.3, 30.0, 64),
     (100, 5.7, 1.0, 64), (100, 2.5, 1.0, 64), (60, 6.0, 1.0, 4), (61, 6.1, 1.0, 4)],
)  # fmt: skip
def test_the_reference_takes_the_same_frames(total, duration, fps, limit):
    from ..reference import torchvision_shim

    torchvision_shim.install()
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
    from transformers.video_utils import VideoMetadata

    metadata = VideoMetadata(total_num_frames=total, fps=total / duration, duration=duration)
    want = SmolVLMVideoProcessor.sample_frames(None, metadata, num_frames=limit, fps=fps)
    assert chosen_frames(total, duration, fps, limit) == want.tolist()


def test_the_worked_example():
    assert chosen_frames(50, 5.0, 1.0, 64) == [0, 12, 24, 36, 49]


def test_a_folder_is_read_in_the_order_of_its_numbers(folder):
    clip = read_video(Video(folder, fps=2), 1.0, 64)
    assert numbers(clip) == list(range(12))
    assert clip.times == [index / 2 for index in range(12)]
    assert clip.duration == 6
    assert numbers(read_video(Video(folder), 1.0, 4)) == [1, 4, 7, 11]  # not the first second


def test_frames_have_the_names_that_pictures_of_a_batch_have(tmp_path):
    """What a frame is, its content decides."""
    for index, suffix in enumerate((".png", ".avif", ".HEIF", ".heic", ".jpeg")):
        shade(index).save(tmp_path / f"{index}{suffix}", format="PNG")
    (tmp_path / "5.txt").write_text("no picture")
    assert numbers(read_video(Video(tmp_path, fps=1), 1.0, 64)) == list(range(5))
    assert batch._named(str(tmp_path)) == [str(path) for path in sorted(tmp_path.iterdir())[:5]]


def test_frames_of_a_gif_that_say_no_time_are_shown_as_viewers_show_them(tmp_path):
    path = tmp_path / "clip.gif"
    shade(0).save(path, save_all=True, append_images=[shade(index) for index in range(1, 20)])
    assert read_video(Video(path), 1.0, 64).duration == pytest.approx(2.0)


def test_a_gif_has_its_own_clock(gif):
    clip = read_video(Video(gif), 1.0, 64)
    assert clip.duration == pytest.approx(6.0)
    assert numbers(clip) == chosen_frames(30, 6.0, 1.0, 64)
    assert clip.times == pytest.approx([index * 0.2 for index in numbers(clip)])
    assert len(read_video(Video(gif, fps=3), 1.0, 64).frames) == 18
    assert all(frame.mode == "RGB" for frame in clip.frames)


def test_a_film_is_read_with_pyav(tmp_path):
    av = pytest.importorskip("av", reason="films need PyAV (the `video` extra)")
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.bit_rate = 4_000_000
        for index in range(40):
            frame = av.VideoFrame.from_image(shade(index).resize((64, 48)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = read_video(Video(path, fps=2), 1.0, 64)
    assert clip.duration == pytest.approx(4.0)
    assert len(clip.frames) == 8
    near = np.abs(np.array(numbers(clip)) - chosen_frames(40, 4.0, 2.0, 64))
    assert near.max() <= 2  # its colours are compressed


UPRIGHT = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


@pytest.mark.parametrize("turned", UPRIGHT)
def test_a_film_is_turned_as_it_says(tmp_path, turned):
    """As phones film: what lies on its side in the file has a matrix that turns it, clockwise.

    ISO/IEC 14496-12, 8.3.2: the track header's matrix, a b u c d v x y w in 16.16 and 2.30."""
    av = pytest.importorskip("av", reason="films need PyAV (the `video` extra)")
    path = tmp_path / "film.mp4"
    scene = Image.new("RGB", (64, 32), "blue")
    scene.paste((255, 0, 0), (0, 0, 32, 32))  # the left half
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_image(scene)))
        container.mux(stream.encode())
    content = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in UPRIGHT[turned])
    at = content.index(b"tkhd") + 4 + 40
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    clip = read_video(Video(path), 1.0, 64)
    want = scene.rotate(-turned, expand=True)
    assert clip.size == clip.frames[0].size == want.size
    assert np.abs(np.asarray(clip.frames[0], np.int32) - np.asarray(want)).mean() < 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "none.gif", "no such file or folder"),
        (lambda path: "~nouser/x", "~nouser/x: no such file or folder"),
        (lambda path: "a" * 5000, "cannot be read"),
        (lambda path: path, "no frames in it"),
        (
            lambda path: _written(path / "clip.gif", b"GIF89a" + b"\0" * 20),
            "cannot be decoded|not an",
        ),
        (
            lambda path: _written(path / "clip.mp4", b"\0" * 99),
            "cannot be read as a video|need PyAV",
        ),
    ],
)
def test_what_is_no_video_is_refused(tmp_path, make, message):
    with pytest.raises(UsageError, match=message):
        read_video(Video(make(tmp_path)), 1.0, 64)


def _written(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("fps", [0, -1, 1000, 10**400, float("inf")])
def test_a_rate_that_cannot_be_is_refused(fps):
    with pytest.raises(UsageError, match="fps"):
        Video("clip.gif", fps=fps)


def test_numbers_in_words():
    words = {0: "zero", 8: "eight", 13: "thirteen", 20: "twenty", 42: "forty-two", 64: "sixty-four",
             100: "one hundred", 105: "one hundred and five"}  # fmt: skip
    assert {number: number_in_words(number) for number in words} == words


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models of both types: one trained on videos, one not."""
    from ..reference import idefics3 as theirs

    folders = {}
    for name in ("smolvlm", "idefics3"):
        case = theirs.CASES[name]
        folders[name] = theirs.save(theirs.build(case), case, tmp_path_factory.mktemp(name))
    return folders


BLOCK = "<fake_token_around_image><global-img>" + "<image>" * 4 + "<fake_token_around_image>"


def test_the_prompt_of_a_video_and_its_pixels(models, folder):
    model, processor = load(str(models["smolvlm"]))
    inputs = processor("What happens?", images=[Video(folder, fps=0.1)])
    text = processor.tokenizer.decode(inputs.input_ids[0].tolist(), skip_special=False)
    frames = "".join(
        f"\nFrame from {second // 60:02d}:{second % 60:02d}:{BLOCK}" for second in range(0, 120, 10)
    )
    assert text == (
        "<|im_start|>User: You are provided the following series of twelve frames from a "
        f"0:02:00 [H:MM:SS] video.\n{frames}\n\nWhat happens?<end_of_utterance>\nAssistant:"
    )
    (pixels,) = inputs.pixels
    assert pixels.data.shape == (12, 32, 32, 3)
    (still,) = load(str(models["smolvlm"]), image_strategy="stretch", resolution=32)[1](
        "What?", images=[folder / "frame3.png"]
    ).pixels
    assert np.array_equal(pixels.data[3], still.data[0])
    assert model(inputs).shape == (1, len(inputs.input_ids[0]), 310)


def test_a_video_beside_an_image(models, folder):
    _, processor = load(str(models["smolvlm"]))
    inputs = processor("Same?", images=[folder / "frame1.png", Video(folder, fps=4)])
    assert [len(pixels.data) for pixels in inputs.pixels] == [13, 12]
    assert len(inputs.visual) == 4 * 25
    parts = [{"type": "video"}, {"type": "text", "text": "Same as "}, {"type": "image"}]
    turned = [{"role": "user", "content": parts}]
    inputs = processor(turned, images=[Video(folder, fps=4), folder / "frame1.png"])
    assert [len(pixels.data) for pixels in inputs.pixels] == [12, 13]


def test_a_model_without_videos_says_so(models, folder, native_folder):
    for name in (models["idefics3"], native_folder):
        _, processor = load(str(name))
        with pytest.raises(UsageError, match="video"):
            processor("What happens?", images=[Video(folder)])


def test_pyav_is_not_imported_for_gifs(gif):
    code = (
        "import sys; from mlx_vlm_edge.picture.video import Video, read_video; "
        f"read_video(Video({str(gif)!r}), 1.0, 64); assert 'av' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
