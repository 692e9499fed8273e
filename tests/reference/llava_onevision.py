"""transformers' LLaVA-OneVision at a tiny size: pixels, features, visual tokens, three layouts.

Images go through transformers' Pillow processor: the default one of transformers 5 resizes tensors,
which gives other pixels than the original.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from . import tokenizer, torchvision_shim
from .fastvlm import TEXT, WIDE, picture, spread
from .variance import randomise

torchvision_shim.install()

from transformers import (  # noqa: E402
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (  # noqa: E402
    LlavaOnevisionImageProcessorPil,
)

SIDE, PATCH, GRID = 44, 14, 3  # two pixels fill no patch, as 384 = 27 * 14 + 6
PINPOINTS = [[SIDE * i, SIDE * j] for i in range(1, 7) for j in range(1, 7)]  # [height, width]
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
    "vision_use_head": False,
}


def config(tied: bool = False) -> LlavaOnevisionConfig:
    """The tiny config."""
    return LlavaOnevisionConfig(
        text_config=TEXT | {"tie_word_embeddings": tied, "eos_token_id": tokenizer.STOP},
        vision_config=VISION,
        image_token_index=tokenizer.IMAGE,
        video_token_index=tokenizer.IMAGE + 1,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=tied,
    )


def prepare(images: list[np.ndarray], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Inputs for the images of one prompt: pixel_values [images, tiles, 3, H, W] and sizes."""
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        image_grid_pinpoints=PINPOINTS,
    )
    inputs = processor([images], return_tensors="pt")
    return {
        "pixel_values": inputs["pixel_values"].to(dtype),
        "image_sizes": inputs["image_sizes"],
        "batch_num_images": inputs["batch_num_images"],
    }


def build(tied: bool = False, seed: int = 0) -> nn.Module:
    """A model with variance-preserving random weights, float32, in eval mode."""
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(config(tied)).float().eval()
    model.set_attn_implementation("eager")
    model.model.image_newline.data.normal_(0, 1)
    inputs = prepare([picture(99, 120, 80)])
    count = len(model.model.get_image_features(**inputs).pooler_output[0])
    ids = torch.tensor([[40, 41, 42, *[tokenizer.IMAGE] * count, *range(60, 90)]])
    randomise(model, lambda: model(input_ids=ids, **inputs), seed, spread)
    model.model.image_newline.data.normal_(0, 1)
    if tied:
        model.tie_weights()
    return model


@torch.no_grad()
def features(model: nn.Module, image: np.ndarray) -> np.ndarray:
    """What the tower's last layer gives for the tiles of one image, [tiles, N, C]."""
    kept = []
    layer = model.model.vision_tower.encoder.layers[-1]
    hook = layer.register_forward_hook(lambda *call: kept.append(call[2]))
    output = model.model.get_image_features(**prepare([image], model.dtype))
    hook.remove()
    found = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    assert torch.equal(found, output.hidden_states[-1]), "the reference reads another layer"
    return found.to(WIDE).numpy()


@torch.no_grad()
def encode(model: nn.Module, images: list[np.ndarray]) -> list[torch.Tensor]:
    """Visual tokens [N, D] of each image of one prompt."""
    return list(model.model.get_image_features(**prepare(images, model.dtype)).pooler_output)


@torch.no_grad()
def embeddings(
    model: nn.Module, parts: list[list[int] | int], images: list[np.ndarray]
) -> torch.Tensor:
    """Input embeddings [1, L, D]: token ids, and the number of an image where it stands."""
    table, tokens = model.get_input_embeddings(), encode(model, images) if images else []
    rows = [tokens[part] if isinstance(part, int) else table(torch.tensor(part)) for part in parts]
    return torch.cat(rows)[None]


@torch.no_grad()
def forward(model: nn.Module, ids: list[int], images: list[np.ndarray]) -> np.ndarray:
    """Logits [L, V] by the model's own forward, placeholders and all."""
    inputs = prepare(images, model.dtype) if images else {}
    return model(input_ids=torch.tensor([ids]), **inputs).logits[0].to(WIDE).numpy()


Weights = dict[str, torch.Tensor]


def weights(model: nn.Module) -> Weights:
    """Every weight under transformers 5's own name, float32."""
    tied = model.config.text_config.tie_word_embeddings
    return {
        name: tensor.float().contiguous().clone()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }


def renamed(arrays: Weights, prefixes: dict[str, str]) -> Weights:
    """Each name with the first prefix that it has replaced."""
    result = {}
    for name, tensor in arrays.items():
        old = next(prefix for prefix in prefixes if name.startswith(prefix))
        result[prefixes[old] + name.removeprefix(old)] = tensor
    return result


HUB = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
ORIGINAL = {
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.image_newline": "model.image_newline",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}


def in_layout(arrays: Weights, layout: str) -> Weights:
    """Weights of `weights` in the layout "transformers", "hub", "native" or "original"."""
    if layout == "transformers":
        return arrays
    found = renamed(arrays, ORIGINAL if layout == "original" else HUB)
    if layout == "native":
        patches = "vision_tower.vision_model.embeddings.patch_embedding.weight"
        found[patches] = found[patches].permute(0, 2, 3, 1).contiguous()
    return found


def original_config(tied: bool = False) -> dict[str, Any]:
    """config.json as lmms-lab writes it; `vision_config` is ours, for the tiny tower."""
    text = {
        key: value for key, value in TEXT.items() if key not in ("model_type", "rope_parameters")
    }
    return {
        **text,
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "eos_token_id": tokenizer.STOP,
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[width, height] for height, width in PINPOINTS],
        "image_token_index": tokenizer.IMAGE,
        "mm_hidden_size": VISION["hidden_size"],
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "rope_theta": TEXT["rope_parameters"]["rope_theta"],
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "use_mm_proj": True,
        "vision_config": VISION,
    }


def hub_config(tied: bool = False) -> dict[str, Any]:
    """config.json as transformers wrote it for the Hub: untied at the root, tied in its text."""
    found: dict[str, Any] = json.loads(config(tied).to_json_string(use_diff=False))
    return found | {"tie_word_embeddings": False}


def save(arrays: Weights, folder: Path, layout: str, tied: bool = False) -> Path:
    """A model folder in one of the layouts."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(in_layout(arrays, layout), str(folder / "model.safetensors"), {"format": "pt"})
    written = original_config(tied) if layout == "original" else hub_config(tied)
    (folder / "config.json").write_text(json.dumps(written, indent=1))
    tokenizer.save(folder)
    return folder
