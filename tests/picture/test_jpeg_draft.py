"""JPEG draft: asked for, enough for every family, and told."""

import io

import numpy as np
import pytest
from PIL import Image
from PIL.Image import Resampling

from mlx_vlm_edge import generate, load
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.picture.image import fit, open_image
from mlx_vlm_edge.text.prompt import Processor

from ..conftest import GOLDEN
from ..reference.fastvlm import picture

FOLDERS = {"eve": GOLDEN.parent / "eve_tiny", "mobilevlm": GOLDEN.parent / "mobilevlm_v2"}


def photo(width=1600, height=1200):
    buffer = io.BytesIO()
    Image.fromarray(picture(1, width, height)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture(scope="module", params=["fastvlm", *FOLDERS])
def folder(request, native_folder):
    return str(FOLDERS.get(request.param, native_folder))


def test_pixels_are_near_those_of_the_whole_picture_and_results_say_so(folder):
    source = photo()
    model, processor = load(folder)
    whole = processor("Hi", images=[source])
    said = generate(model, processor, "Hi", [source], max_tokens=1, full=True)
    assert (whole.jpeg_draft, said.jpeg_draft) == (False, False)
    model, processor = load(folder, jpeg_draft=True)
    draft = processor("Hi", images=[source])
    assert draft.jpeg_draft
    assert draft.pixels[0].size < whole.pixels[0].size  # decoded smaller
    ours, theirs = (item.pixels[0].data.astype(int) for item in (draft, whole))
    assert ours.shape == theirs.shape
    assert 0 < np.abs(ours - theirs).mean() < 4
    said = generate(model, processor, "Hi", [source], max_tokens=1, full=True)
    assert said.jpeg_draft
    assert not generate(model, processor, "Hi", max_tokens=1, full=True).jpeg_draft


def test_a_family_that_does_not_say_how_much_it_needs_refuses():
    with pytest.raises(UsageError, match="leave the JPEG draft out"):
        Processor.draft_side(None)


def test_a_drafted_picture_is_resized_by_half_as_many_pixels():
    """Others keep the filter of the references, draft asked for or not."""
    drafted, small = open_image(photo(), 512), open_image(photo(800, 600), 512)
    assert drafted.size == small.size == (800, 600)
    for image, kind in ((drafted, Resampling.HAMMING), (small, Resampling.BICUBIC)):
        fitted = fit(image, (512, 512), "stretch")
        assert np.array_equal(fitted, image.resize((512, 512), kind))
