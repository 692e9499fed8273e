"""Options -> cases (model x bits x resolution) -> a record of each, measured one after another."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.hub.models import ALIASES, DEMO, expanded, repo_id
from mlx_vlm_edge.loading import memory
from mlx_vlm_edge.loading.cost import config_of
from mlx_vlm_edge.models import family
from mlx_vlm_edge.picture.image import open_image
from mlx_vlm_edge.picture.preprocessing import Preprocessing
from mlx_vlm_edge.timings import Clock

from ..random.question import text_of
from . import cold, energy, machine
from .figures import UNACCOUNTED, Runs, figures, unaccounted
from .loaded import Choice, LoadedModel
from .measure import Question, measure, plain_run
from .picture import NAME as DRAWN

Progress = Callable[[str], None]
COLD_RUNS = 3  # at most; each loads the model


@dataclass(frozen=True)
class BenchOptions:
    """What `bench` was asked for. None in resolutions or bits: the checkpoint's own."""

    models: tuple[str, ...]
    resolutions: tuple[int | None, ...]
    bits: tuple[int | None, ...]
    random: bool
    dtype: str | None
    prompt_tokens: int | None
    max_tokens: int
    runs: int
    image: bytes
    image_name: str
    cold: bool
    energy: bool
    vision_backend: str = "mlx"

    @property
    def choices(self) -> list[Choice]:
        """One for every model that has to be loaded."""
        return [
            Choice(model, self.random, self.dtype, bits, self.vision_backend)
            for model in self.models
            for bits in self.bits
        ]

    @property
    def usual(self) -> bool:
        """Whether its times are those of a short question about a picture, answered by MLX."""
        own = self.image_name == DRAWN and self.prompt_tokens is None
        return own and self.vision_backend == "mlx"

    @property
    def count(self) -> int:
        return len(self.choices) * len(self.resolutions)


def check(options: BenchOptions) -> None:
    """Raises UsageError for what can be known to be wrong before anything is loaded or timed."""
    open_image(options.image)
    for name, number in (("runs", options.runs), ("max-tokens", options.max_tokens)):
        if number < 1:
            raise UsageError(f"--{name} must be 1 or more, not {number}")
    for model in options.models:
        source = _config(model, options.random)
        if source is None:
            continue
        config = family(source).Config.from_dict(source)
        for resolution in options.resolutions:
            try:
                config.adapted(Preprocessing(resolution=resolution))
            except UsageError as error:
                raise UsageError(f"{model}: {error}") from None


def _config(model: str, random: bool) -> dict[str, Any] | None:
    """A model's native config where one is at hand without converting anything.

    Raises UsageError for a name that cannot be a model.
    """
    if random or model == DEMO or model.lower() in ALIASES:
        return config_of(model)
    if not expanded(model).is_dir():
        repo_id(model)
    return None


def run(
    options: BenchOptions, progress: Progress, clock: Clock = time.perf_counter
) -> Iterator[dict[str, Any]]:
    """Measure all cases, yielding the record of each when it is done."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture"
        picture.write_bytes(options.image)
        for choice in options.choices if options.random else ():
            _refuse_too_large(choice, options)
        for choice in options.choices:
            progress(f"{choice.model}: {'making random weights' if choice.random else 'loading'}")
            loaded = LoadedModel(choice)
            for resolution in options.resolutions:
                yield _case(loaded, choice, resolution, options, picture, progress, clock)
            del loaded


def _refuse_too_large(choice: Choice, options: BenchOptions) -> None:
    """Raises UsageError when random weights would not fit into what is free."""
    from mlx_vlm_edge.loading.cost import cost

    from ..random.weights import blueprint, processor_of

    plan = blueprint(choice.model, dtype=choice.dtype, bits=choice.bits)
    free = memory.usable()
    for resolution in options.resolutions:
        asked = Preprocessing(resolution=resolution)
        processor = processor_of(replace(plan, asked=asked), words_only=True)
        text = text_of(processor, options.image, options.prompt_tokens)
        prompt = cost(plan, processor(text, [options.image]))
        parts = memory.by_use(prompt, prompt.prompt_tokens + options.max_tokens)
        memory.refuse_too_large(choice.model, parts, free)


def _case(
    loaded: LoadedModel,
    choice: Choice,
    resolution: int | None,
    options: BenchOptions,
    picture: Path,
    progress: Progress,
    clock: Clock,
) -> dict[str, Any]:
    model, processor = loaded.at(resolution)
    text = text_of(processor, options.image, options.prompt_tokens)
    question = Question(options.image, text, options.max_tokens)
    label = _label(choice, resolution)
    load_before = machine.load_average()
    runs = measure(
        model, processor, question, options.runs,
        clock=clock, progress=lambda doing: progress(f"{label}: {doing}"),
    )  # fmt: skip
    power: dict[str, Any] = {"energy": None}
    if options.energy and not energy.unavailable():
        progress(f"{label}: energy")
        power = _energy(lambda: plain_run(model, processor, question, clock), options.runs)
    if options.cold:
        command = cold.command(cold.spec(choice, resolution, text, picture))
        fresh, times = [], min(options.runs, COLD_RUNS) + 1
        for number in range(1, times + 1):
            progress(f"{label}: fresh process {number} of {times}")
            fresh.append(cold.cold_run(command, clock))
        runs = replace(runs, cold=fresh)
    return {
        **_described(choice, resolution, loaded.dtype),
        "image": options.image_name,
        "prompt": text,
        "load_average": [load_before, machine.load_average()],
        **power,
        **results(runs),
    }


def _energy(answer: Callable[[], object], answers: int) -> dict[str, Any]:
    """What a record says of it: the figures, or why there are none, which costs no case."""
    try:
        return {"energy": energy.measure(answer, answers).record(answers)}
    except energy.NotMeasuredError as error:
        return {"energy": None, "energy_note": str(error)}


def _described(choice: Choice, resolution: int | None, dtype: str) -> dict[str, Any]:
    return {
        "model": choice.model,
        "weights": choice.weights,
        "resolution": resolution,
        "bits": choice.bits,
        "dtype": dtype,
        "vision_backend": choice.vision_backend,
    }


def _label(choice: Choice, resolution: int | None) -> str:
    bits = f", {choice.bits} bits" if choice.bits else ""
    return f"{choice.model}{f', {resolution} px' if resolution else ''}{bits}"


def results(runs: Runs) -> dict[str, Any]:
    """What the runs of a case come to: counts, figures, and whether the stages add up."""
    left_out = unaccounted(runs.staged)
    first = runs.plain[0]
    return {
        "prompt_tokens": first.prompt_tokens,
        "visual_tokens": first.visual_tokens,
        "generated": first.generated,
        "runs": max(1, len(runs.plain) - 1),
        "cold_runs": max(0, len(runs.cold) - 1),
        "unaccounted": left_out,
        "stages_add_up": left_out <= UNACCOUNTED,
        "figures": {name: figure.record() for name, figure in figures(runs).items()},
    }
