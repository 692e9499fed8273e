"""What is compared: one row for each target, with the order that both workers get."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
QUESTION, SECOND = "Describe the image in detail.", "How many people are there?"
WARM, COLD, FIXED, MEMORY = "warm", "cold", "fixed", "memory"
SECONDS, RATE, BYTES = "s", "tokens/s", "bytes"
VISUAL, WIDTH = 256, 896
TEXT_IDS = list(range(1000, 1015))  # 15 text positions with 256 visual ones between them: 271

SHOWN: dict[str, Callable[[float], str]] = {
    SECONDS: lambda value: f"{value:.3f} s" if value >= 1 else f"{1000 * value:.1f} ms",
    BYTES: lambda value: f"{value / 1e6:.0f} MB",
    RATE: lambda value: f"{1 / value:.2f} tokens/s",
}


def chat(question: str, image: bool = True) -> str:
    """The text that both programs' templates make of a question (parity checks that they do)."""
    user = f"{'<image>' if image else ''}\n{question}" if image else question
    return f"{SYSTEM}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Row:
    """peer / ours must reach `target`; None: recorded, but no target was set."""

    id: str
    title: str
    target: float | None
    kind: str = WARM
    model: str = "f32"
    runs: int = 5
    unit: str = SECONDS
    order: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    with_torch: bool = False


def rows(small: Path, photo: Path) -> list[Row]:
    """The table of targets. small: an ordinary picture; photo: a JPEG of twelve megapixels."""
    picture = {"image": str(small)}
    ask = {"prompt": chat(QUESTION), **picture}
    jpeg = {"do": "time_jpeg", "image": str(photo), "side": 1024}
    at = TEXT_IDS[:14]
    prefill = {"do": "time_prefill", "ids": [*at, -200, TEXT_IDS[14]]}
    prefill |= {"visual": VISUAL, "width": WIDTH}
    decode = {"do": "time_decode", "prompt": chat(QUESTION, image=False), "tokens": 24}
    until = (
        "until the first byte of the answer on stdout; one token is asked for, since the peer's "
    )
    until += "CLI prints nothing before it is done"
    fresh = "process start until the first forward pass could begin: imports, weights, tokenizer, "
    fresh += "pixels and ids of a prompt with a 256 px image"
    begins = fresh + "; ours encodes the image while the language model's weights are still read"
    return [
        Row("fixed", "fixed cost before the first forward pass", 6, FIXED, runs=7, note=begins),
        Row("fixed-whole", "the same, with every weight in memory", None, FIXED, runs=7,
            order={"whole": True}, note=fresh),
        Row("cold", "CLI cold start to first text, 256 px; the peer without torch", 4, COLD,
            runs=7, note=until),
        Row("cold-torch", "CLI cold start to first text, 256 px; the peer with torch installed", 5,
            COLD, runs=7, note=until, with_torch=True),
        Row("memory-f32", "peak memory of the process, f32, 512 px", 1.2, MEMORY, runs=3,
            unit=BYTES, order=ask),
        Row("jpeg", "12-megapixel JPEG to pixels, pixel-exact", 3, runs=7, order=jpeg),
        Row("jpeg-draft", "12-megapixel JPEG to pixels, with JPEG draft (opt-in, not exact)", 6,
            runs=7, order=jpeg | {"draft": True}),
        Row("vision-256", "vision encoder, 256 px", None, runs=7,
            order={"do": "time_vision", "side": 256, **picture}),
        Row("vision-512", "vision encoder, 512 px", 4,
            order={"do": "time_vision", "side": 512, **picture}),
        Row("vision-1024", "vision encoder, 1024 px", 4, runs=3,
            order={"do": "time_vision", "side": 1024, **picture}),
        Row("prefill-f32", "prefill of 271 positions, f32", 1.8, order=prefill),
        Row("ttft-f32", "TTFT end to end, warm, 512 px, f32", 4.5,
            order={"do": "time_ttft", "side": 512, **ask}),
        Row("second-f32", "second question on the same image, 512 px, f32", 10,
            order={"do": "time_second", "side": 512, "second": chat(SECOND), **ask}),
        Row("decode-f32", "decode, f32", 1.1, unit=RATE, order=decode),
        Row("memory-q4", "peak memory of the process, 4-bit, 512 px", 1.3, MEMORY, "q4", 3, BYTES,
            order=ask),
        Row("decode-q4", "decode, 4-bit", 1.0, model="q4", unit=RATE, order=decode),
        Row("prefill-q4", "prefill of 271 positions, 4-bit", 10, model="q4", runs=3,
            order=prefill),
        Row("ttft-q4", "TTFT end to end, warm, 512 px, 4-bit", None, model="q4", runs=3,
            order={"do": "time_ttft", "side": 512, **ask}),
    ]  # fmt: skip


def draw(path: Path, width: int, height: int) -> Path:
    """A JPEG with waves and grain, the same one each time."""
    rng = np.random.default_rng(3)
    across = np.arange(width, dtype=np.float32) / width
    down = np.arange(height, dtype=np.float32)[:, None] / width
    planes = [np.sin(9 * down + 5 * across + k) * 100 + 128 for k in range(3)]
    image = np.stack(planes, axis=-1)
    image += rng.standard_normal((height, width, 1), dtype=np.float32) * 8
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return path


def view(folder: Path, side: int, into: Path) -> Path:
    """The same checkpoint for another picture size: links to its files, two of them rewritten."""
    into.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        link = into / file.name
        if not link.exists():
            link.symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["image_size"] = side
    config["mm_vision_tower"] = f"mobileclip_l_{side}"
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    preprocessor["size"] = {"shortest_edge": side}
    preprocessor["crop_size"] = {"height": side, "width": side}
    for name, content in (("config", config), ("preprocessor_config", preprocessor)):
        (into / f"{name}.json").unlink()
        (into / f"{name}.json").write_text(json.dumps(content, indent=1))
    return into
