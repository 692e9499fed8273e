"""A video as evenly spaced still pictures: a folder of frames, an animated GIF, or (extra) a film.

Which frames are taken follows SmolVLM2: transformers, models/smolvlm/video_processing_smolvlm.py.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..errors import UsageError
from ..paths import expand
from ..system_files import of_the_system
from .image import SHOWN, SUFFIXES, check_size, finding, open_image, reading
from .rgb import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_FRAMES = 100_000  # of a film that is looked at, not of those that are taken
MAX_GIF = 1 << 30  # pixels of all frames, each of which is decoded to get at the next
SKIPPED = 1.0  # seconds left out at both ends of a video too long for the frames allowed
DEFAULT_GIF_FRAME = 0.1  # seconds, where a GIF says 0, as viewers show it
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True)
class Video:
    """A video to give in the place of an image.

    source: a folder of frames (in the order of their numbers), an animated GIF, or a film (.mp4,
    .mov, ...; needs `pip install av`). fps: how many frames to take per second,
    by default what the model was trained with; for a folder, how many frames of it a second has,
    all of which are taken (up to the model's limit).
    """

    kind: ClassVar[str] = "video"  # the type of its part in a chat message
    source: str | Path
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.fps is not None and not 0 < self.fps < 1000:
            shown = self.fps if isinstance(self.fps, int) else f"{self.fps:g}"
            raise UsageError(f"fps {shown}: give the frames per second, above 0 and below 1000")


Prepare = Callable[["Image"], Any]  # what becomes of a frame before the next one is read


class Clip(NamedTuple):
    """The frames that were taken, as they were prepared, the second each is from, the seconds the
    video lasts, and the (width, height) of its first frame."""

    frames: list[Any]
    times: list[float]
    duration: float
    size: tuple[int, int]


def as_it_is(frame: "Image") -> "Image":
    return frame


def chosen_frames(total: int, duration: float, fps: float, limit: int) -> list[int]:
    """Indices of the frames to take of `total`: fps per second, at most `limit`, evenly spaced.

    Of a video that is longer than they can show, the first and the last second are left out.
    chosen_frames(50, 5.0, 1.0, 64) -> [0, 12, 24, 36, 49]
    """
    import numpy as np

    wanted = max(1, min(round(fps * duration), limit))
    first, last = 0, total - 1
    if duration - 2 * SKIPPED > limit * fps:
        per_second = total / duration
        inner = int(SKIPPED * per_second), int(total - SKIPPED * per_second)
        if inner[0] < min(inner[1], last):
            first, last = inner[0], min(inner[1], last)
    spaced = np.unique(np.linspace(first, last, wanted, dtype=int))
    return [int(index) for index in spaced]


def read_video(video: Video, fps: float, limit: int, prepare: Prepare = as_it_is) -> Clip:
    """Take frames of a video: `video.fps` or else `fps` per second, at most `limit` in all.

    prepare: applied to each frame as it is read, so that no two large ones are held.
    Raises UsageError naming the video when it cannot be read or has no frames.
    """
    path = existing(video)
    with finding(str(path)[:SHOWN]):
        head = b"" if path.is_dir() else _head(path)
    if path.is_dir():
        return _folder(path, video.fps or fps, limit, prepare)
    if head in (b"GIF87a", b"GIF89a"):
        return _gif(path, video.fps or fps, limit, prepare)
    return _film(path, video.fps or fps, limit, prepare)


def existing(video: Video) -> Path:
    """A video's path. Raises UsageError when nothing is there."""
    with finding(str(video.source)[:SHOWN]):
        path = expand(video.source)
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder; check the path")
        return path


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(6)


def _folder(path: Path, fps: float, limit: int, prepare: Prepare) -> Clip:
    names = [item for item in path.iterdir() if item.suffix.lower() in SUFFIXES]
    names = [item for item in names if not of_the_system(item.name)]
    names.sort(key=lambda item: _by_number(item.name))
    if not names:
        raise UsageError(f"{path}: no frames in it; a folder as a video holds PNG or JPEG files")
    duration = len(names) / fps
    taken = chosen_frames(len(names), duration, fps, limit)
    first = open_image(names[taken[0]])
    frames = [prepare(open_image(names[index]) if at else first) for at, index in enumerate(taken)]
    return Clip(frames, [index / fps for index in taken], duration, first.size)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts frame2.png before frame10.png."""
    parts: list[str] = re.split(r"(\d+)", name.lower())
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _gif(path: Path, fps: float, limit: int, prepare: Prepare) -> Clip:
    from PIL import Image, ImageSequence

    name = str(path)
    with reading(name), Image.open(path, formats=("GIF",)) as image:
        check_size(image.size, name)
        size, starts = image.size, [0.0]
        for frame in ImageSequence.Iterator(image):
            if len(starts) * size[0] * size[1] > MAX_GIF:
                raise UsageError(
                    f"{name}: its frames of {size[0]:,} x {size[1]:,} are more than "
                    f"{MAX_GIF // 10**6:,} million pixels together: make them smaller"
                )
            starts.append(starts[-1] + (frame.info.get("duration", 0) / 1000 or DEFAULT_GIF_FRAME))
        *starts, duration = starts
        taken = chosen_frames(len(starts), duration, fps, limit)
        frames = []
        for index in taken:
            image.seek(index)
            frame = to_rgb(image)
            frames.append(prepare(frame.copy() if frame is image else frame))
    return Clip(frames, [starts[index] for index in taken], duration, size)


def _film(path: Path, fps: float, limit: int, prepare: Prepare) -> Clip:
    try:
        import av
    except ImportError:
        raise UsageError(
            f"{path}: films other than animated GIFs need PyAV: pip install av"
        ) from None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UsageError(f"{path}: has no pictures, only sound")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 24)
            total = stream.frames or sum(1 for _ in container.decode(stream))
            if not 0 < total <= MAX_FRAMES:
                raise UsageError(
                    f"{path}: {total:,} frames; between 1 and {MAX_FRAMES:,} can be read"
                )
            taken = chosen_frames(total, total / rate, fps, limit)
            container.seek(0)
            size, frames = (0, 0), list[Any]()
            for picture in _pictures(container.decode(video=0), set(taken)):
                size = size if frames else picture.size
                frames.append(prepare(picture))
    except (av.FFmpegError, OSError, ValueError, OverflowError) as error:
        raise UsageError(f"{path}: cannot be read as a video ({error})") from None
    if not frames:
        raise UsageError(f"{path}: none of its frames can be decoded")
    taken = taken[: len(frames)]
    return Clip(frames, [index / rate for index in taken], total / rate, size)


def _pictures(decoded: Iterable[Any], wanted: set[int]) -> "Iterator[Image]":
    """The wanted frames of a film, turned as it says; the others are decoded and let go."""
    last = max(wanted)
    for index, frame in enumerate(decoded):
        if index in wanted:
            picture = frame.to_image().convert("RGB")
            # As a phone held upright films; PyAV counts as Pillow does, counterclockwise.
            yield picture.rotate(frame.rotation, expand=True) if frame.rotation else picture
        if index >= last:
            break


def number_in_words(number: int) -> str:
    """0..999 as SmolVLM2's prompt writes the count of frames: 42 -> "forty-two"."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{_ONES[hundreds]} hundred" + (f" and {number_in_words(rest)}" if rest else "")
