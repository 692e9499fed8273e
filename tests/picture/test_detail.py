"""How large a picture has to be: by its size and by what is in it."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.picture.detail import MOST_LOST, auto_sides, chosen_side, lost

SIDES = (256, 512, 768, 1024)


def page(height, size=(1600, 1200)):
    """A page in letters of so many pixels."""
    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(height)
    for y in range(0, size[1], int(height * 1.5)):
        draw.text((10, y), "The quick brown fox jumps over the lazy dog 012 " * 5, "black", font)
    return image


def chosen(image):
    return chosen_side(image, SIDES, max(image.size))


@pytest.mark.parametrize(("letters", "side"), [(10, 1024), (16, 1024), (40, 512), (160, 256)])
def test_small_letters_need_a_large_picture(letters, side):
    assert chosen(page(letters)) == side


def test_the_loss_grows_as_the_picture_shrinks():
    grey = np.asarray(page(24).convert("L").resize((1024, 768)), np.float32)
    losses = [lost(grey, side / 1024) for side in SIDES]
    assert losses[0] > losses[1] > losses[2] > losses[3]
    assert losses[0] > 2 * MOST_LOST
    assert losses[3] < 0.01


def test_a_small_region_of_letters_counts():
    image = Image.new("RGB", (1600, 1200), (90, 120, 160))
    smooth = chosen(image)
    image.paste(page(14, (400, 200)), (700, 500))
    assert smooth == 256
    assert chosen(image) == 1024


def test_what_is_not_there_needs_no_pixels():
    noise = np.random.default_rng(0).integers(0, 256, (200, 250, 3), np.uint8)
    assert chosen(Image.fromarray(noise)) == 256
    assert chosen(Image.fromarray(noise).resize((500, 400))) in (256, 512)
    assert chosen(Image.new("RGB", (4000, 3000))) == 256
    assert chosen(Image.new("RGB", (5000, 1))) == 256


def test_a_picture_of_a_gradient_is_small():
    ramp = np.linspace(0, 255, 2000).astype(np.uint8)
    assert chosen(Image.fromarray(np.broadcast_to(ramp, (1500, 2000)).copy()).convert("RGB")) == 256


def test_sides_are_quarters_in_whole_steps():
    assert auto_sides(1024, 64) == SIDES
    assert auto_sides(1024, 64, 800) == (256, 512, 768)
    with pytest.raises(UsageError, match="max_resolution 100: the smallest size is 256 pixels"):
        auto_sides(1024, 64, 100)
    assert auto_sides(128, 64) == (64, 128)
