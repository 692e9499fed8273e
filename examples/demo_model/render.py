"""The picture of a scene: backdrop, text or shapes through a mask, then blur, noise and JPEG."""

from __future__ import annotations

import io
import math
from random import Random

import fonts
import numpy as np
import photos
from draw import Mark, Scene, homography
from PIL import Image, ImageDraw, ImageFilter
from plain import outline

FINER = 2  # smooth shapes are drawn this much larger, then averaged


def rectangle(rng: Random) -> list[tuple[float, float]]:
    """An oblong, upright or lying."""
    a, b = 0.95, rng.uniform(0.4, 0.68)
    w, h = (a, b) if rng.random() < 0.65 else (b, a)
    return [(-w, -h), (w, -h), (w, h), (-w, h)]


def corners(scene: Scene, mark: Mark, side: float) -> list[tuple[float, float]]:
    """The shape's corner points in pixels."""
    cos, sin = math.cos(math.radians(scene.angle)), math.sin(math.radians(scene.angle))
    left, top, right, bottom = mark.box
    x, y, radius = (left + right) / 2, (top + bottom) / 2, (right - left) / 2
    rng = Random(scene.look.seed)
    points = rectangle(rng) if mark.label == "rectangle" else outline(mark.label)
    return [
        (side * (x + radius * (u * cos - v * sin)), side * (y + radius * (u * sin + v * cos)))
        for u, v in points
    ]


def shape_mask(scene: Scene, width: int, height: int, side: float, border: bool) -> Image.Image:
    """L mask of the shapes, or of their borders."""
    scale = FINER if scene.look.smooth else 1
    mask = Image.new("L", (scale * width, scale * height), 0)
    pen = ImageDraw.Draw(mask)
    for mark in scene.marks:
        points = corners(scene, mark, scale * side)
        radius = scale * side * (mark.box[2] - mark.box[0]) / 2
        if border or scene.look.outline:
            share = 0.1 if border else scene.look.outline
            pen.line([*points, *points[:2]], 255, max(scale, round(share * radius)), joint="curve")
        else:
            pen.polygon(points, fill=255)
    return mask.resize((width, height), Image.Resampling.BOX) if scale > 1 else mask


def text_mask(scene: Scene, width: int, height: int, side: float) -> Image.Image:
    """L mask of the lines, turned and leant as the look says."""
    mask = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(mask)
    pen.fontmode = "L" if scene.look.smooth else "1"
    for line in scene.lines:
        face = fonts.face(line.font, max(4, round(line.em * side)))
        pen.text((side * line.x, side * line.base), line.text, font=face, fill=255, anchor="ls")
    if scene.look.warp:
        scaled = [side * value for value in scene.look.warp]
        h = homography(list(zip(scaled[::2], scaled[1::2], strict=True)))
        forward = np.array([*h, 1.0]).reshape(3, 3) @ np.diag([1 / width, 1 / height, 1.0])
        back = np.linalg.inv(forward)
        back = (back / back[2, 2]).ravel()[:8]
        mask = mask.transform(
            (width, height), Image.Transform.PERSPECTIVE, tuple(back), Image.Resampling.BILINEAR
        )
    return mask


def backdrop(scene: Scene, width: int, height: int) -> Image.Image:
    """What is behind the marks."""
    rng = Random(scene.look.seed)
    if scene.look.backdrop == "unknown":
        return photos.unknown(rng, width, height)
    plain = Image.new("RGB", (width, height), scene.background_rgb)
    if scene.look.backdrop == "gradient":
        ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270)))
        return Image.composite(
            Image.new("RGB", (width, height), scene.look.fade), plain, ramp.resize((width, height))
        )
    if scene.look.backdrop == "photo":
        photo = photos.crop(rng.choice(photos.trained()), rng, width, height)
        return Image.blend(photo, plain, rng.uniform(0.45, 0.8))
    return plain


def finish(image: Image.Image, scene: Scene) -> Image.Image:
    """Blur, noise and JPEG's artefacts."""
    style = scene.look
    if style.blur:
        image = image.filter(ImageFilter.GaussianBlur(style.blur * max(image.size) / 160))
    if style.noise:
        noise = np.random.default_rng(style.seed).normal(0, style.noise, (*image.size[::-1], 3))
        image = Image.fromarray(np.clip(np.array(image) + noise, 0, 255).astype(np.uint8))
    if style.jpeg:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=style.jpeg)
        image = Image.open(file).convert("RGB")
    return image


def draw(scene: Scene, size: int = 256) -> Image.Image:
    """The picture of a scene, RGB; its longer side has `size` pixels."""
    width, height = max(1, round(scene.width * size)), max(1, round(scene.height * size))
    image = backdrop(scene, width, height)
    if scene.lines:
        image.paste(scene.colour_rgb, (0, 0), text_mask(scene, width, height, size))
    elif scene.marks:
        image.paste(scene.colour_rgb, (0, 0), shape_mask(scene, width, height, size, False))
        if scene.look.border and not scene.look.outline:
            edges = shape_mask(scene, width, height, size, True)
            image.paste(scene.look.border, (0, 0), edges)
    return finish(image, scene)


def padded(image: Image.Image) -> Image.Image:
    """The picture in a black square, as the runtime pads it."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
