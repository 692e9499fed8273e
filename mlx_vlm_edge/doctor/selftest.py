"""Every form of every kernel, a model's stages and its known answers, compared on this machine.

The CPU's plain forms are what all others are held to: MLX's own operations, nothing compiled. A
kernel may differ by rounding alone.
"""

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import kernels
from ..errors import UsageError
from ..generation.loop import generate
from ..kernels import quantized
from ..loading.load import load
from ..wording import first_line
from .pixels import pictures

if TYPE_CHECKING:
    from ..models.base import VisionLanguageModel
    from ..text.prompt import Processor

PICTURES = Path(__file__).parent / "pictures"
ANSWERS = PICTURES / "answers.json"  # of the demo model, by examples/demo_model/record.py
KERNEL, STAGE, COREML = 1e-5, 1e-3, 2e-2  # relative distances: rounding; of layers; of float16
TOKENS = 40  # of a known answer, at most
Kernel = Callable[[], mx.array]


@dataclass(frozen=True)
class Outcome:
    """One comparison. right: None when it could not be done, and why stands in `said`."""

    name: str
    right: bool | None
    said: str


@dataclass(frozen=True)
class Place:
    """Where and how operations run: a device, and which module's forms."""

    name: str
    device: Any
    plain: bool

    @contextmanager
    def chosen(self) -> Iterator[None]:
        before = mx.default_device()
        mx.set_default_device(self.device)
        try:
            with kernels.plain() if self.plain else nullcontext(), _uncompiled(self.plain):
                yield
        finally:
            mx.set_default_device(before)


@contextmanager
def _uncompiled(asked: bool) -> Iterator[None]:
    """MLX compiles for a CPU by a C++ compiler, which need not be there."""
    if asked:
        mx.disable_compile()
    try:
        yield
    finally:
        if asked:
            mx.enable_compile()


def places() -> tuple[Place, list[Place]]:
    """What others are held to, and the others: the CPU's own forms, the GPU's if there is one."""
    here = [Place("CPU's forms", mx.cpu, plain=False)]
    if mx.is_available(mx.gpu):
        here += [
            Place("GPU, compiled", mx.gpu, plain=False),
            Place("GPU, plain", mx.gpu, plain=True),
        ]
    return Place("plain forms on the CPU", mx.cpu, plain=True), here


