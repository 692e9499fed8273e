"""Rename tables are strict, and the three layouts of one model become the same native weights."""

import json

import mlx.core as mx
import pytest
from mlx_vlm_edge_convert import to_native
from mlx_vlm_edge_convert.families import decoder, fastvlm
from mlx_vlm_edge_convert.rules import Rule, apply, to_channels_last, to_last_axis

from mlx_vlm_edge.checkpoint.config import read_config
from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.models import family
from mlx_vlm_edge.models.build import build

# Every key that mlx-vlm or mlx-swift-lm reads (facts: their config classes).
ROOT_KEYS = {
    "model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "vocab_size", "rope_theta", "max_position_embeddings",
    "tie_word_embeddings", "image_token_index", "mm_projector_type", "mm_hidden_size",
    "tokenizer_model_max_length", "tokenizer_padding_side", "vision_config",
}  # fmt: skip
VISION_KEYS = {
    "cls_ratio", "down_patch_size", "down_stride", "downsamples", "embed_dims", "hidden_size",
    "image_size", "intermediate_size", "layers", "layer_scale_init_value", "mlp_ratios",
    "num_classes", "patch_size", "pos_embs_shapes", "projection_dim", "repmixer_kernel_size",
    "token_mixers",
}  # fmt: skip


def native(folder):
    return to_native(folder, read_config(folder))


def rewrite(folder, change) -> None:
    """Change a folder's weights in place."""
    path = folder / "model.safetensors"
    weights = mx.load(str(path))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(path), weights)


def test_rules_rename_transform_and_drop():
    rules = (
        Rule(r"a\.(\d+)", r"b.\1", to_channels_last),
        Rule(r"count", None, why="not used"),
        Rule(r"scale", r"scale", to_last_axis),
    )
    weights = {"a.7": mx.zeros((2, 3, 5, 4)), "count": mx.array(1), "scale": mx.zeros((6, 1, 1))}
    got = apply(rules, weights, "test")
    assert {name: array.shape for name, array in got.items()} == {
        "b.7": (2, 5, 4, 3),
        "scale": (1, 1, 6),
    }


def test_unknown_names_and_collisions_raise():
    weights = {f"x.{i}": mx.zeros(1) for i in range(5)}
    with pytest.raises(UsageError, match=r"no rule for x\.0, x\.1, x\.2 and 2 more"):
        apply((), weights, "test")
    with pytest.raises(UsageError, match="both become y"):
        apply((Rule(r"x\.\d", "y"),), weights, "test")


def test_a_rule_that_drops_says_why():
    with pytest.raises(ValueError, match="says why"):
        Rule("x", None)


def test_apple_and_transformers_layouts_become_the_same_weights(apple, transformers_folder):
    left, right = native(apple)[1], native(transformers_folder)[1]
    assert set(left) == set(right)
    for name, array in left.items():
        if name != fastvlm.CLIP_HEAD:  # which transformers leaves out
            assert mx.array_equal(array, right[name]), name
    assert not mx.any(right[fastvlm.CLIP_HEAD])
    assert mx.any(left[fastvlm.CLIP_HEAD])


def test_the_training_form_inside_the_transformers_layout(apple, unfused):
    want, got = native(apple)[1], native(unfused)[1]
    assert set(got) == set(want)
    for name, array in want.items():
        if name != fastvlm.CLIP_HEAD:
            assert float(mx.max(mx.abs(array - got[name]))) < 1e-6, name


@pytest.mark.parametrize("layout", ["apple", "transformers_folder"])
def test_native_weights_build_the_model(layout, request):
    config, weights = native(request.getfixturevalue(layout))
    assert fastvlm.is_native(weights)
    model = build(family(config), config, weights)
    assert model.config.image_size == 192


@pytest.mark.parametrize("layout", ["apple", "transformers_folder"])
def test_the_config_has_every_key_that_peers_read(layout, request):
    folder = request.getfixturevalue(layout)
    config, weights = native(folder)
    assert set(config) >= ROOT_KEYS
    vision = config["vision_config"]
    assert set(vision) >= VISION_KEYS
    assert config["model_type"] == "llava_qwen2"
    assert vision.get("model_type", "llava_qwen2") == "llava_qwen2"  # mlx-vlm refuses others
    assert vision["layers"] == [1, 2, 1, 1, 1]
    assert vision["embed_dims"] == [16, 32, 32, 64, 128]
    assert vision["token_mixers"] == ["repmixer"] * 3 + ["attention"] * 2
    assert vision["pos_embs_shapes"] == [None, None, None, [7, 7], [7, 7]]
    assert vision["mlp_ratios"] == [4] * 5
    assert all(isinstance(ratio, int) for ratio in vision["mlp_ratios"])  # Swift reads Int
    assert vision["image_size"] == 192
    assert vision["projection_dim"] == weights[fastvlm.CLIP_HEAD].shape[1]
    assert config["mm_hidden_size"] == 256
    assert config["rope_theta"] == 1e6
    json.dumps(config)


