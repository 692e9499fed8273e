"""The estimates held against what others measured, row by row; no row is left out.

The paper's table (M1 Max, 2024) has vision on the Neural Engine and an MLX whose attention was not
fused, so it has two rates of the engine and one of attention of its own. Llama.cpp has its own time
per layer of a decoded token. What was fitted is marked, and is not in the summary of errors.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.checkpoint.files import read_json
from mlx_vlm_edge.language.llama import LanguageModel, TextConfig
from mlx_vlm_edge.loading import cost
from mlx_vlm_edge.loading.cost import Blueprint
from mlx_vlm_edge.loading.counting import Work, counted
from mlx_vlm_edge.vision.fastvit import FastViTHD
from mlx_vlm_edge.vision.vit import ViT

from . import chips, roofline
from .roofline import NOW, Rates, Stage
from .text import prompt_work

_FILE = Path(__file__).parent / "calibration.json"
# Fitted on one row each: FastVLM's 1024 px, LLaVA-1.5's 336 px; Qwen2-7B's prefill of 1,280.
ENGINE_SHARE = {"fastvithd": 0.3805, "vit": 0.2726}  # of the Neural Engine's FP16 TFLOPS
PAPER = replace(NOW, attention=0.02494)
LLAMA_CPP = replace(NOW, layer_ms=0.168)  # 24 GPUs' F16 against Q4_0; Q8_0 is not in it
_LLM = {
    "Qwen2-0.5B": "fastvlm-0.5b",
    "Qwen2-1.5B": "fastvlm-1.5b",
    "Qwen2-7B": "fastvlm-7b",
    "Vicuna-7B": "mobilevlm-v2-7b",
    "LLaMA-2-7B": "mobilevlm-v2-7b",
    "LLaMA-3-8B": "idefics3-8b",
    "MobileLLaMA": "mobilevlm-1.7b",
}


@dataclass(frozen=True)
class Row:
    """One measured figure and the estimate of it; `error` is relative, 0.1 for 10 % too much."""

    table: str
    name: str
    figure: str
    unit: str
    measured: float
    estimated: float
    fitted: bool = False
    note: str = ""
    times: int = 1  # that the same measured part is in it

    @property
    def error(self) -> float:
        return self.estimated / self.measured - 1


@cache
def _data() -> Mapping[str, Any]:
    return read_json(_FILE)


def source(table: str) -> str:
    """Where a table's figures are from."""
    told: str = _data()[table]["source"]
    return told


def rates(table: str) -> str:
    """Which rates a table's estimates have that those for users (roofline.NOW) have not."""
    shares = ", ".join(f"{share:.1%} for {kind}" for kind, share in ENGINE_SHARE.items())
    said = {
        "paper": f"of the Neural Engine's 11 TFLOPS {shares}; attention at {PAPER.attention:.1%} "
        "of the GPU's peak, as it was before MLX fused it",
        "llama_cpp": f"{LLAMA_CPP.layer_ms} ms per layer of a decoded token",
    }
    return said.get(table, "those of every estimate")


def rows() -> list[Row]:
    """Every row of every table."""
    return [*paper(), *mlx_lm(), *llama_cpp(), *m5_over_m4()]


@dataclass(frozen=True)
class Errors:
    """How far some rows are off: the median of the absolute errors of those that count, how many
    these are, the worst of them, and the worst of all rows but misprints."""

    median: float
    counted: int
    worst: Row
    worst_of_all: Row


def errors(rows: Sequence[Row]) -> Errors:
    """Fitted figures, rows with a note (a misprint) and repetitions of a figure do not count."""
    right = [row for row in rows if not row.note]
    each = {(row.unit, round(row.measured / row.times, 1)): row for row in right}
    fitted = {(r.unit, round(r.measured / r.times, 1)) for r in rows if r.fitted}
    free = [row for key, row in each.items() if key not in fitted]

    def size(row: Row) -> float:
        return abs(row.error)

    return Errors(
        statistics.median(map(size, free)), len(free), max(free, key=size), max(right, key=size)
    )


@cache
def text_model(name: str, bits: int | None = None) -> Any:
    """The decoder of a language model in the tables, in its shapes, as a GPU holds it."""
    if name in _LLM:
        model = cost.blueprint(configs.read(_LLM[name]), fused=True).model.language_model
    else:
        config = {**_data()["text_models"][name], "tie_word_embeddings": True}
        model = LanguageModel(TextConfig.from_dict(config, "qwen2"))
        model.apply(lambda p: p.astype(mx.bfloat16))
        for layer in model.model.layers:
            layer.fuse()
    if bits is not None:
        nn.quantize(model, 64, bits)
    return model


@cache
def _work(name: str, positions: int, bits: int | None) -> tuple[Work, Work]:
    return prompt_work(text_model(name, bits), positions)


def prefill(
    name: str, positions: int, chip: chips.Chip, bits: int | None = None, rates: Rates = NOW
) -> Stage:
    """A prompt of so many positions. bits: None for 16."""
    work, _ = _work(name, positions, bits)
    return roofline.stage("prefill", work, chip, rates, quantised=bits is not None)


