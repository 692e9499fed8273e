"""A model's parts and a chip -> times: each stage bound by arithmetic or by memory.

The rates are few and are not fitted to any model of ours; `calibration` holds them against what
others measured. Where they are from:
- bandwidth: llama.cpp's Llama-2-7B table (D4167), the median of what F16 against Q4_0 decoding
  tells of 24 GPUs. layer_ms: mlx-lm's Qwen3-4B at 4 bits on an M4 Max (MLXLM), one row.
- at_512: the same table's F16 prompts of 512 positions, the median of 23 GPUs without matrix units;
  MATRIX_AT_512: its one GPU with them (M5 Pro), against their derived ceiling.
- rows: one row of FastVLM's paper, Vicuna-7B's prefill of 16 positions.
- QUANTISED: the same table's Q8_0 and Q4_0 prompts against F16.
"""

from dataclasses import dataclass

from .chips import Chip
from .decoder import Decoder
from .parts import Parts
from .work import Work

QUANTISED = {True: 0.89, False: 0.96}  # of the plain matmul's rate; M1 and M2 families, later ones
MATRIX_AT_512 = 0.643
WEIGHT = 2  # bytes of a weight or an activation that is not quantised


@dataclass(frozen=True)
class Rates:
    """What of a chip's ceilings is reached.

    at_512: share of the peak in matmuls of 512 rows. rows: a matmul of n rows takes the time of
    n + rows at the share that many rows reach. attention: share of the peak in attention, None for
    that of matmuls. bandwidth: share of it. layer_ms: what a decoded token takes per layer beside
    the reading of weights and cache.
    """

    at_512: float = 0.736
    rows: float = 85.0
    attention: float | None = None
    bandwidth: float = 0.91
    layer_ms: float = 0.0625


NOW = Rates()


@dataclass(frozen=True)
class Stage:
    """One stage's operations, bytes (weights and activations) and milliseconds, and what bounds
    it: "compute" or "bandwidth"."""

    name: str
    flops: int
    nbytes: int
    ms: float
    bound: str


def stage(name: str, work: Work, nbytes: int, chip: Chip, rates: Rates, factor: float = 1) -> Stage:
    """The time of a stage on the GPU. factor: of the matmuls' rate, for quantised weights."""
    peak, share = chip.fp32, rates.at_512
    if chip.matrix:
        peak, share = chip.matrix, MATRIX_AT_512
    full = share * (512 + rates.rows) / 512
    matmul = 2 * (work.macs + rates.rows * work.matrices) / (full * factor * peak)
    attention = 2 * work.attention / ((rates.attention or full) * peak)
    compute = (matmul + attention) / 1e9
    memory = nbytes / (rates.bandwidth * chip.bandwidth) / 1e6
    bound = "compute" if compute >= memory else "bandwidth"
    return Stage(name, work.flops, nbytes, max(compute, memory), bound)


def prefill(
    decoder: Decoder, positions: int, chip: Chip, bits: int | None = None, rates: Rates = NOW
) -> Stage:
    """A prompt of so many positions, up to the logits of the last one. bits: None for 16."""
    work = decoder.prefill(positions)
    weights = decoder.read_bytes(work, bits, WEIGHT)
    factor = QUANTISED[chip.older] if bits else 1
    return stage("prefill", work, weights + work.values * WEIGHT, chip, rates, factor)


def decode(
    decoder: Decoder, positions: int, chip: Chip, bits: int | None = None, rates: Rates = NOW
) -> Stage:
    """One more token after so many positions: weights and cache are read once."""
    work = decoder.step(positions)
    nbytes = decoder.read_bytes(work, bits, WEIGHT) + decoder.cache_bytes(positions)
    memory = nbytes / (rates.bandwidth * chip.bandwidth) / 1e6
    return Stage(
        "decode", work.flops, nbytes, memory + decoder.layers * rates.layer_ms, "bandwidth"
    )


def first_token(
    found: Parts, text_tokens: int, chip: Chip, bits: int | None = None, rates: Rates = NOW
) -> list[Stage]:
    """The stages up to the first token, all on the GPU: vision, connector, prefill."""
    stages = [
        stage(name, work, WEIGHT * (work.parameters + work.values), chip, rates)
        for name, work in (("vision", found.vision), ("connector", found.connector))
        if work.flops
    ]
    positions = found.view.tokens + found.view.marks + text_tokens
    return [*stages, prefill(found.decoder, positions, chip, bits, rates)]
