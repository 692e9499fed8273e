"""transformers' FastVLM at a tiny size: weights, every stage's output, logits and greedy ids.

Its tower is timm's `fastvit_mci3` with fewer and narrower blocks; geometry as in the golden folder.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from . import tokenizer, torchvision_shim
from .variance import randomise

torchvision_shim.install()

from transformers import FastVlmConfig, FastVlmForConditionalGeneration  # noqa: E402

DIMS, LAYERS = (16, 32, 32, 64, 128), (1, 2, 1, 1, 1)
WIDE = torch.float64  # what results are handed out in
TEXT = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": tokenizer.VOCAB,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "hidden_act": "silu",
}


@dataclass
class Stages:
    """What came out of each part, NHWC for the tower: stem, stage 0..4, conv_exp."""

    tower: dict[str, np.ndarray] = field(default_factory=dict)
    features: np.ndarray | None = None  # [N, C]
    visual_tokens: np.ndarray | None = None  # [N, D]


def config(image_size: int = 192, tied: bool = False) -> FastVlmConfig:
    """The tiny config; `image_size` / 64 squared placeholders per image."""
    args = {"embed_dims": list(DIMS), "layers": list(LAYERS), "inference_mode": True}
    vision = {
        "model_type": "timm_wrapper",
        "architecture": "fastvit_mci3",
        "do_pooling": True,
        "global_pool": "avg",
        "hidden_size": 2 * DIMS[-1],
        "model_args": args,
    }
    return FastVlmConfig(
        text_config=TEXT | {"tie_word_embeddings": tied},
        vision_config=vision,
        image_token_index=tokenizer.IMAGE,
        image_seq_length=(image_size // 64) ** 2,
        projector_hidden_act="gelu",
        tie_word_embeddings=tied,
    )


def picture(seed: int, width: int = 192, height: int = 192) -> np.ndarray:
    """A picture with structure at every scale, uint8 [H, W, 3]: blocks, ramps and some noise."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 80, width)[None, :, None] + np.linspace(0, 50, height)[:, None, None]
    blocks = random.integers(0, 90, (-(-height // 16), -(-width // 16), 3))
    blocks = np.kron(blocks, np.ones((16, 16, 1)))[:height, :width]
    noise = random.integers(0, 30, (height, width, 3))
    return np.clip(ramp + blocks + noise, 0, 255).astype(np.uint8)


def as_pixels(image: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 [H, W, 3] -> float [1, 3, H, W] in 0..1."""
    return torch.from_numpy(image).permute(2, 0, 1)[None].to(dtype) / 255


def spread(name: str) -> float:
    """Gates and logits get a wide spread, so that neither is near a constant or a tie."""
    return 4.0 if name.endswith("lm_head") else 2.0 if name.endswith("se.fc2") else 1.0


def build(image_size: int = 192, tied: bool = False, seed: int = 0) -> nn.Module:
    """A model with variance-preserving random weights, float32, in eval mode."""
    torch.manual_seed(seed)
    model = FastVlmForConditionalGeneration(config(image_size, tied)).float().eval()
    model.set_attn_implementation("eager")
    count = (image_size // 64) ** 2
    ids = torch.tensor([[40, 41, 42, *[tokenizer.IMAGE] * count, *range(60, 90)]])
    pixels = as_pixels(picture(99, image_size, image_size))
    randomise(model, lambda: model(input_ids=ids, pixel_values=pixels), seed, spread)
    if tied:
        model.tie_weights()
    return model


def capture(model: nn.Module, image: np.ndarray) -> Stages:
    """Run one picture through the tower and the connector and keep every stage."""
    stages, hooks = Stages(), []
    tower = model.model.vision_tower.timm_model
    named = [("stem", tower.stem), ("conv_exp", tower.final_conv)]
    named += [(f"stage {i}", stage) for i, stage in enumerate(tower.stages)]

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            stages.tower[name] = output[0].permute(1, 2, 0).to(WIDE).numpy()

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in named]
    with torch.no_grad():
        output = model.model.get_image_features(as_pixels(image, model.dtype))
    for hook in hooks:
        hook.remove()
    stages.features = stages.tower["conv_exp"].reshape(-1, 2 * DIMS[-1])
    stages.visual_tokens = output.pooler_output[0].to(WIDE).numpy()
    return stages


@torch.no_grad()
def encode(model: nn.Module, image: np.ndarray) -> torch.Tensor:
    """Visual tokens [N, D] of one picture."""
    return model.model.get_image_features(as_pixels(image, model.dtype)).pooler_output[0]


@torch.no_grad()
def embeddings(model: nn.Module, parts: list[list[int] | np.ndarray]) -> torch.Tensor:
    """Input embeddings [1, L, D] by plain concatenation: token ids and pictures in their order."""
    table = model.get_input_embeddings()
    rows = []
    for part in parts:
        if isinstance(part, np.ndarray):
            rows.append(encode(model, part))
        else:
            rows.append(table(torch.tensor(part, dtype=torch.long)))
    return torch.cat(rows)[None]


@torch.no_grad()
def logits(model: nn.Module, embedded: torch.Tensor) -> np.ndarray:
    """Logits [L, V] of input embeddings [1, L, D]."""
    hidden = model.model.language_model(inputs_embeds=embedded).last_hidden_state
    return model.lm_head(hidden)[0].to(WIDE).numpy()


@torch.no_grad()
def greedy(model: nn.Module, embedded: torch.Tensor, count: int) -> tuple[list[int], float]:
    """`count` greedy ids, each from a full forward, and the smallest lead of a winner."""
    ids, gap = [], float("inf")
    for _ in range(count):
        last = logits(model, embedded)[-1]
        second, first = np.sort(last)[-2:]
        gap = min(gap, float(first - second))
        ids.append(int(last.argmax()))
        embedded = torch.cat([embedded, embeddings(model, [[ids[-1]]])], dim=1)
    return ids, gap


def save(model: nn.Module, folder: Path) -> Path:
    """A Hugging Face folder: config, weights and the tiny tokenizer."""
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text())
    written["text_config"]["eos_token_id"] = tokenizer.STOP
    path.write_text(json.dumps(written, indent=1))
    return folder