def selftest() -> Iterator[Outcome]:
    """All of it, in some seconds."""
    truth, others = places()
    yield from compared(kernel_cases(), truth, others, KERNEL)
    yield from _quantised(others)
    yield from (Outcome(*check) for check in pictures(others))
    yield from compared(_stages(), truth, others, STAGE)
    for place in others:
        yield from known_answers(place)
    yield coreml(platform.system())


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Of two arrays, relative to the second; infinite where a value is not finite."""
    if one.shape != other.shape or not np.isfinite(one).all():
        return float("inf")
    return float(np.linalg.norm(one - other) / (np.linalg.norm(other) or 1.0))


def _computed(kernel: Kernel, place: Place) -> np.ndarray:
    with place.chosen():
        return np.array(kernel().astype(mx.float32), dtype=np.float64)


def compared(
    cases: dict[str, Kernel], truth: Place, others: Sequence[Place], limit: float
) -> Iterator[Outcome]:
    """Each case in every place; one that raises is wrong, with what it says."""
    for name, kernel in cases.items():
        want = _computed(kernel, truth)
        for place in others:
            compute = partial(_computed, kernel, place)
            yield _judged(f"{name} ({place.name})", compute, want, limit)


def _judged(
    name: str, compute: Callable[[], np.ndarray], want: np.ndarray, limit: float
) -> Outcome:
    try:
        off = distance(compute(), want)
    except (RuntimeError, ValueError, UsageError) as error:
        return Outcome(name, False, first_line(error))
    return Outcome(name, off <= limit, f"off by {off:.1e}, at most {limit:.0e}")


def _random(*shape: int) -> mx.array:
    """Normal values, the same ones for a shape every time."""
    return mx.array(np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32) * 2)


def kernel_cases() -> dict[str, Kernel]:
    """Every function of kernels/, on inputs that are cut into parts where a form does that."""
    x, wide = _random(1, 9, 7, 12), _random(640, 1024)
    q, k, v = _random(1, 6, 70, 16), _random(1, 2, 70, 16), _random(1, 2, 70, 16)[..., ::-1]
    fc1, fc2 = nn.Linear(12, 30), nn.Linear(30, 8)
    fc1.weight, fc1.bias, fc2.weight, fc2.bias = (
        _random(*shape) for shape in ((30, 12), (30,), (8, 30), (8,))
    )
    seen = mx.arange(70)[None, None, None] % 3 != 1
    added = mx.where(mx.arange(70) < 60, 0.5, -mx.inf)[None] * mx.ones((70, 1))
    depthwise = [_random(12, 7, 7, 1), _random(12, 7, 7, 1)[:, ::-1]]
    full, bias = _random(6, 3, 3, 12), _random(6)
    return {
        "gelu": lambda: kernels.gelu(wide),
        "gelu_tanh": lambda: kernels.gelu_tanh(wide),
        "quick_gelu": lambda: kernels.quick_gelu(wide),
        "relu_squared": lambda: kernels.relu_squared(wide),
        "swiglu": lambda: kernels.swiglu(wide, wide[::-1]),
        "attention": lambda: kernels.attention(q, q, q[..., ::-1], 0.25),
        "causal attention": lambda: kernels.attention(q, k, v, 0.25, "causal"),
        "attention of one query": lambda: kernels.attention(q[:, :, -1:], k, v, 0.25),
        "masked attention": lambda: kernels.attention(q, k, v, 0.25, seen),
        "attention, added mask": lambda: kernels.attention(q, k, v, 0.25, added),
        "tall_matmul": lambda: kernels.tall_matmul(wide[:1], wide),
        "pointwise": lambda: kernels.pointwise(x, fc1, kernels.gelu),
        "mlp": lambda: kernels.mlp(x, fc1, fc2, kernels.gelu),
        "add": lambda: kernels.add(x, x[:, ::-1]),
        "conv2d": lambda: kernels.conv2d(x, full, bias, 2, kernels.gelu),
        "depthwise_conv2d": lambda: kernels.depthwise_conv2d(x, depthwise, None, 1, kernels.gelu),
        "resize_bilinear": lambda: kernels.resize_bilinear(x[0], 20, 5),
    }


def _quantised(others: Sequence[Place]) -> Iterator[Outcome]:
    """A layer of 4 and 8 bits, for few rows and many, against its unpacked matrix in float64."""
    for bits in (4, 8):
        layer = nn.QuantizedLinear.from_linear(nn.Linear(256, 64, bias=False), 64, bits)
        parts = layer.weight, layer.scales, layer.biases
        matrix = np.array(mx.dequantize(*parts, group_size=64, bits=bits), dtype=np.float64)
        for rows in (1, 2 * quantized.ROWS):
            x = _random(rows, 256)
            want = np.array(x, dtype=np.float64) @ matrix.T
            for place in others:
                form = quantized.Linear(layer) if place.device == mx.cpu else layer
                name = f"{bits} bits, {rows} rows ({place.name})"
                compute = partial(_computed, partial(form, x), place)
                yield _judged(name, compute, want, KERNEL)


def _stages() -> dict[str, Kernel]:
    """What the demo model passes on, in float32: its vision tower's tokens, and its logits."""
    model, processor = load("demo", dtype="float32")
    inputs = processor(known()[0]["question"], images=[PICTURES / known()[0]["picture"]])
    follow = mx.array([int(inputs.input_ids[0, -1])])

    def step() -> mx.array:
        cache = model.make_cache()
        model.prefill(inputs, cache, 8)  # in chunks
        return model.step(follow, cache)

    return {
        "image features of the demo": lambda: model.encode_image(inputs.pixels[0]),
        "logits of the demo": lambda: model(inputs),
        "the demo's next token, over its cache": step,
    }


def known() -> list[dict[str, str]]:
    """Pictures, questions, and what the demo model answers."""
    rows: list[dict[str, str]] = json.loads(ANSWERS.read_text(encoding="utf-8"))
    return rows


def known_answers(place: Place) -> Iterator[Outcome]:
    """The demo model as `generate` has it, against what it is known to answer."""
    with place.chosen():
        model, processor = load("demo")
        for row in known():
            name = f"{row['question']} {row['picture']} ({place.name})"
            said = answer(model, processor, row)
            right = said == row["answer"]
            yield Outcome(name, right, said if right else f"{said!r} for {row['answer']!r}")


def answer(model: "VisionLanguageModel", processor: "Processor", row: dict[str, str]) -> str:
    picture = PICTURES / row["picture"]
    return generate(model, processor, row["question"], images=[picture], max_tokens=TOKENS)


def coreml(system: str) -> Outcome:
    """The vision tower as a Core ML package, on a Mac, against MLX's."""
    name = "Core ML's vision back end"
    if system != "Darwin":
        return Outcome(name, None, "Core ML is macOS's")
    if find_spec("coremltools") is None:
        return Outcome(name, None, "coremltools is not installed")
    try:
        features = [_features(setting) for setting in ("coreml", "mlx")]
    except (RuntimeError, UsageError) as error:
        return Outcome(name, False, first_line(error))
    return _judged(name, lambda: features[0], features[1], COREML)


def _features(setting: str) -> np.ndarray:
    model, processor = load("demo", dtype="float32", vision_backend=setting)
    inputs = processor("?", images=[PICTURES / known()[0]["picture"]])
    return np.array(model.encode_image(inputs.pixels[0]), dtype=np.float64)
