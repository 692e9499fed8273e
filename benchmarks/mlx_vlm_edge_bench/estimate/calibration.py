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

from mlx_vlm_edge.checkpoint import configs
from mlx_vlm_edge.checkpoint.files import read_json

from . import chips, decoder, roofline, vision
from .decoder import Decoder
from .parts import Parts, parts_of
from .roofline import NOW
from .work import Work

_FILE = Path(__file__).parent / "calibration.json"
# Fitted on one row each: FastVLM's 1024 px, LLaVA-1.5's 336 px; Qwen2-7B's prefill of 1,280.
ENGINE_SHARE = {"fastvithd": 0.3805, "vit": 0.2726}  # of the Neural Engine's FP16 TFLOPS
PAPER = replace(NOW, attention=0.0262)
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
    found: str = _data()[table]["source"]
    return found


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


def errors(found: Sequence[Row]) -> tuple[float, Row]:
    """Median of the absolute errors, and the row with the largest one.

    Fitted figures, rows with a note (a misprint) and repetitions of a figure do not count.
    """
    each = {(row.unit, round(row.measured / row.times, 1)): row for row in found if not row.note}
    fitted = {(r.unit, round(r.measured / r.times, 1)) for r in found if r.fitted}
    free = [row for key, row in each.items() if key not in fitted]
    worst = max(free, key=lambda row: abs(row.error))
    return statistics.median(abs(row.error) for row in free), worst


def text_model(name: str) -> Decoder:
    """The decoder of a language model in the tables."""
    if name in _LLM:
        return parts_of(configs.read(_LLM[name])).decoder
    return decoder.llama(_data()["text_models"][name], "qwen2", tied=True)


def encoder(kind: str, side: int) -> tuple[str, Work]:
    """The class and the work of one of the paper's encoders, whole, on a picture of that side."""
    if kind == "fastvithd":
        tower = configs.read("fastvlm-0.5b")["vision_config"]
        return kind, sum(vision.fastvithd(tower, side, side).values(), Work())
    alias = {"vit-l/14": "llava-1.5-7b", "so400m": "smolvlm-2.2b"}[kind]
    tower = configs.read(alias)["vision_config"]
    return "vit", vision.vit(tower, tower["num_hidden_layers"])


def engine_ms(kind: str, flops: int, chip: chips.Chip) -> float | None:
    """A vision tower by Core ML on the Neural Engine, by the paper's M1 Max; None where the
    engine's rate is not known or the kind of tower ("patches") was not measured."""
    if chip.neural_engine is None or kind not in ENGINE_SHARE:
        return None
    return flops / (ENGINE_SHARE[kind] * chip.neural_engine) / 1e9


def engine_vision_ms(found: Parts, chip: chips.Chip) -> float | None:
    """The vision tower of a model there, all its tiles."""
    return engine_ms(found.tower, found.vision.flops, chip)


def paper() -> Iterator[Row]:
    chip = chips.find("m1-max")
    for row in _data()["paper"]["rows"]:
        name = f"{row['method']} {row['llm']} {row['res']} px, {row['tokens']} tokens"
        fitted, note = row.get("fitted", ()), row.get("note", "")
        total = roofline.prefill(text_model(row["llm"]), row["tokens"], chip, None, PAPER).ms
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
    chip, model = chips.find("m4-max"), text_model("Qwen3-4B")
    for bits, group, prompt, generation in _data()["mlx_lm"]["rows"]:
        name, packed = f"Qwen3-4B, {bits} bits, groups of {group}", None if bits == 16 else bits
        filled = roofline.prefill(model, 2048, chip, packed)
        made = roofline.decode(model, 2048 + 64, chip, packed)
        yield Row("mlx_lm", name, "prompt", "tokens/s", prompt, 2048e3 / filled.ms)
        fitted = (bits, group) == (4, 64)
        yield Row("mlx_lm", name, "generation", "tokens/s", generation, 1e3 / made.ms, fitted)


def llama_cpp() -> Iterator[Row]:
    model = text_model("LLaMA-2-7B")
    for name, *figures in _data()["llama_cpp"]["rows"]:
        chip = chips.find(name)
        for bits, label, prompt, generation in zip(
            (None, 8, 4), ("F16", "Q8_0", "Q4_0"), figures[::2], figures[1::2], strict=True
        ):
            if prompt is None:
                continue
            filled = roofline.prefill(model, 512, chip, bits)
            made = roofline.decode(model, 64, chip, bits, LLAMA_CPP)
            what = f"{chip.name}, {label}"
            f16 = bits is None  # the medians that rates are made of are over these
            pair = bits != 8 and figures[0] is not None
            yield Row("llama_cpp", what, "prompt", "tokens/s", prompt, 512e3 / filled.ms, f16)
            yield Row("llama_cpp", what, "generation", "tokens/s", generation, 1e3 / made.ms, pair)


def m5_over_m4() -> Iterator[Row]:
    """How many times faster an M5 is than an M4."""
    m5, m4 = chips.find("m5"), chips.find("m4")
    for name, bits, first, generation in _data()["m5_over_m4"]["rows"]:
        model, packed = text_model(name), None if bits == 16 else bits
        filled, made = (
            roofline.prefill(model, 4096, m4, packed).ms
            / roofline.prefill(model, 4096, m5, packed).ms,
            roofline.decode(model, 4096, m4, packed).ms
            / roofline.decode(model, 4096, m5, packed).ms,
        )
        what = f"{name}, {bits} bits"
        yield Row("m5_over_m4", what, "TTFT", "times", first, filled)
        yield Row("m5_over_m4", what, "generation", "times", generation, made)
