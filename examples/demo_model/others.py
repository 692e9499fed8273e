"""Pictures that other programs draw, never trained on: pictures, questions, right answers.

Pillow's own `text`, matplotlib, Chromium, cairosvg, the package easy-vqa, and photographs.
"""

from __future__ import annotations

import html
import io
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import fonts
import numpy as np
import photos
from colours import COLOURS
from draw import SHAPES
from PIL import Image, ImageDraw, ImageFont
from questions import UNKNOWN, plural
from texts import MAX_TEXT, string

SIDE = 256
CSS = {name: name for name in COLOURS}  # every name is CSS's too
PHOTOGRAPHS = "photographs declined"
CELLS_WIDE = 8  # pictures side by side in one screenshot


@dataclass(frozen=True)
class Case:
    """One question about one picture; `group` is the row of the table it counts in."""

    group: str
    picture: Image.Image
    question: str
    right: str


def text_group(renderer: str, text: str) -> str:
    size = "1 to 6" if len(text.replace(" ", "")) <= 6 else f"7 to {MAX_TEXT}"
    return f"{renderer}, {size}"


def strings(name: str, count: int) -> list[str]:
    """Held-out texts: as many of each length; no single letter whose case cannot be told."""
    result, index = [], 0
    while len(result) < count:
        text = string(Random(f"{name}-{index}"), 1 + len(result) % MAX_TEXT, held_out=True)
        index += 1
        if text.lower() == text.upper() or len(text) > 1 or text not in "cosuvwxzkpOIl":
            result.append(text)
    return result


def legible(rng: Random) -> tuple[str, str]:
    """Names of a text colour and a background: black on white, or any that differ in lightness."""
    if rng.random() < 0.4:
        return "black", "white"
    dark, light = ("black", "blue", "purple", "red", "green", "brown"), ("white", "yellow", "pink")
    one, other = rng.choice(dark), rng.choice(light)
    return (one, other) if rng.random() < 0.6 else (other, one)


def pillow(count: int) -> Iterator[Case]:
    """Pillow's `text` in its default font, left-aligned from a corner, black on white."""
    for index, text in enumerate(strings("pillow", count)):
        rng = Random(f"pillow-{index}-place")
        face = ImageFont.load_default(200)
        most = min(0.92 * SIDE * 200 / face.getlength(text), 110)
        size = rng.uniform(max(18, 0.5 * most), most)
        picture = Image.new("RGB", (SIDE, SIDE), "white")
        y = rng.uniform(4, SIDE - 1.3 * size - 4)
        ImageDraw.Draw(picture).text((10, y), text, fill="black", font=ImageFont.load_default(size))
        yield Case(text_group("Pillow", text), picture, "What does it say?", text)


def matplotlib_texts(count: int) -> Iterator[Case]:
    """`figtext` in matplotlib's default font, in the middle, two colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for index, text in enumerate(strings("matplotlib", count)):
        rng = Random(f"matplotlib-{index}-place")
        colour, ground = legible(rng)
        figure = Figure((SIDE / 100, SIDE / 100), dpi=100, facecolor=CSS[ground])
        canvas = FigureCanvasAgg(figure)
        size = min(60.0, 0.9 * SIDE * 0.72 / (0.66 * len(text))) * rng.uniform(0.6, 1)
        x, y = 0.5 + rng.uniform(-0.03, 0.03), rng.uniform(0.25, 0.75)
        figure.text(x, y, text, color=CSS[colour], fontsize=size, ha="center", va="center")
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        yield Case(text_group("matplotlib", text), picture, "What does it say?", text)
        yield Case("colour of a text", picture, "What color is the text?", colour)
        yield Case("background of a text", picture, "What color is the background?", ground)


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    raise SystemExit("Chromium draws a part of the evaluation: apt-get install chromium")


def screenshot(page: str, width: int, height: int) -> Image.Image:
    """What Chromium shows of an HTML page."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "page.html").write_text(page)
        subprocess.run(
            [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--force-device-scale-factor=1", f"--window-size={width},{height}",
             f"--screenshot={folder}/page.png", f"file://{folder}/page.html"],
            check=True, capture_output=True, timeout=300,
        )  # fmt: skip
        with Image.open(Path(folder) / "page.png") as picture:
            return picture.convert("RGB")