def decode(
    name: str, positions: int, chip: chips.Chip, bits: int | None = None, rates: Rates = NOW
) -> Stage:
    """One more token after so many."""
    layers = len(text_model(name, bits).model.layers)
    return roofline.decode(_work(name, positions, bits)[1], layers, chip, rates)


@cache
def encoder(kind: str, side: int) -> tuple[str, Work]:
    """The class and the work of one of the paper's encoders, whole, on a picture of that side."""
    alias = {"fastvithd": "fastvlm-0.5b", "vit-l/14": "llava-1.5-7b", "so400m": "smolvlm-2.2b"}
    plan = cost.blueprint(configs.read(alias[kind]))
    pixels = mx.zeros((1, side, side, 3), plan.dtype)
    if kind == "fastvithd":
        return kind, counted(lambda: plan.model.tower(pixels))
    layers = plan.config.source["vision_config"]["num_hidden_layers"]  # LLaVA leaves some out
    whole = ViT(replace(plan.config.vision, layers=layers))
    return "vit", counted(lambda: whole(pixels))


def engine_ms(kind: str, flops: int, chip: chips.Chip) -> float | None:
    """A vision tower by Core ML on the Neural Engine, by the paper's M1 Max; None where the
    engine's rate is not known or the kind of tower ("patches") was not measured."""
    if chip.neural_engine is None or kind not in ENGINE_SHARE:
        return None
    return flops / (ENGINE_SHARE[kind] * chip.neural_engine) / 1e9


def engine_vision_ms(plan: Blueprint, vision: Work, chip: chips.Chip) -> float | None:
    """The vision tower of a model there, all its tiles."""
    kind = {FastViTHD: "fastvithd", ViT: "vit"}.get(type(plan.model.tower), "patches")
    return engine_ms(kind, vision.flops, chip)


def paper() -> Iterator[Row]:
    chip = chips.find("m1-max")
    for row in _data()["paper"]["rows"]:
        name = f"{row['method']} {row['llm']} {row['res']} px, {row['tokens']} tokens"
        fitted, note = row.get("fitted", ()), row.get("note", "")
        total = prefill(row["llm"], row["tokens"], chip, None, PAPER).ms
        part = Row(
            "paper", name, "prefill", "ms", row["prefill_ms"], total, "prefill" in fitted, note
        )
        if "encoder" in row:
            kind, work = encoder(row["encoder"], row["side"])
            encoded = (engine_ms(kind, work.flops, chip) or 0) * row["tiles"]
            measured = row["vision_ms"]
            yield Row(
                "paper",
                name,
                "vision",
                "ms",
                measured,
                encoded,
                "vision" in fitted,
                "",
                row["tiles"],
            )
            yield part
            ttft = total + encoded
            yield Row("paper", name, "TTFT", "ms", row["ttft_ms"], ttft, bool(fitted), note)
        else:
            yield part


def mlx_lm() -> Iterator[Row]:
    chip, model = chips.find("m4-max"), "Qwen3-4B"
    for bits, group, prompt, generation in _data()["mlx_lm"]["rows"]:
        name, packed = f"Qwen3-4B, {bits} bits, groups of {group}", None if bits == 16 else bits
        prefilled = prefill(model, 2048, chip, packed)
        token = decode(model, 2048 + 64, chip, packed)
        yield Row("mlx_lm", name, "prompt", "tokens/s", prompt, 2048e3 / prefilled.ms)
        fitted = (bits, group) == (4, 64)
        yield Row("mlx_lm", name, "generation", "tokens/s", generation, 1e3 / token.ms, fitted)


def llama_cpp() -> Iterator[Row]:
    model = "LLaMA-2-7B"
    for name, *figures in _data()["llama_cpp"]["rows"]:
        chip = chips.find(name)
        for bits, label, prompt, generation in zip(
            (None, 8, 4), ("F16", "Q8_0", "Q4_0"), figures[::2], figures[1::2], strict=True
        ):
            if prompt is None:
                continue
            prefilled = prefill(model, 512, chip, bits)
            token = decode(model, 64, chip, bits, LLAMA_CPP)
            what = f"{chip.name}, {label}"
            f16 = bits is None  # the medians that rates are made of are over these
            pair = bits != 8 and figures[0] is not None
            yield Row("llama_cpp", what, "prompt", "tokens/s", prompt, 512e3 / prefilled.ms, f16)
            yield Row("llama_cpp", what, "generation", "tokens/s", generation, 1e3 / token.ms, pair)


def m5_over_m4() -> Iterator[Row]:
    """How many times faster an M5 is than an M4."""
    m5, m4 = chips.find("m5"), chips.find("m4")
    for name, bits, first, generation in _data()["m5_over_m4"]["rows"]:
        packed, what = None if bits == 16 else bits, f"{name}, {bits} bits"
        for timed, figure, measured in (
            (prefill, "TTFT", first),
            (decode, "generation", generation),
        ):
            ratio = timed(name, 4096, m4, packed).ms / timed(name, 4096, m5, packed).ms
            yield Row("m5_over_m4", what, figure, "times", measured, ratio)
