"""One model on one chip: its stages, its memory and what to say of the figures."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from . import memory, roofline
from .calibration import engine_vision_ms
from .chips import Chip
from .parts import SQUARE, parts_of
from .roofline import Stage
from .visual import Size

LABEL = "estimate, not measured"
TIGHT = 0.75  # of a machine's memory; above it the system itself is short of it, about


@dataclass(frozen=True)
class Outlook:
    """stages: up to the first token. step: one decoded token. memory: bytes by part, and "total".

    engine_ms: the vision tower on the Neural Engine, None where nothing is known of it there.
    """

    model: str
    chip: Chip
    bits: int
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
            "bits": self.bits,
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
    model: str,
    config: Mapping[str, Any],
    chip: Chip,
    *,
    bits: int | None = None,
    resolution: int | None = None,
    image: Size = SQUARE,
    text_tokens: int,
    context: int | None = None,
) -> Outlook:
    """What to expect of a model on a chip, all on the GPU.

    bits: 4, 8 or 16; by default the config's own. context: positions of the cache that memory is
    asked of; by default the prompt and 256 more. Raises UsageError for what cannot be.
    """
    found = parts_of(config, resolution, image)
    bits = own_bits(config) if bits is None else bits
    packed = memory.packed(bits)
    positions = found.view.tokens + found.view.marks + text_tokens
    held = positions + 256 if context is None else context
    return Outlook(
        model=model,
        chip=chip,
        bits=bits,
        visual_tokens=found.view.tokens,
        text_tokens=found.view.marks + text_tokens,
        tiles=found.view.tiles,
        stages=tuple(roofline.first_token(found, text_tokens, chip, packed)),
        step=roofline.decode(found.decoder, positions, chip, packed),
        memory=memory.memory_bytes(config, bits, held, resolution=resolution, image=image),
        context=held,
        engine_ms=engine_vision_ms(found, chip),
    )


def own_bits(config: Mapping[str, Any]) -> int:
    """The bits that a config's quantization block says, rounded up to what is known here."""
    block = config.get("quantization")
    said = block.get("bits", 16) if isinstance(block, Mapping) else 16
    return next((bits for bits in memory.BITS if isinstance(said, int) and said <= bits), 16)
