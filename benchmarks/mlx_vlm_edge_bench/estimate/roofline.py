"""A model's cost and a chip -> times: each stage bound by arithmetic or by memory.

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

from mlx_vlm_edge.loading.cost import Cost
from mlx_vlm_edge.loading.counting import Work

from .chips import Chip

QUANTISED = {True: 0.89, False: 0.96}  # of the plain matmul's rate; M1 and M2 families, later ones
MATRIX_AT_512 = 0.627


@dataclass(frozen=True)
class Rates:
    """What of a chip's ceilings is reached.

    at_512: share of the peak in matmuls of 512 rows. rows: a matmul of n rows takes the time of
    n + rows at the share that many rows reach. attention: share of the peak in attention, None for
    that of matmuls. bandwidth: share of it. layer_ms: what a decoded token takes per layer beside
    the reading of weights and cache.
    """

    at_512: float = 0.717
    rows: float = 84.3
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


def stage(
    name: str, work: Work, chip: Chip, rates: Rates = NOW, *, quantised: bool = False
) -> Stage:
    """The time of a stage on the GPU."""
    peak, share = chip.fp32, rates.at_512
    if chip.matrix:
        peak, share = chip.matrix, MATRIX_AT_512
    full = share * (512 + rates.rows) / 512
    factor = QUANTISED[chip.older] if quantised else 1
    matmul = 2 * (work.macs + rates.rows * work.matrices) / (full * factor * peak)
    attention = 2 * work.attention / ((rates.attention or full) * peak)
    compute = (matmul + attention) / 1e9
    memory = work.nbytes / (rates.bandwidth * chip.bandwidth) / 1e6
    bound = "compute" if compute >= memory else "bandwidth"
    return Stage(name, work.flops, work.nbytes, max(compute, memory), bound)


def decode(work: Work, layers: int, chip: Chip, rates: Rates = NOW) -> Stage:
    """One more token: weights and cache are read once."""
    memory = work.nbytes / (rates.bandwidth * chip.bandwidth) / 1e6
    return Stage("decode", work.flops, work.nbytes, memory + layers * rates.layer_ms, "bandwidth")


def first_token(cost: Cost, chip: Chip, *, quantised: bool, rates: Rates = NOW) -> list[Stage]:
    """The stages up to the first token, all on the GPU: vision, connector, the choice of fewer
    visual tokens where there is one, prefill."""
    works = (("vision", cost.vision), ("connector", cost.connector), ("reduce", cost.reduction))
    stages = [stage(name, work, chip, rates) for name, work in works if work.flops]
    return [*stages, stage("prefill", cost.prefill, chip, rates, quantised=quantised)]
