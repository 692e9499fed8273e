"""export --device: what fits a device's memory, by the estimate, or one line."""

import pytest
from mlx_vlm_edge_convert.coreml import phones

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.cli import device, main
from mlx_vlm_edge.errors import UsageError


@pytest.mark.parametrize(
    ("model", "name", "bits"),
    [("fastvlm-0.5b", "iphone-13", 8), ("fastvlm-0.5b", "iPhone 15", 16),
     ("fastvlm-1.5b", "iphone-15", 4), ("demo", "m1", 16)],
)  # fmt: skip
def test_the_most_precise_weights_that_fit_are_chosen(model, name, bits):
    choice = device.choose(model, name, None, None)
    assert (choice.bits, choice.context) == (bits, 2048)
    assert choice.nbytes <= choice.room == device.room(name)


def test_every_phone_and_mac_has_room_by_its_memory():
    assert device.room("iphone-13") == 1_600_000_000
    assert {*device.PHONES.values()} == {*phones.MEMORY}, "of which a bundle's manifest tells"
    assert device.room("iphone-17-pro") == 3 * device.room("iphone-13")
    assert device.room("m1") == int(8e9 * device.MAC * device.MODEL)


def test_the_context_shrinks_before_the_model_is_refused(monkeypatch):
    config = configs.read("fastvlm-0.5b")
    listed = [*device.choices(config, "iphone-13", 4)]
    assert [(choice.bits, choice.context) for choice in listed] == [(4, n) for n in device.CONTEXTS]
    between = (listed[0].nbytes + listed[1].nbytes) // 2
    monkeypatch.setattr(device, "room", lambda _: between)
    assert device.choose("fastvlm-0.5b", "iphone-13", 4, None).context == 1024
    with pytest.raises(UsageError, match=r"takes about .* with 4 bits and a context of 2,048"):
        device.choose("fastvlm-0.5b", "iphone-13", 4, 2048)


def test_what_a_published_config_leaves_out_is_its_family_s_default():
    config = configs.read("llava-1.5-7b")
    assert "hidden_size" not in config["text_config"]
    (whole,) = device.choices(config, "m1", 4, (512,))
    (packed,) = device.choices(config, "m1", 4, (512,), embedding_bits=8)
    numbers = 32064 * 4096
    assert whole.nbytes - packed.nbytes == numbers * 2 - (numbers + numbers // 64 * 3)


def test_a_quantised_model_keeps_its_bits_and_a_short_one_its_context():
    config = configs.read("fastvlm-0.5b") | {"max_position_embeddings": 1024}
    quantised = config | {"quantization": {"bits": 4, "group_size": 64}}
    listed = [*device.choices(quantised, "iphone-13", None)]
    assert [(choice.bits, choice.context) for choice in listed] == [(4, 1024), (4, 512)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fastvlm-7b", "--device", "iphone-13"], "more than the 1.60 GB there: take a smaller"),
        (["demo", "--device", "nokia-3310"], "--device: no figures of a chip called 'nokia-3310'"),
        (["demo", "--device", "m1", "--compute", "cpu-ne"], "--device chooses for the GPU"),
        (["demo", "--device", "m1", "--precision", "fp32"], "leave --precision fp32 out"),
        (["llava-1.5-7b", "--device", "m1", "--context", "8192"], "this model's is at most 4096"),
        # The largest of several must fit.
        (["llava-1.5-7b", "--device", "m1", "--context", "512", "8192"], "is at most 4096"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, said, tmp_path, capsys):
    assert main(["export", *arguments, "-o", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
