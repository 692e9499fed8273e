"""What an image processor's file does to a picture, against transformers' of that file."""

import numpy as np
import pytest
from mlx_vlm_edge_convert.families.fastvlm_config import from_transformers
from PIL import Image

from mlx_vlm_edge.checkpoint.config import PREPROCESSOR
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.picture.image import fit
from mlx_vlm_edge.picture.preprocessing import check_settings, clip_strategy, image_strategy
from mlx_vlm_edge.picture.resize import levels
from mlx_vlm_edge.vision.pixels import CLIP, PLAIN

SIDE = 56
SQUARE, SHORTEST = {"height": SIDE, "width": SIDE}, {"shortest_edge": SIDE}
DONE = [
    ({"size": SHORTEST, "crop_size": SQUARE}, "center_crop"),
    ({"size": SIDE, "crop_size": SIDE}, "center_crop"),
    ({"size": SQUARE, "crop_size": SQUARE}, "stretch"),
    ({"size": SQUARE, "do_center_crop": False, "crop_size": {"height": 224, "width": 224}},
     "stretch"),
    ({"size": SHORTEST, "crop_size": SQUARE, "do_pad": True}, "pad"),
    ({"size": SQUARE, "do_center_crop": False, "do_pad": True}, "pad"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "strategy"), DONE)
@pytest.mark.parametrize("size", [(90, 70), (31, 200), (56, 56)])
def test_a_strategy_is_what_transformers_does(file, strategy, size):
    from ..reference import torchvision_shim

    torchvision_shim.install()
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (*size[::-1], 3), np.uint8))
    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    processor = LlavaImageProcessorPil(**file, **plain)
    want = np.rint(processor(picture, return_tensors="np")["pixel_values"][0] * 255)
    assert clip_strategy(file, SIDE) == strategy
    got = levels(fit(picture, (SIDE, SIDE), strategy, (0, 0, 0)))
    assert np.array_equal(got, want.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ({"size": {"shortest_edge": 64}, "crop_size": SQUARE}, "size {'shortest_edge': 64}"),
        ({"size": SQUARE, "crop_size": {"height": 48, "width": 48}}, "'height': 48"),
        ({"size": {"height": SIDE, "width": 64}, "do_center_crop": False}, "'width': 64"),
        ({"size": {"shortest_edge": 64}, "do_pad": True}, "'shortest_edge': 64"),
        ({"size": SHORTEST, "do_center_crop": False}, "do_center_crop False"),
        ({"size": {"longest_edge": SIDE}}, "size cannot be"),
        ({"size": [SIDE, SIDE]}, "are not the 56"),
        ({"resample": 2}, "resample 2"),
        ({"do_resize": False}, "do_resize False"),
        ({"do_rescale": False}, "do_rescale False"),
        ({"do_normalize": False}, "do_normalize False"),
        ({"rescale_factor": 1.0}, "rescale_factor cannot be 1.0"),
        ({"rescale_factor": "1"}, "rescale_factor cannot be '1'"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": "x"}, "image_std x"),
    ],
)
def test_other_pixels_are_refused_by_name(file, said):
    with pytest.raises(UsageError) as caught:
        image_strategy({PREPROCESSOR: file}, SIDE, *CLIP[:2])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_config_says_goes_before_the_file():
    """FastVLM pads; the file beside it, which is for others, crops at another size."""
    file = {"size": {"shortest_edge": 1024}, "crop_size": {"height": 1024, "width": 1024}}
    config = {PREPROCESSOR: file, "image_aspect_ratio": "pad"}
    assert image_strategy(config, SIDE, *PLAIN[:2]) == "pad"
    unlike = {**file, "size": {"shortest_edge": 1152}}
    for said, got in (("pad", "pad"), ("square", "square"), ("", "center_crop")):
        hub = from_transformers({"image_aspect_ratio": said}, file if not said else unlike)
        assert hub["image_aspect_ratio"] == got
    assert (
        image_strategy({PREPROCESSOR: {"do_normalize": False}}, SIDE, *PLAIN[:2]) == "center_crop"
    )
    with pytest.raises(UsageError, match="1024"):
        image_strategy({PREPROCESSOR: file}, SIDE, *PLAIN[:2])


def test_a_factor_in_few_digits_is_a_255th():
    check_settings({"rescale_factor": 0.003921569}, {})
