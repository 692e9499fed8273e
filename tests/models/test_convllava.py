"""ConvLLaVA against the golden numbers of its original code; layouts, sizes, traps."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_vlm_edge_convert import convert
from mlx_vlm_edge_convert.families import convllava as rules

from mlx_vlm_edge import kernels, load, stream_generate
from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.loading import cost
from mlx_vlm_edge.loading.counting import counted
from mlx_vlm_edge.models import convllava, family_name
from mlx_vlm_edge.vision import convnext

from ..parity import FLOAT32, clip_pixels, distance
from ..reference import convllava as theirs
from ..reference.convllava import set_config

PICTURES = ("landscape", "portrait", "large")  # 233 x 131, 97 x 301 and 419 x 383 pixels
ASKED = "What is in the image?\nAnswer the question using a single word or phrase."
STAGES = {"stem": 8, "stage2": 4, "stage3": 1, "stage4": 1, "stage5": 1}  # every n-th, as stored
OURS = {"stem": "stem", **{f"stage{n}": f"stage {n - 1}" for n in range(2, 6)}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("convllava")
    inside = theirs.inside(root)
    return {"apart": root / "apart", "inside": inside}


@pytest.fixture(scope="module")
def loaded(folders):
    return load(str(folders["inside"]))


@pytest.fixture(scope="module")
def expected(golden):
    folder = golden.parent / "convllava"
    return {name: np.load(folder / f"reference_{name}.npz") for name in (*PICTURES, "textonly")}


@pytest.fixture(scope="module")
def picture(golden):
    return lambda name: str(golden.parent / "convllava" / f"{name}.png")


def parameters(model):
    return dict(tree_flatten(model.parameters()))


def nhwc(array):
    return mx.array(array.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("name", PICTURES)
def test_every_stage_is_the_originals(loaded, expected, picture, name):
    model, processor = loaded
    want = expected[name]
    (pixels,) = processor(ASKED, images=[picture(name)]).pixels
    x = clip_pixels(pixels.data[None])
    assert distance(x, nhwc(want["pixel_values"])) < 1e-5
    outputs = dict(model.tower.stage_outputs(x))
    for stage, step in STAGES.items():
        got = outputs[OURS[stage]][:, ::step, ::step]
        assert distance(got, nhwc(want[stage])) < FLOAT32, stage
    assert distance(model.image_features(pixels.data[None]), want["vision_features"]) < FLOAT32
    assert distance(model.encode_image(pixels)[None], want["projector_out"]) < FLOAT32


@pytest.mark.parametrize("name", [*PICTURES, "textonly"])
def test_ids_logits_and_greedy_ids_are_the_originals(loaded, expected, picture, name):
    model, processor = loaded
    want, images = expected[name], [] if name == "textonly" else [picture(name)]
    inputs = processor(ASKED, images=images)
    ids = [i for i in want["input_ids"][0].tolist() for i in [i] * (16 if i == -200 else 1)]
    assert inputs.input_ids[0].tolist() == ids
    assert inputs.visual.tolist() == [at for at, token in enumerate(ids) if token == -200]
    assert distance(model(inputs), want["logits"]) < FLOAT32
    ends, processor.eos_ids = processor.eos_ids, frozenset()
    pieces = list(stream_generate(model, processor, ASKED, images, max_tokens=12))
    processor.eos_ids = ends
    assert [piece.token for piece in pieces[:12]] == want["greedy_ids"].tolist()


def test_two_pictures_are_each_its_own_tokens(loaded, expected, picture):
    model, processor = loaded
    inputs = processor("Compare.", images=[picture("landscape"), picture("portrait")])
    assert len(inputs.visual) == 32
    for pixels, name in zip(inputs.pixels, PICTURES, strict=False):
        assert distance(model.encode_image(pixels)[None], expected[name]["projector_out"]) < FLOAT32


def test_the_devices_forms_agree(loaded, expected):
    x = nhwc(expected["large"]["pixel_values"])
    tower = loaded[0].tower
    with kernels.plain():
        plain = tower(x)
    assert distance(tower(x), plain) < FLOAT32


FAULTS = {
    "norm eps": lambda model: setattr(model.tower.stages[3].norm, "eps", 1e-2),
    "no layer's bias": lambda model: (
        model.tower.stages[4].blocks[1].fc2.update({"bias": mx.zeros((56,))})
    ),
    "kernel turned": lambda model: setattr(
        model.tower.stages[0].blocks[0],
        "depthwise",
        model.tower.stages[0].blocks[0].depthwise.swapaxes(1, 2),
    ),
    "a block less": lambda model: model.tower.stages[2].blocks.pop(),
    "columns before rows": lambda model: setattr(
        model.tower.stages[1].downsample.proj,
        "weight",
        model.tower.stages[1]
        .downsample.proj.weight.reshape(2, 2, 16, 24)
        .swapaxes(0, 1)
        .reshape(64, 24),
    ),
}


@pytest.mark.parametrize("fault", [*FAULTS, "tokens shifted", "tanh GELU", "no layer scale"])
def test_a_fault_is_caught(folders, expected, fault, monkeypatch):
    if fault == "tanh GELU":  # differs by 5e-4 at most, in every block
        monkeypatch.setattr(convnext, "gelu", kernels.gelu_tanh)
    if fault == "no layer scale":
        real = convnext._block
        monkeypatch.setattr(convnext, "_block", lambda *args: unscaled(real, *args))
    model, _ = load(str(folders["inside"]))
    want = expected["landscape"]
    if fault in FAULTS:
        FAULTS[fault](model)
    features = model.tower(nhwc(want["pixel_values"]))
    if fault == "tokens shifted":
        features = mx.roll(features, 1, axis=1)
    assert distance(model.connector(features), want["projector_out"]) > 3 * FLOAT32


def unscaled(real, weights, source, target, width):
    name = f"{source}layer_scale_parameter"
    weights._left[name] = mx.ones_like(weights._left[name])
    return real(weights, source, target, width)


# Layouts, sizes, configs.


def test_a_tower_of_its_own_folder_is_the_one_inside(folders, loaded):
    got, want = parameters(load(str(folders["apart"]))[0]), parameters(loaded[0])
    assert got.keys() == want.keys()
    assert all(mx.array_equal(got[name], want[name]) for name in want)


def test_an_embedded_tower_goes_before_the_one_that_the_config_names(folders, loaded, tmp_path):
    folder = shutil.copytree(folders["inside"], tmp_path / "copy-256")
    set_config(folder, mm_vision_tower=str(folders["apart"] / "convnext-nowhere-256"))
    got, want = parameters(load(str(folder))[0]), parameters(loaded[0])
    assert all(mx.array_equal(got[name], want[name]) for name in want)


def test_converted_verified_and_quantised(folders, loaded, tmp_path, picture):
    native = convert(folders["inside"], tmp_path / "native", verify=True)
    assert json.loads((native / "config.json").read_text())["model_type"] == "convllava"
    sizes = json.loads((native / "preprocessor_config.json").read_text())
    assert sizes["crop_size"] == {"height": 256, "width": 256}
    got, want = parameters(load(str(native))[0]), parameters(loaded[0])
    assert all(mx.array_equal(got[name], want[name]) for name in want)
    model, processor = load(str(convert(widened(native), tmp_path / "packed", bits=8)))
    inputs = processor(ASKED, images=[picture("large")])
    (pixels,) = inputs.pixels
    assert distance(model.encode_image(pixels), loaded[0].encode_image(pixels)) < 1e-6
    assert distance(model(inputs), loaded[0](inputs)) < 0.2


def widened(folder):
    """The same model whose MLPs are 192 wide, by zeros: groups of 64 do not divide 144."""
    weights = dict(mx.load(str(folder / "model.safetensors")))
    for name, array in weights.items():
        if "language_model" in name and ".mlp." in name:
            axes = [(0, 0), (0, 48)] if "down_proj" in name else [(0, 48), (0, 0)]
            weights[name] = mx.pad(array, axes)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    set_config(folder, text_config={**text, "intermediate_size": 192})
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mm_vision_select_layer": -2}, "mm_vision_select_layer -2"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        ({"mm_projector_type": "linear"}, "'linear'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"vision_config": {"depths": [1, 1, 2, 1, 3]}}, "weights have"),
        ({"vision_config": {"image_size": 250}}, "no multiple of 64"),
        ({"mm_vision_tower": "x/convnext", "_name_or_path": "y"}, "nothing says at which size"),
    ],
)
def test_what_cannot_be_is_one_line(folders, tmp_path, changes, says):
    folder = shutil.copytree(folders["inside"], tmp_path / "changed")
    set_config(folder, **changes)
    with pytest.raises(UsageError, match=says) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_its_tower_says_how_to_get_it(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder = shutil.copytree(folders["apart"], tmp_path / "changed")
    set_config(folder, mm_vision_tower="ConvLLaVA/ConvLLaVA-ConvNeXt-768")
    with pytest.raises(UsageError, match="models pull ConvLLaVA/ConvLLaVA-ConvNeXt-768"):
        load(str(folder))


def test_llava_is_told_from_convllava_by_its_tower():
    flat = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}
    assert family_name({**flat, "mm_vision_tower": "ConvLLaVA/ConvLLaVA-ConvNeXt-768"}) == (
        "convllava"
    )
    assert family_name({**flat, "mm_vision_tower": "openai/clip-vit-large-patch14"}) == "llava"
    assert family_name({**flat, "mm_vision_tower": None}) == "llava"


@pytest.mark.parametrize("side", [768, 1024, 1536])
def test_the_published_config_is_the_shipped_one(side):
    shipped = configs.read(f"convllava-7b-{side}")
    flat = {
        **shipped["text_config"],
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "image_aspect_ratio": "pad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -1,
        "mm_vision_tower": f"ConvLLaVA/ConvLLaVA-ConvNeXt-{side}",
    }
    read = convllava.Config.from_dict
    assert read(cost.native(flat)) == read(shipped)
    with pytest.raises(UsageError, match="'x/convnext-768' is not known"):
        cost.native({**flat, "mm_vision_tower": "x/convnext-768"})


@pytest.mark.parametrize(
    ("side", "tokens", "gmacs"), [(768, 144, 471.98), (1024, 256, 839.08), (1536, 576, 1887.93)]
)
def test_the_full_tower_costs_what_the_original_does(side, tokens, gmacs):
    """MACs of its convolutions and linear layers, counted on the original's shapes."""
    plan = cost.blueprint(configs.read(f"convllava-7b-{side}"))
    pixels = plan.pixels((640, 480))
    assert plan.processor.visual_tokens(pixels) == tokens
    x = mx.zeros((1, side, side, 3), mx.bfloat16)
    assert counted(lambda: plan.model.tower(x)).flops / 2e9 == pytest.approx(gmacs, rel=1e-3)