def test_every_source_key_is_kept(apple, transformers_folder):
    source = read_config(apple)
    config = native(apple)[0]
    assert {key: config[key] for key in source} == source
    source = read_config(transformers_folder)
    config = native(transformers_folder)[0]
    kept = {key for key, value in source.items() if value is not None} - {"text_config"}
    assert set(config) >= kept | set(source["text_config"])
    assert config["vision_config"]["architecture"] == "fastvit_mci3"
    assert "text_config" not in config  # mlx-vlm would read it in place of the root


def test_placeholders_and_image_strategies_of_both_conventions(
    apple, transformers_folder, edit_config
):
    config = native(apple)[0]
    assert (config["image_token_index"], config["image_aspect_ratio"]) == (-200, "pad")
    config = native(transformers_folder)[0]
    assert (config["image_token_index"], config["image_aspect_ratio"]) == (-200, "center_crop")
    assert config["image_token_id"] == 300
    (transformers_folder / "preprocessor_config.json").write_text(
        json.dumps({"do_pad": True, "crop_size": {"height": 256, "width": 256}})
    )
    config = native(transformers_folder)[0]
    assert config["image_aspect_ratio"] == "pad"
    assert config["vision_config"]["image_size"] == 256
    edit_config(apple, mm_vision_tower="mobileclip_l_1024")
    assert native(apple)[0]["vision_config"]["image_size"] == 1024


def test_a_config_that_contradicts_the_weights_raises(apple, edit_config):
    edit_config(apple, vision_config={"layers": [2, 12, 24, 4, 2]})
    with pytest.raises(UsageError, match=r"vision_config says layers \[2, 12, 24, 4, 2\]"):
        native(apple)
    edit_config(apple, vision_config=None, mm_hidden_size=3072)
    with pytest.raises(UsageError, match="mm_hidden_size 3072, but the weights have 256"):
        native(apple)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "not a FastViTHD"),
        ({"model_type": "flamingo"}, "model_type 'flamingo'"),
        ({"vision_config": [1]}, "vision_config is not an object"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised with gptq"),
    ],
)
def test_unknown_parts_raise(changes, said, apple, edit_config):
    with pytest.raises(UsageError, match=said):
        native(edit_config(apple, **changes))


def test_an_unknown_weight_is_named(apple):
    rewrite(apple, lambda w: w.update({"model.vision_tower.extra.weight": mx.zeros(1)}))
    with pytest.raises(UsageError, match=r"no rule for model\.vision_tower\.extra\.weight"):
        native(apple)


def test_another_model_and_the_app_export_are_refused():
    with pytest.raises(UsageError, match="no FastVLM layout"):
        fastvlm.rename({"model.layers.0.self_attn.q_proj.weight": mx.zeros((2, 2))})
    export = {
        "multi_modal_projector.linear_0.weight": mx.zeros((2, 2)),
        "language_model.model.norm.weight": mx.zeros(2),
    }
    with pytest.raises(UsageError, match="app export"):
        fastvlm.rename(export)


def test_the_head_is_tied_by_the_weights_not_by_the_config(apple, edit_config):
    config, weights = native(edit_config(apple, tie_word_embeddings=True))
    assert config["tie_word_embeddings"] is False
    assert decoder.HEAD in weights

    def tie(arrays):
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]

    rewrite(apple, tie)
    config, weights = native(edit_config(apple, tie_word_embeddings=False))
    assert config["tie_word_embeddings"] is True
    assert decoder.HEAD not in weights


def test_a_missing_head_needs_a_tied_config(apple, edit_config):
    rewrite(apple, lambda arrays: arrays.pop("lm_head.weight"))
    with pytest.raises(UsageError, match=r"lacks lm_head\.weight"):
        native(edit_config(apple, tie_word_embeddings=False))
    config, weights = native(edit_config(apple, tie_word_embeddings=True))
    assert config["tie_word_embeddings"] is True
    assert decoder.HEAD not in weights


def test_one_different_row_is_enough_to_stay_untied():
    table = mx.random.normal((20_000, 2))
    other = mx.array(table)
    other[19_999, 1] += 1e-3
    assert decoder._equal(table, mx.array(table))
    assert not decoder._equal(table, other)
    assert not decoder._equal(table, table.astype(mx.bfloat16))
    assert not decoder._equal(table, table[:-1])
