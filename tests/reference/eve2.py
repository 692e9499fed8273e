"""EVE v2 in PyTorch at a tiny size, written from its description: both weights, then a mask.

A layer's every part exists twice, plain and `moe_`; each is computed for all positions and the
mask of visual tokens picks one: plain * (1 - mask) + moe * mask. Attention sees all positions.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch import nn
from torch.nn import functional as F

from . import tokenizer
from .fastvlm import spread
from .variance import randomise

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TINY: dict[str, Any] = {
    "model_type": "eve-qwen2",
    "architectures": ["EVEQwen2ForCausalLM"],
    "add_moe": True,
    "moe_part": "layernorm-self_attn-mlp",
    "mm_vision_tower": "openai/eve-anyratio-res160-patch16",
    "mm_hidden_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": tokenizer.VOCAB,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": tokenizer.END,
    "eos_token_id": tokenizer.STOP,
}


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps)


class MLP(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions 0..L-1 on [heads, L, D], the halves of D being the pairs."""
    L, D = x.shape[-2:]
    rates = theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.arange(L, dtype=torch.float64)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, self.theta = config["hidden_size"], config["rope_theta"]
        self.heads, self.kv = config["num_attention_heads"], config["num_key_value_heads"]
        self.size = width // self.heads
        for prefix in ("", "moe_"):
            setattr(self, f"{prefix}q_proj", nn.Linear(width, width))
            for name in ("k", "v"):
                setattr(self, f"{prefix}{name}_proj", nn.Linear(width, self.kv * self.size))
            setattr(self, f"{prefix}o_proj", nn.Linear(width, width, bias=False))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        L = len(x)
        q, k, v = (
            choose(self, f"{name}_proj", x, mask).view(L, -1, self.size).transpose(0, 1)
            for name in "qkv"
        )
        k, v = (y.repeat_interleave(self.heads // self.kv, 0) for y in (rotate(k, self.theta), v))
        scores = rotate(q, self.theta) @ k.transpose(1, 2) / math.sqrt(self.size)
        future = torch.ones(L, L, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return choose(self, "o_proj", (weights @ v).transpose(0, 1).reshape(L, -1), mask)


def choose(owner: nn.Module, name: str, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The part `name` for text, its `moe_` copy where mask [L, 1] is 1."""
    plain, visual = getattr(owner, name)(x), getattr(owner, f"moe_{name}")(x)
    return plain * (1 - mask) + visual * mask


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn = Attention(config)
        self.mlp, self.moe_mlp = MLP(config), MLP(config)
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(self, name, Norm(width, eps))
            setattr(self, f"moe_{name}", Norm(width, eps))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(choose(self, "input_layernorm", x, mask), mask)
        return x + choose(self, "mlp", choose(self, "post_attention_layernorm", x, mask), mask)


class Tower(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        middle, width = config["mm_hidden_size"], config["hidden_size"]
        self.patch_embedding = nn.Sequential(
            nn.Conv2d(3, middle, 16, 16), nn.GELU(), nn.Conv2d(middle, width, 2, 2)
        )
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.split_embedding = nn.Parameter(torch.randn(width))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[3, H, W] -> class token, then rows that each end in the split token."""
        sequence = [self.class_embedding]
        for row in self.patch_embedding(pixels[None])[0].permute(1, 2, 0):
            sequence += [*row, self.split_embedding]
        return torch.stack(sequence)


class Eve2(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.model.norm = Norm(config["hidden_size"], config["rms_norm_eps"])
        self.model.vision_tower = Tower(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(self, parts: list[list[int] | np.ndarray]) -> torch.Tensor:
        """Logits [L, V] of a prompt of token ids and resized pictures (uint8 [H, W, 3])."""
        rows, masks = [], []
        for part in parts:
            picture = isinstance(part, np.ndarray)
            ids = torch.tensor([] if picture else part, dtype=torch.long)
            rows.append(self.encode(part) if picture else self.model.embed_tokens(ids))
            masks.append(torch.full((len(rows[-1]), 1), float(picture), dtype=rows[-1].dtype))
        x, mask = torch.cat(rows), torch.cat(masks)
        for layer in self.model.layers:
            x = layer(x, mask)
        return self.lm_head(self.model.norm(x))

    def encode(self, picture: np.ndarray) -> torch.Tensor:
        dtype = self.lm_head.weight.dtype
        mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (MEAN, STD))
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1).double() / 255
        return self.model.vision_tower(((pixels - mean) / std).to(dtype))


def resized(image: np.ndarray, max_size: int = 160) -> np.ndarray:
    """The original's preprocessing: `max_size` squared in area, sides up to a multiple of 32."""
    picture = Image.fromarray(image)
    width, height = picture.size
    scale = math.sqrt(width * height) / max_size
    width = max(math.ceil(width / scale / 32) * 32, 32)
    height = max(math.ceil(height / scale / 32) * 32, 32)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def build(seed: int = 0) -> Eve2:
    """A tiny model with variance-preserving random weights, in float64."""
    torch.manual_seed(seed)
    model = Eve2(TINY).eval()
    picture = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    parts: list[Any] = [list(range(40, 60)), picture, list(range(60, 100))]
    randomise(model, lambda: model(parts), seed, spread)
    model.model.vision_tower.class_embedding.data.normal_()
    model.model.vision_tower.split_embedding.data.normal_()
    return model.double()


@torch.no_grad()
def logits(model: Eve2, parts: list[Any]) -> np.ndarray:
    """float64 [L, V]."""
    return model(parts).numpy()


def greedy(model: Eve2, parts: list[Any], count: int) -> tuple[list[int], float]:
    """`count` greedy ids, each from a full forward, and the smallest lead of a winner."""
    ids: list[int] = []
    lead = math.inf
    for _ in range(count):
        last = logits(model, [*parts, ids] if ids else parts)[-1]
        second, first = np.sort(last)[-2:]
        lead = min(lead, float(first - second))
        ids.append(int(last.argmax()))
    return ids, lead


def save(model: Eve2, folder: Path) -> Path:
    """A model folder as published: names of the original, no preprocessor's file."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: x.float().numpy().copy() for name, x in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config))
    tokenizer.save(folder)
    return folder
