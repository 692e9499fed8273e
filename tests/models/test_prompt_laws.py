"""Where visual tokens stand in a prompt, for any pictures between any texts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_vlm_edge.loading.load import LoadOptions, start_loading

from ..conftest import GOLDEN

FOLDERS = {
    "fastvlm": "demo",
    "mobilevlm": str(GOLDEN.parent / "mobilevlm_v2"),
    "eve": str(GOLDEN.parent / "eve_tiny"),
}
SIZE = st.tuples(st.integers(1, 300), st.integers(1, 300))
# A text, or a picture's size.
PARTS = st.lists(
    st.one_of(SIZE, st.sampled_from(["What is it?", " ", "\n", "a <image> b", "é", "red"])),
    min_size=1, max_size=5,
).filter(lambda parts: any(isinstance(part, str) and part.strip() for part in parts))  # fmt: skip


@pytest.fixture(scope="module", params=FOLDERS)
def parts_of(request):
    model, processor = start_loading(FOLDERS[request.param], LoadOptions())
    model.finish_loading()
    return model, processor


@settings(max_examples=40, deadline=None, derandomize=True)
@given(parts=PARTS)
def test_every_visual_token_has_its_place(parts_of, parts):
    _, processor = parts_of
    pictures = [np.zeros((part[1], part[0], 3), np.uint8) for part in parts if type(part) is tuple]
    content = [
        {"type": "image"} if type(part) is tuple else {"type": "text", "text": part}
        for part in parts
    ]
    inputs = processor([{"role": "user", "content": content}], images=pictures)
    counts = [processor.visual_tokens(pixels) for pixels in inputs.pixels]
    visual, length = inputs.visual, inputs.input_ids.shape[1]
    assert len(inputs.pixels) == len(pictures)
    assert len(visual) == sum(counts)
    assert all(count > 0 for count in counts)
    assert (np.diff(visual) > 0).all()
    assert len(visual) == 0 or (visual[0] >= 0 and visual[-1] < length)
    # Alone, a picture takes as many: counts do not depend on what else is in the prompt.
    for picture, count in zip(pictures, counts, strict=True):
        alone = processor("red", images=[picture])
        if len(pictures) == 1:
            assert len(alone.visual) == count


@settings(max_examples=12, deadline=None, derandomize=True)
@given(sizes=st.lists(SIZE, min_size=1, max_size=2))
def test_what_is_encoded_is_what_was_counted(parts_of, sizes):
    model, processor = parts_of
    pictures = [np.full((height, width, 3), 90, np.uint8) for width, height in sizes]
    inputs = processor("What is it?", images=pictures)
    encoded = [model.encode_image(pixels).shape[0] for pixels in inputs.pixels]
    assert encoded == [processor.visual_tokens(pixels) for pixels in inputs.pixels]
    assert sum(encoded) == len(inputs.visual)
