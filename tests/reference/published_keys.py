"""Names and shapes of the published full-size LLaVA-like checkpoints, in PyTorch's layout.

From the project's fact sheets: mtgv/MobileVLM*, liuhaotian/llava-v1.5-*, llava-hf/llava-1.5-*-hf.
"""

Shapes = dict[str, tuple[int, ...]]

CLIP = {"width": 1024, "inner": 4096, "layers": 24}
TOWER = "model.vision_tower.vision_tower.vision_model."


def tower(prefix: str = TOWER) -> Shapes:
    """CLIP ViT-L/14-336: 391 arrays."""
    width, inner = CLIP["width"], CLIP["inner"]
    shapes: Shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "embeddings.position_embedding.weight": (577, width),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for index in range(CLIP["layers"]):
        layer = f"encoder.layers.{index}."
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}self_attn.{name}", width, width)
        shapes |= linear(f"{layer}mlp.fc1", inner, width) | linear(f"{layer}mlp.fc2", width, inner)
    for norm in norms:
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    return {prefix + name: shape for name, shape in shapes.items()}


def linear(name: str, out: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}


def decoder(hidden: int, inner: int, layers: int, vocab: int = 32000) -> Shapes:
    """Llama with as many key/value heads as heads."""
    shapes: Shapes = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for index in range(layers):
        layer = f"model.layers.{index}."
        shapes |= {f"{layer}self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
        shapes |= {f"{layer}mlp.{x}_proj.weight": (inner, hidden) for x in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (hidden, inner)}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"{layer}{norm}.weight": (hidden,) for norm in norms}
    return shapes


def ldp(width: int) -> Shapes:
    """V1's connector: 24 arrays."""
    prefix = "model.mm_projector.model."
    shapes = linear(f"{prefix}mlp.1", width, 1024) | linear(f"{prefix}mlp.3", width, width)
    for block in (1, 2):
        name = f"{prefix}mb_block.{block}.block."
        shapes |= {
            f"{name}0.0.weight": (width, 1, 3, 3),
            f"{name}0.1.weight": (width,),
            f"{name}0.1.bias": (width,),
            f"{name}1.fc1.weight": (width // 4, width, 1, 1),
            f"{name}1.fc1.bias": (width // 4,),
            f"{name}1.fc2.weight": (width, width // 4, 1, 1),
            f"{name}1.fc2.bias": (width,),
            f"{name}2.0.weight": (width, width, 1, 1),
            f"{name}2.1.weight": (width,),
            f"{name}2.1.bias": (width,),
        }
    return shapes


def ldpv2(width: int) -> Shapes:
    """V2's connector: 6 arrays."""
    prefix = "model.mm_projector."
    return {
        **linear(f"{prefix}mlp.mlp.0", width, 1024),
        **linear(f"{prefix}mlp.mlp.2", width, width),
        f"{prefix}peg.peg.0.weight": (width, 1, 3, 3),
        f"{prefix}peg.peg.0.bias": (width,),
    }


def mlp(width: int) -> Shapes:
    """LLaVA's connector under the original's names."""
    prefix = "model.mm_projector."
    return linear(f"{prefix}0", width, 1024) | linear(f"{prefix}2", width, width)
