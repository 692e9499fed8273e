"""The language side of the demo model: connector, Qwen2 decoder, and the whole model.

Attribute names are the checkpoint's (`model.mm_projector.0.weight`, `model.layers.0...`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from network import Shape, VisionTower
from torch import Tensor, nn

Turn = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (rotate-half over the whole head)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.head_dim = shape.hidden // shape.heads
        kv = self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(shape.hidden, shape.hidden)
        self.k_proj = nn.Linear(shape.hidden, kv)
        self.v_proj = nn.Linear(shape.hidden, kv)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor, turn: Turn, mask: Tensor) -> Tensor:
        B, L, _ = x.shape
        q = self.q_proj(x).view(B, L, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, L, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, L, self.kv_heads, self.head_dim).transpose(1, 2)
        repeat = self.heads // self.kv_heads
        k, v = rotate(k, turn).repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        y = F.scaled_dot_product_attention(rotate(q, turn), k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, L, -1))


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """x[B, heads, L, D] turned by angles whose cosines and sines are [B, 1, L, D/2]."""
    one, two = x.chunk(2, -1)
    cos, sin = turn
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden, shape.rms_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, shape.rms_eps)

    def forward(self, x: Tensor, turn: Turn, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class TowerHolder(nn.Module):
    """Apple's nesting: vision_tower.vision_tower.model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.vision_tower = nn.ModuleDict({"model": VisionTower(shape)})


class Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.vision_tower = TowerHolder(shape)
        self.mm_projector = nn.Sequential(
            nn.Linear(shape.vision_dim, shape.hidden),
            nn.GELU(),
            nn.Linear(shape.hidden, shape.hidden),
        )
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList([Layer(shape) for _ in range(shape.decoder_layers)])
        self.norm = nn.RMSNorm(shape.hidden, shape.rms_eps)


class DemoModel(nn.Module):
    """The whole model; the embedding is also the output head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        head_dim = shape.hidden // shape.heads
        inverse = shape.rope_theta ** (-torch.arange(0, head_dim, 2) / head_dim)
        self.register_buffer("inverse", inverse, persistent=False)
        for name, weight in self.model.named_parameters():
            if weight.ndim == 2 and "vision_tower" not in name:
                nn.init.normal_(weight, std=0.04)
        for layer in self.model.layers:
            nn.init.normal_(layer.self_attn.o_proj.weight, std=0.02)
            nn.init.normal_(layer.mlp.down_proj.weight, std=0.02)

    @property
    def tower(self) -> VisionTower:
        return self.model.vision_tower.vision_tower["model"]

    def connect(self, features: Tensor) -> Tensor:
        """features[B, C, H, W] -> visual tokens[B, H*W, hidden], row by row."""
        return self.model.mm_projector(features.permute(0, 2, 3, 1).flatten(1, 2))

    def decode(self, embeddings: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """embeddings[B, L, hidden], positions[B, L], mask[B, 1, L, L] -> hidden states."""
        angles = positions[:, None, :, None] * self.inverse
        x, turn = embeddings, (angles.cos(), angles.sin())
        for layer in self.model.layers:
            x = layer(x, turn, mask)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight)

    def merge(self, visual: Tensor, ids: Tensor, start: int) -> Tensor:
        """Embeddings of ids[B, L] with visual[B, pictures, V, hidden]: the first picture's tokens
        from `start` on, and one token of text between two pictures."""
        rows = self.model.embed_tokens(ids)
        V = visual.shape[2]
        for number in range(visual.shape[1]):
            place = start + number * (V + 1)
            rows[:, place : place + V] = visual[:, number]
        return rows

    @torch.no_grad()
    def answer(self, visual: Tensor, ids: Tensor, start: int, end: int, most: int) -> list[int]:
        """Greedy ids for one prompt ids[1, L] about visual[1, V, hidden], without the end token."""
        embeddings, out = self.merge(visual[:, None], ids, start), []
        for _ in range(most):
            L = embeddings.shape[1]
            mask = torch.ones(L, L, dtype=torch.bool).tril()[None, None]
            hidden = self.decode(embeddings, torch.arange(L)[None].float(), mask)
            token = int(self.logits(hidden[:, -1]).argmax())
            if token == end:
                break
            out.append(token)
            step = self.model.embed_tokens(torch.tensor([[token]]))
            embeddings = torch.cat([embeddings, step], 1)
        return out
