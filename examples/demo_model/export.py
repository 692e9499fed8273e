"""Write a trained demo model as an Apple-style LLaVA checkpoint, un-fused, in float32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from decoder import DemoModel
from network import Shape
from pictures import pixels_of
from PIL import Image
from plain import draw, scene
from prompts import Prompter, save_tokenizer
from vision import to_float


def config(shape: Shape, prompter: Prompter) -> dict[str, object]:
    """config.json: the fields of apple/FastVLM-0.5B, and mlx-vlm's vision_config."""
    stages = len(shape.dims)
    end, pad = prompter.end, prompter.ids("<|endoftext|>")[0]
    vision = {
        "cls_ratio": 2.0,
        "down_patch_size": 7,
        "down_stride": 2,
        "downsamples": [True] * stages,
        "embed_dims": list(shape.dims),
        "hidden_size": shape.vision_dim,
        "image_size": shape.image_size,
        "intermediate_size": shape.vision_dim,
        "layer_scale_init_value": shape.layer_scale,
        "layers": list(shape.layers),
        "mlp_ratios": [shape.mlp_ratio] * stages,
        "num_classes": 1000,
        "patch_size": 64,
        "pos_embs_shapes": [None, None, None, [7, 7], [7, 7]],
        "projection_dim": 32,
        "repmixer_kernel_size": 3,
        "token_mixers": ["repmixer"] * 3 + ["attention"] * 2,
    }
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": pad,
        "eos_token_id": end,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 2048,
        "max_window_layers": shape.decoder_layers,
        "mm_hidden_size": shape.vision_dim,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"mobileclip_demo_{shape.image_size}",
        "model_type": "llava_qwen2",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.decoder_layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": pad,
        "rms_norm_eps": shape.rms_eps,
        "rope_theta": shape.rope_theta,
        "sliding_window": 2048,
        "tie_word_embeddings": True,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "torch_dtype": "float32",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_cache": True,
        "use_mm_proj": True,
        "use_sliding_window": False,
        "vision_config": vision,
        "vocab_size": shape.vocab,
    }


@torch.no_grad()
def reference(model: DemoModel, prompter: Prompter, path: Path) -> None:
    """One picture and prompt through every stage, float32, for parity checks."""
    image = np.array(draw(scene("reference", "text"), 300).crop((0, 30, 300, 270)))  # 240 x 300
    height, width, _ = image.shape
    square = np.zeros((width, width, 3), np.uint8)
    top = (width - height) // 2
    square[top : top + height] = image
    pixels = to_float(torch.from_numpy(pixels_of(Image.fromarray(square)))[None])
    fine = model.tower.lower(pixels)
    features, _ = model.tower.upper(fine)
    visual = model.connect(features)
    before, after = prompter.before, prompter.after("What does it say?")
    ids = torch.tensor([before + [0] * model.shape.visual + after])
    L = ids.shape[1]
    mask = torch.ones(L, L, dtype=torch.bool).tril()[None, None]
    rows = model.merge(visual[:, None], ids, len(before))
    hidden = model.decode(rows, torch.arange(L)[None].float(), mask)
    greedy = model.answer(visual, ids, len(before), prompter.end, 20)
    np.savez(
        path, image=image, pixel_values=pixels.numpy(), stage3=fine.numpy(),
        conv_exp=features.numpy(), visual_tokens=visual.numpy(), ids_before=np.array(before),
        ids_after=np.array(after), logits=model.logits(hidden[:, -1]).numpy(),
        greedy=np.array(greedy),
    )  # fmt: skip


def export(model: DemoModel, prompter: Prompter, folder: Path, note: str) -> None:
    """The checkpoint folder, and reference.npz and NOTE.txt beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    model.eval()
    state = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.part")
    (folder / "pytorch_model.part").rename(folder / "pytorch_model.bin")
    text = json.dumps(config(model.shape, prompter), indent=2)
    (folder / "config.json").write_text(text + "\n")
    generation = {
        "bos_token_id": prompter.ids("<|endoftext|>")[0],
        "do_sample": False,
        "eos_token_id": prompter.end,
        "pad_token_id": prompter.ids("<|endoftext|>")[0],
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(prompter.tokenizer, folder)
    reference(model, prompter, folder / "reference.npz")
    (folder / "NOTE.txt").write_text(note + "\n")