def test_another_size_is_a_multiple_of_the_stride(folders, picture):
    model, processor = load(str(folders["inside"]), resolution=192)
    inputs = processor(ASKED, images=[picture("portrait")])
    assert len(inputs.visual) == 9
    assert model.encode_image(inputs.pixels[0]).shape == (9, 64)
    for side in (100, 32):
        with pytest.raises(UsageError, match=f"image size {side}: this ConvNeXt takes multiples"):
            load(str(folders["inside"]), resolution=side)


def test_a_size_that_the_tower_cannot_take_is_refused(loaded):
    with pytest.raises(UsageError, match="70x64 pixels: both must be multiples of 64"):
        list(loaded[0].tower.stage_outputs(mx.zeros((1, 64, 70, 3))))


def test_the_preprocessors_size_goes_before_a_name():
    size = {"crop_size": {"height": 512, "width": 512}}
    named = {"mm_vision_tower": "ConvLLaVA/ConvLLaVA-ConvNeXt-768"}
    assert rules.image_size(named, {"image_size": 1024}, size) == 512
    assert rules.image_size(named, {"image_size": 1024}, {}) == 1024
    assert rules.image_size(named, {}, {}) == 768
    assert rules.image_size({"_name_or_path": "ConvLLaVA/ConvLLaVA-1536"}, {}, {}) == 1536
