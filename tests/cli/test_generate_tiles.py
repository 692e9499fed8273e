"""`generate` with a family that cuts images up and takes videos: its flags, and their mistakes."""

import json

import pytest
from PIL import Image

from mlx_vlm_edge.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from ..reference import idefics3 as theirs

    case = theirs.CASES["smolvlm"]
    return theirs.save(theirs.build(case), case, tmp_path_factory.mktemp("smolvlm"))


@pytest.fixture
def generate(folder, tmp_path, capfd):
    """Run `generate` on a square picture or a GIF of 3 s; returns (exit code, stdout, stderr)."""
    Image.new("RGB", (60, 60), "red").save(tmp_path / "square.png")
    frames = [Image.new("RGB", (40, 30), (index * 8, 0, 0)) for index in range(30)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=100)

    def run(*arguments):
        given = [tmp_path / a if a in ("square.png", "clip.gif") else a for a in arguments]
        fixed = ("generate", "--model", folder, "-p", "What?", "--max-tokens", 2, "--json")
        code = main([str(a) for a in (*fixed, *given)])
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize(
    ("flags", "tiles"),
    [
        (("--image", "square.png"), 17),
        (("--image", "square.png", "--max-tiles", 6), 5),
        (("--image", "square.png", "--resolution", 96), 10),
        (("--image", "square.png", "--image-strategy", "stretch"), 1),
        (("--image", "square.png", "--image-strategy", "no-upscale"), 5),
        (("--video", "clip.gif"), 3),
        (("--video", "clip.gif", "--fps", 4), 12),
        (("--image", "square.png", "--max-tiles", 1, "--video", "clip.gif"), 4),
    ],
)
def test_the_flags_decide_how_many_tiles_there_are(generate, flags, tiles):
    code, out, err = generate(*flags)
    assert (code, err) == (0, "")
    assert json.loads(out)["visual_tokens"] == 4 * tiles


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--image", "square.png", "--fps", 2), "--fps is for videos"),
        (("--video", "clip.gif", "--fps", 0), "fps 0"),
        (("--video", "none.gif"), "no such file"),
        (("--image", "square.png", "--image-strategy", "pad"), "split, no-upscale, stretch"),
        (
            ("--image", "square.png", "--max-tiles", 0),
            "max_tiles must be a whole number of at least 1",
        ),
    ],
)
def test_a_mistake_is_one_line(generate, flags, message):
    code, out, err = generate(*flags)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_fewer_visual_tokens(generate):
    code, out, _ = generate("--video", "clip.gif", "--visual-tokens", 6)  # of three frames
    assert (code, json.loads(out)["visual_tokens"]) == (0, 6)
    for flags, count in ((("--visual-tokens", 34), 34), (("--visual-tokens", "50%"), 34),
                         (("--visual-tokens", 0.25, "--token-method", "pool"), 17)):  # fmt: skip
        code, out, err = generate("--image", "square.png", *flags)
        assert (code, err) == (0, "")
        assert json.loads(out)["visual_tokens"] == count


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--visual-tokens", 0), "visual tokens 0: give a whole number of at least 1"),
        (("--visual-tokens", 1.5), "visual tokens 1.5: give a whole number of at least 1"),
        (("--visual-tokens", "many"), "visual tokens 'many': give a number, as 64, or a share"),
        (("--visual-tokens", 69), "visual tokens 69: the picture has 68 and no more"),
        (("--visual-tokens", 16), "16 of 68 are too few for this picture, whose parts"),
        (("--token-method", "pool"), "say how many visual tokens"),
        (("--visual-tokens", 34, "--token-method", "best"), "token method 'best' is not one of"),
        (("--visual-tokens", 34, "--token-method", "visionzip"), "is not defined for this model"),
    ],
)
def test_a_number_of_tokens_that_cannot_be_is_told_before_loading(
    generate, monkeypatch, flags, message
):
    from mlx_vlm_edge.loading import load

    def unread(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(load, "arrange", unread)
    code, out, err = generate("--image", "square.png", *flags)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
