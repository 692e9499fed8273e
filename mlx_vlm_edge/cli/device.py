"""`export --device`: a device's memory and a model's estimate -> the settings that fit.

The most precise weights come first, then the longest context, of what leaves an app some room. An
estimate: what Core ML itself takes was never measured here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..wording import gigabytes

PHONES = {  # GB
    "iphone-13": 4, "iphone-13-pro": 6, "iphone-14": 6, "iphone-14-pro": 6, "iphone-15": 6,
    "iphone-15-pro": 8, "iphone-16": 8, "iphone-16-pro": 8, "iphone-16e": 8, "iphone-17": 8,
    "iphone-air": 12, "iphone-17-pro": 12,
}  # fmt: skip
# Of a Mac's memory, what Metal recommends at the most; and what is left of that, or of what an
# iPhone lets an app have, for all that an app has beside the model.
MAC, MODEL = 0.67, 0.8
BITS = (16, 8, 4)
CONTEXTS = (2048, 1024, 512)
# Bytes of a number, and of a group's scale and offset: of the embeddings beside the decoder.
HALF, GROUP, SCALES = 2, 64, 3


@dataclass(frozen=True)
class Choice:
    """bits: of the decoder, 16 for none. nbytes: the estimate. room: what the model may take."""

    bits: int
    context: int
    nbytes: int
    room: int

    @property
    def fits(self) -> bool:
        return self.nbytes <= self.room


def room(device: str) -> int:
    """Bytes that a model may take there. Raises UsageError for a device that is not known.

    A Mac is named by its chip, and counts with the least memory that it was sold with.
    """
    name = device.strip().lower().replace(" ", "-")
    if name in PHONES:
        from mlx_vlm_edge_convert.coreml.phones import USUAL

        return int(PHONES[name] * 1e9 * USUAL * MODEL)
    from mlx_vlm_edge_bench.estimate import chips

    try:
        chip = chips.find(name)
    except UsageError as error:
        phones = ", ".join(PHONES)
        raise UsageError(f"--device: {error}; phones are {phones}") from None
    return int(min(chip.memory) * 1e9 * MAC * MODEL)


def choices(
    config: Mapping[str, Any],
    device: str,
    bits: int | None,
    contexts: Sequence[int] = CONTEXTS,
    embedding_bits: int | None = None,
) -> Iterator[Choice]:
    """Every setting in the order of preference. bits: the only ones, where they are asked for.

    Raises UsageError where the model's own context is shorter than all of them.
    """
    from mlx_vlm_edge_bench.estimate.costs import memory_bytes

    from ..loading.cost import blueprint

    limit, text = room(device), blueprint(config).config.text
    table = _embeddings(text.vocab_size * text.hidden_size, embedding_bits)
    quantised = (config.get("quantization") or {}).get("bits")
    only: int | None = bits or quantised
    wanted = BITS if only is None else (only,)
    longest = text.max_position_embeddings
    if min(contexts) > longest:
        raise UsageError(f"--context {min(contexts)}: this model's is at most {longest}")
    for each in wanted:
        for context in (context for context in contexts if context <= longest):
            counted = memory_bytes(config, each, context, dtype="float16")["total"]
            yield Choice(each, context, counted + table, limit)


def _embeddings(count: int, bits: int | None) -> int:
    """Bytes of so many numbers, dense or in groups."""
    return count * HALF if bits is None else count * bits // 8 + count // GROUP * SCALES


def choose(
    name: str, device: str, bits: int | None, context: int | None, embedding_bits: int | None = None
) -> Choice:
    """The first that fits. Raises UsageError, with what the smallest takes, where none does."""
    from ..loading.cost import config_of

    tried: list[Choice] = []
    contexts = CONTEXTS if context is None else (context,)
    for choice in choices(config_of(name), device, bits, contexts, embedding_bits):
        tried.append(choice)
        if choice.fits:
            return choice
    least = min(tried, key=lambda choice: choice.nbytes)
    raise UsageError(
        f"--device {device}: {name} takes about {gigabytes(least.nbytes)} with {least.bits} bits "
        f"and a context of {least.context:,}, more than the {gigabytes(least.room)} there: take a "
        "smaller model"
    )
