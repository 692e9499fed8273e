"""A model we converted, in mlx-vlm: the same greedy ids. Optional, in mlx-vlm's own environment.

MLX_VLM_PYTHON=/path/to/python pytest tests/test_interop_mlx_vlm.py

The interpreter must have mlx-vlm (0.7.10 was used). FastViTHD has its published geometry, because
mlx-vlm builds no other; the decoder has two layers and random weights. Images are 256 pixels wide:
at the published 1024 the tower takes mlx-vlm minutes on a CPU.
"""

import gzip
import json
import os
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

PEER = os.environ.get("MLX_VLM_PYTHON")
pytestmark = pytest.mark.skipif(
    not PEER, reason="needs MLX_VLM_PYTHON, an interpreter with mlx-vlm"
)

KEYS = Path(__file__).parent / "golden" / "keys" / "fastvlm_0.5b_apple_llava_keys.json.gz"
SIDE, HIDDEN, INNER, VOCABULARY, LAYERS, HEADS, KV_HEADS = 256, 256, 512, 262, 2, 4, 2
NEW_TOKENS = 12
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PROMPT = "<|im_start|>user\n<image>\nhi<|im_end|>\n<|im_start|>assistant\n"
CONFIG = {
    "model_type": "llava_qwen2",
    "architectures": ["LlavaQwen2ForCausalLM"],
    "auto_map": {"AutoConfig": "llava_qwen.LlavaConfig"},
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "mm_hidden_size": 3072,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": f"mobileclip_l_{SIDE}",
    "image_aspect_ratio": "pad",
    "eos_token_id": 258,
}
# Variances that make up for activations; the decoder's branches outweigh what they are added to,
# so that tied embeddings do not just repeat the last token.
GAINS = {"fc1": 2.0, "reparam_conv": 1.5, "o_proj": 9.0, "down_proj": 90.0, "mm_projector": 2.0}
# Kernels that hold their block's residual.
WITH_IDENTITY = (
    "token_mixer.reparam_conv.weight",
    "network.6.reparam_conv.weight",
    "network.9.reparam_conv.weight",
)

# Run by the peer: greedy ids of its own processor, model and cache.
PROGRAM = """
import json, sys
import mlx.core as mx
import numpy as np
from PIL import Image
from mlx_vlm import load
from mlx_vlm.models import cache

def run(folder, prompt, image, count):
    model, processor = load(folder)
    pictures = [Image.open(image)] if image else None
    inputs = processor(images=pictures, text=prompt)
    ids = mx.array(inputs["input_ids"])
    pixels = mx.array(inputs["pixel_values"]) if image else None
    embeddings = model.get_input_embeddings(ids, pixels).inputs_embeds
    decoder = model.language_model
    memory = cache.make_prompt_cache(decoder)
    logits = decoder(ids, inputs_embeds=embeddings, cache=memory).logits[:, -1]
    found, first = [], np.array(logits.astype(mx.float32))[0].tolist()
    for _ in range(count):
        token = mx.argmax(logits, axis=-1)
        found.append(token.item())
        logits = decoder(token[None], cache=memory).logits[:, -1]
    packed = "scales" in model.mm_projector[0]
    return {"ids": found, "logits": first, "length": embeddings.shape[1], "packed": packed}

print("RESULT" + json.dumps([run(*job) for job in json.loads(sys.argv[1])]))
"""


def language_model_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "model.mm_projector.0.weight": (HIDDEN, 3072),
        "model.mm_projector.0.bias": (HIDDEN,),
        "model.mm_projector.2.weight": (HIDDEN, HIDDEN),
        "model.mm_projector.2.bias": (HIDDEN,),
    }
    kv = HIDDEN * KV_HEADS // HEADS
    for layer in range(LAYERS):
        for name, out, inner in (
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", kv, HIDDEN),
            ("self_attn.v_proj", kv, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", INNER, HIDDEN),
            ("mlp.up_proj", INNER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INNER),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = (out, inner)
            if name[-6:] in ("q_proj", "k_proj", "v_proj"):
                shapes[f"model.layers.{layer}.{name}.bias"] = (out,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (HIDDEN,)
    return shapes


def random_weight(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Weights under which a signal keeps its spread from the pixels to the logits."""
    leaf = name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return np.array(1, dtype=np.int64)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
    if "layer_scale" in name:
        drawn = rng.uniform(0.1, 0.3, shape)
    elif leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
        drawn = rng.uniform(0.7, 1.4, shape)
    elif leaf in ("bias", "running_mean"):
        drawn = rng.normal(0, 0.1, shape)
    elif "embed_tokens" in name:
        drawn = rng.normal(0, 1, shape)
    else:
        gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
        drawn = rng.normal(0, (gain / fan_in) ** 0.5, shape)
    if name.endswith(WITH_IDENTITY) and fan_in > 1 and shape[1] == 1:
        drawn *= 0.1
        drawn[:, 0, shape[2] // 2, shape[3] // 2] += 1
    return drawn.astype(np.float32)


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A random model in Apple's layout with the published tower and two decoder layers."""
    folder = tmp_path_factory.mktemp("source")
    with gzip.open(KEYS, "rt") as file:
        listed = json.load(file)
    shapes = {k: tuple(v) for k, v in listed.items() if k.startswith("model.vision_tower.")}
    rng = np.random.default_rng(7)
    weights = {
        name: mx.array(random_weight(name, shape, rng))
        for name, shape in (shapes | language_model_shapes()).items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """A smooth wide picture with some noise."""
    from PIL import Image

    rng = np.random.default_rng(3)
    rows, columns = np.mgrid[0:480, 0:640] / 640
    planes = [np.sin(9 * rows + 5 * columns + k) * 100 + 128 for k in range(3)]
    noisy = np.stack(planes, axis=-1) + rng.normal(0, 8, (480, 640, 3))
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path)
    return path


def ours(folder: Path, prompt: str, image: Path | None) -> tuple[list[int], np.ndarray]:
    """Our greedy ids and the logits behind the first of them."""
    from mlx_vlm_edge import load, stream_generate

    model, processor = load(str(folder), dtype="float32")
    images = [image] if image else []
    logits = np.array(model(processor(prompt, images=images, raw=True)))[0, -1]
    found = stream_generate(model, processor, prompt, images, raw=True, max_tokens=NEW_TOKENS)
    return [chunk.token for chunk in found if chunk.token is not None], logits


@pytest.mark.usefixtures("every_row")
def test_mlx_vlm_gives_the_same_greedy_ids(source, picture, tmp_path):
    from mlx_vlm_edge_convert import convert

    full = convert(source, tmp_path / "full", verify=True)
    four = convert(source, tmp_path / "four", bits=4, group_size=64)
    text = PROMPT.replace("<image>\n", "")
    jobs = [(full, PROMPT, picture), (full, text, None), (four, text, None)]
    sent = json.dumps([[str(a), b, c and str(c), NEW_TOKENS] for a, b, c in jobs])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(PEER), "-c", PROGRAM, sent], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.split("RESULT")[1])
    for (folder, prompt, image), peer in zip(jobs, answers, strict=True):
        ids, logits = ours(folder, prompt, image)
        theirs = np.array(peer["logits"])
        off = float(np.linalg.norm(logits - theirs) / np.linalg.norm(theirs))
        print(f"{folder.name} image={bool(image)}: ids {ids}, logits off by {off:.1e} (relative)")
        assert ids == peer["ids"][: len(ids)]
        assert len(ids) == NEW_TOKENS or ids[-1] in (256, 258)
        assert len(set(ids)) > 2, "a constant answer proves nothing"
        assert off < 1e-3
        assert not peer["packed"]
