"""transformers' FastVLM -> the native (mlx-community) layout, independent of the converter.

The tests of the model use it, so that they do not stand or fall with the converter; the tests of
the converter hold its output against it.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from torch import nn

from . import tokenizer
from .fastvlm import DIMS, LAYERS, TEXT

Arrays = dict[str, np.ndarray]
NETWORK = {0: (None, None, 0), 1: (1, None, 2), 2: (3, None, 4), 3: (5, 6, 7), 4: (8, 9, 10)}
RENAMES = [
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.multi_modal_projector\.linear_1\.", "mm_projector.0."),
    (r"^model\.multi_modal_projector\.linear_2\.", "mm_projector.2."),
    (r"^model\.vision_tower\.timm_model\.", "vision_tower.vision_model."),
    (r"\.stem\.", ".patch_embed.blocks."),
    (r"\.final_conv\.", ".conv_exp."),
    (r"\.se\.fc1\.", ".se.reduce."),
    (r"\.se\.fc2\.", ".se.expand."),
    (r"\.proj\.0\.reparam_conv\.", ".proj.0.lkb_reparam."),
    (r"\.mlp\.(conv|fc1|fc2)\.(?=.*)", r".convffn.\1."),
    (r"(layer_scale\w*)\.gamma$", r"\1"),
]


def rename(name: str) -> str:
    """model.vision_tower.timm_model.stages.3.blocks.0.mlp.fc1.bias
    -> vision_tower.vision_model.network.7.0.convffn.fc1.bias
    """
    if stage := re.search(r"\.stages\.(\d)\.(downsample|pos_emb|blocks)\.", name):
        index, part = int(stage[1]), ("downsample", "pos_emb", "blocks").index(stage[2])
        name = name.replace(stage[0], f".network.{NETWORK[index][part]}.")
    for pattern, replacement in RENAMES:
        if pattern.startswith(r"\.mlp") and "vision_model" not in name:
            continue
        name = re.sub(pattern, replacement, name)
    return name


def weights(model: nn.Module) -> Arrays:
    """Every weight of transformers' FastVLM under its native name, in native layout, float32."""
    native: Arrays = {}
    for name, tensor in model.state_dict().items():
        new = rename(name)
        tied = model.config.text_config.tie_word_embeddings and new.endswith("lm_head.weight")
        if name.endswith("num_batches_tracked") or tied:
            continue
        if "layer_scale" in new:
            tensor = tensor.reshape(1, 1, -1)
        elif tensor.dim() == 4:
            tensor = tensor.permute(0, 2, 3, 1)
        native[new] = tensor.float().contiguous().numpy()
    native["vision_tower.vision_model.head.proj"] = np.zeros((2 * DIMS[-1], 48), np.float32)
    return native


def config(image_size: int = 192, tied: bool = False, **changes: Any) -> dict[str, Any]:
    """config.json of the native layout, with every key that mlx-vlm and mlx-swift-lm ask for."""
    text = {
        key: value for key, value in TEXT.items() if key not in ("model_type", "rope_parameters")
    }
    vision = {
        "cls_ratio": 2.0,
        "down_patch_size": 7,
        "down_stride": 2,
        "downsamples": [True] * 5,
        "embed_dims": list(DIMS),
        "hidden_size": 1024,
        "image_size": image_size,
        "intermediate_size": 2 * DIMS[-1],
        "layers": list(LAYERS),
        "layer_scale_init_value": 1e-5,
        "mlp_ratios": [4] * 5,
        "num_classes": 1000,
        "patch_size": 64,
        "pos_embs_shapes": [None, None, None, [7, 7], [7, 7]],
        "projection_dim": 48,
        "repmixer_kernel_size": 3,
        "token_mixers": ["repmixer", "repmixer", "repmixer", "attention", "attention"],
    }
    return {
        "model_type": "llava_qwen2",
        **text,
        "rope_theta": 1e6,
        "tie_word_embeddings": tied,
        "eos_token_id": tokenizer.STOP,
        "image_aspect_ratio": "pad",
        "image_token_index": -200,
        "mm_hidden_size": 2 * DIMS[-1],
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": f"mobileclip_l_{image_size}",
        "tokenizer_model_max_length": 8192,
        "tokenizer_padding_side": "right",
        "vision_config": vision,
        **changes,
    }


def save(arrays: Arrays, written: dict[str, Any], folder: Path) -> Path:
    """A folder in the native layout: config.json, model.safetensors, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, str(folder / "model.safetensors"), metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(written, indent=1))
    tokenizer.save(folder)
    return folder