def chromium_texts(count: int) -> Iterator[Case]:
    """Texts on a page, in generic families and in those held out from training."""
    families = ("sans-serif", "serif", "monospace", *fonts.HELD_OUT)
    asked, cells = strings("chromium", count), []
    for index, text in enumerate(asked):
        rng = Random(f"chromium-{index}-place")
        colour, ground = legible(rng)
        size = min(90.0, 0.9 * SIDE / (0.66 * len(text))) * rng.uniform(0.6, 1)
        family = families[index % len(families)]
        cells.append(
            f'<div style="background:{CSS[ground]};color:{CSS[colour]};font:{size:.1f}px '
            f"'{family}',{family};padding-left:{rng.randint(4, 16)}px;"
            f'padding-top:{rng.randint(8, int(SIDE - 1.5 * size))}px">{html.escape(text)}</div>'
        )
    style = (
        f"body{{margin:0;width:{CELLS_WIDE * SIDE}px}}div{{float:left;box-sizing:border-box;"
        f"width:{SIDE}px;height:{SIDE}px;overflow:hidden;white-space:pre;line-height:1.2}}"
    )
    page = f"<!doctype html><style>{style}</style>{''.join(cells)}"
    rows = -(-count // CELLS_WIDE)
    sheet = screenshot(page, CELLS_WIDE * SIDE, rows * SIDE)
    for index, text in enumerate(asked):
        x, y = SIDE * (index % CELLS_WIDE), SIDE * (index // CELLS_WIDE)
        picture = sheet.crop((x, y, x + SIDE, y + SIDE))
        yield Case(text_group("Chromium", text), picture, "What does it say?", text)


POLYGONS = {
    "triangle": "0,-1 0.87,0.6 -0.87,0.6",
    "star": "0,-1 0.23,-0.31 0.95,-0.31 0.37,0.12 0.59,0.81 0,0.38 -0.59,0.81 "
    "-0.37,0.12 -0.95,-0.31 -0.23,-0.31",
    "cross": "-0.3,-0.9 0.3,-0.9 0.3,-0.3 0.9,-0.3 0.9,0.3 0.3,0.3 0.3,0.9 -0.3,0.9 "
    "-0.3,0.3 -0.9,0.3 -0.9,-0.3 -0.3,-0.3",
}


def element(shape: str, x: float, y: float, radius: float, fill: str) -> str:
    """An SVG element."""
    if shape == "circle":
        return f'<circle cx="{x}" cy="{y}" r="{0.9 * radius}" fill="{fill}"/>'
    if shape in ("square", "rectangle"):
        w, h = (0.8 * radius, 0.8 * radius) if shape == "square" else (0.95 * radius, 0.5 * radius)
        return f'<rect x="{x - w}" y="{y - h}" width="{2 * w}" height="{2 * h}" fill="{fill}"/>'
    return (
        f'<polygon points="{POLYGONS[shape]}" fill="{fill}" '
        f'transform="translate({x} {y}) scale({radius})"/>'
    )


def placed(rng: Random, count: int) -> list[tuple[float, float]]:
    """`count` cells of a 3 x 3 grid, a little moved; a single shape anywhere."""
    if count == 1:
        return [(rng.uniform(0.25, 0.75), rng.uniform(0.25, 0.75))]
    return [
        (
            (cell % 3 + 0.5) / 3 + rng.uniform(-0.03, 0.03),
            (cell // 3 + 0.5) / 3 + rng.uniform(-0.03, 0.03),
        )
        for cell in rng.sample(range(9), count)
    ]


def svg_shapes(count: int) -> Iterator[Case]:
    """One to nine equal shapes, drawn by cairo from SVG."""
    import cairosvg

    for index in range(count):
        rng = Random(f"svg-{index}")
        number, shape = 1 + index % 9, rng.choice(SHAPES)
        colour, ground = rng.sample(list(COLOURS), 2)
        while "white" not in (colour, ground) and "black" not in (colour, ground):
            colour, ground = rng.sample(list(COLOURS), 2)
        radius = SIDE * (rng.uniform(0.08, 0.13) if number > 1 else rng.uniform(0.1, 0.24))
        shapes = "".join(
            element(shape, SIDE * x, SIDE * y, radius, CSS[colour]) for x, y in placed(rng, number)
        )
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIDE}" height="{SIDE}">'
            f'<rect width="100%" height="100%" fill="{CSS[ground]}"/>{shapes}</svg>'
        )
        data = cairosvg.svg2png(svg.encode())
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        many = number > 1
        yield Case("counts", picture, "How many shapes are there?", str(number))
        yield Case("names the shape", picture,
                   "What shapes are these?" if many else "What shape is it?", shape)  # fmt: skip
        thing = f"are the {plural(shape)}" if many else f"is the {shape}"
        yield Case("colour of shapes", picture, f"What color {thing}?", colour)
        yield Case("background of shapes", picture, "What color is the background?", ground)


def easy_vqa(count: int) -> Iterator[Case]:
    """Questions of easy-vqa's test set, all of whose kinds the model is taught."""
    from easy_vqa import get_test_image_paths, get_test_questions

    asked, right, numbers = get_test_questions()
    paths = get_test_image_paths()
    for index in Random("easy-vqa").sample(range(len(asked)), count):
        with Image.open(paths[numbers[index]]) as picture:
            kind = "yes or no" if right[index] in ("yes", "no") else "what"
            yield Case(f"easy-vqa, {kind}", picture.convert("RGB"), asked[index], right[index])


def photographs(count: int) -> Iterator[Case]:
    """Parts of photographs held out from training: to be declined."""
    files = photos.held_out_files()
    asked = (
        "What is this?",
        "Describe the image.",
        "How many shapes are there?",
        "What shape is it?",
    )
    pictures = [photos.reduced(path) for path in files]
    for index in range(count):
        rng = Random(f"photographs-{index}")
        picture = pictures[index % len(pictures)]
        w, h = (rng.uniform(0.5, 1) * side for side in picture.size)
        x, y = rng.uniform(0, picture.width - w), rng.uniform(0, picture.height - h)
        part = picture.crop((round(x), round(y), round(x + w), round(y + h)))
        yield Case(PHOTOGRAPHS, part, asked[index // len(pictures) % len(asked)], UNKNOWN)


def cases(count: int) -> Iterator[Case]:
    """Every set, `count` pictures (easy-vqa: questions) of each."""
    for source in (pillow, matplotlib_texts, chromium_texts, svg_shapes, easy_vqa, photographs):
        yield from source(count)
