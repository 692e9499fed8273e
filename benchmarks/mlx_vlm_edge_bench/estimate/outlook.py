"""One model on one chip: its stages, its memory and what to say of the figures."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.loading.cost import Blueprint, Cost
from mlx_vlm_edge.loading.memory import ANSWER

from . import roofline
from .calibration import engine_vision_ms
from .chips import Chip
from .roofline import Stage

LABEL = "estimate, not measured"
FULL = 16  # bits of a weight that is not quantised


@dataclass(frozen=True)
class Outlook:
    """stages: up to the first token. step: one decoded token. memory: bytes by part, and "total".

    bits: of the language model's weights, several where its layers differ.
    engine_ms: the vision tower on the Neural Engine, None where nothing is known of it there.
    """

    model: str
    chip: Chip
    bits: tuple[int, ...]
    visual_tokens: int
    text_tokens: int
    tiles: int
    stages: tuple[Stage, ...]
    step: Stage
    memory: Mapping[str, int]
    context: int
    engine_ms: float | None

    @property
    def ttft(self) -> float:
        """Milliseconds of the stages together."""
        return sum(stage.ms for stage in self.stages)

    @property
    def rate(self) -> float:
        """Decoded tokens per second."""
        return 1e3 / self.step.ms

    @property
    def ttft_engine(self) -> float | None:
        """`ttft` with the vision tower on the Neural Engine."""
        if self.engine_ms is None:
            return None
        return self.engine_ms + sum(s.ms for s in self.stages if s.name != "vision")

    def as_json(self) -> dict[str, Any]:
        """Everything, as a program would read it; times in ms, memory in bytes."""
        chip = {key: value for key, value in asdict(self.chip).items() if key != "unconfirmed"}
        return {
            "kind": LABEL,
            "model": self.model,
            "chip": chip,
            "unconfirmed": list(self.chip.unconfirmed),
            "bits": self.bits[0] if len(self.bits) == 1 else list(self.bits),
            "visual_tokens": self.visual_tokens,
            "text_tokens": self.text_tokens,
            "tiles": self.tiles,
            "stages": [asdict(stage) for stage in self.stages],
            "ttft_ms": self.ttft,
            "ttft_ms_vision_on_neural_engine": self.ttft_engine,
            "decode": asdict(self.step),
            "tokens_per_s": self.rate,
            "memory": dict(self.memory),
            "context": self.context,
        }


def outlook(
    model: str, plan: Blueprint, cost: Cost, chip: Chip, context: int | None = None
) -> Outlook:
    """What to expect of a prompt on a chip, all on the GPU.

    context: positions of the cache that memory is asked of; by default the prompt and ANSWER more.
    Raises UsageError for fewer than the prompt has.
    """
    positions = cost.prompt_tokens + ANSWER if context is None else context
    if positions < cost.prompt_tokens:
        raise UsageError(
            f"--context {positions}: the prompt alone has {cost.prompt_tokens:,} positions; give "
            "as many or more"
        )
    return Outlook(
        model=model,
        chip=chip,
        bits=plan.bits or (FULL,),
        visual_tokens=cost.visual_tokens,
        text_tokens=cost.prompt_tokens - cost.visual_tokens,
        tiles=cost.tiles,
        stages=tuple(roofline.first_token(cost, chip, quantised=bool(plan.bits))),
        step=roofline.decode(cost.step, cost.layers, chip),
        memory=cost.memory(positions),
        context=positions,
        engine_ms=engine_vision_ms(plan, cost.vision, chip),
    )
