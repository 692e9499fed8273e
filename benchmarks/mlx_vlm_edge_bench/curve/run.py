"""A model and numbers of visual tokens -> a point for each, by each way to have as few of them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_vlm_edge.errors import UsageError
from mlx_vlm_edge.generation.loop import generate
from mlx_vlm_edge.picture.preprocessing import Preprocessing
from mlx_vlm_edge.picture.token_budget import TokenBudget
from mlx_vlm_edge.timings import Clock

from ..bench.figures import figures
from ..bench.loaded import Choice, LoadedModel
from ..bench.measure import Question, measure
from . import questions
from .forced import POSITIONS, Forced, agreement, forced

BASELINES = ("random", "pool")
RESOLUTIONS = (64, 256, 512, 768, 1024, 1536)  # that are tried where none are named
MAX_TOKENS = 2  # of a timed answer: the first one counts
WHOLE, RESOLUTION = "all tokens", "resolution"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class CurveOptions:
    """What is asked for. methods: beside random choice and pooling, which are always there.
    resolutions: empty for those of RESOLUTIONS that the family takes."""

    budgets: tuple[int | float, ...]
    methods: tuple[str, ...]
    resolutions: tuple[int, ...]
    runs: int
    image: bytes
    text: str
    scenes: int = questions.SCENES


@dataclass(frozen=True)
class Way:
    """One way to a number of visual tokens."""

    name: str
    budget: TokenBudget | None = None
    resolution: int | None = None

    @property
    def label(self) -> str:
        return self.name if self.resolution is None else f"{self.resolution} px"


def ways(options: CurveOptions) -> list[Way]:
    """All tokens, then every number by every method; baselines last. Raises UsageError."""
    methods = dict.fromkeys((*options.methods, *BASELINES))
    return [
        Way(WHOLE),
        *(Way(name, TokenBudget(count, name)) for name in methods for count in options.budgets),
    ]


def smaller(loaded: LoadedModel, options: CurveOptions, whole: int) -> Iterator[Way]:
    """Lower resolutions at which the picture has fewer tokens, each number once."""
    seen = {whole}
    for side in options.resolutions or RESOLUTIONS:
        try:
            loaded.model.config.adapted(Preprocessing(resolution=side))
        except UsageError:
            if side in options.resolutions:
                raise
            continue
        count = len(loaded.at(side)[1](options.text, [options.image]).visual)
        if count < whole and count not in seen:
            seen.add(count)
            yield Way(RESOLUTION, resolution=side)


def run(
    choice: Choice,
    options: CurveOptions,
    progress: Progress,
    clock: Clock = time.perf_counter,
) -> Iterator[dict[str, Any]]:
    """Measure every way, yielding its point when it is done; all tokens first.

    Raises UsageError for a method or a number that is not for this model and picture, before any
    of them is timed.
    """
    planned = ways(options)
    progress(f"{choice.model}: {'making random weights' if choice.random else 'loading'}")
    loaded = LoadedModel(choice)
    for way in planned:
        loaded.at(way.resolution, way.budget)[1](options.text, [options.image])
    whole: Forced | None = None
    for way in [*planned, *smaller(loaded, options, _count(loaded, options))]:
        progress(f"{choice.model}, {_named(way)}")
        point, led = _point(loaded, way, options, whole, clock)
        whole = whole or led
        if choice.model == "demo" and questions.available():
            progress(f"{choice.model}, {_named(way)}: questions")
            point["accuracy"] = _accuracy(loaded, way, options.scenes)
        yield point


def _count(loaded: LoadedModel, options: CurveOptions) -> int:
    return len(loaded.at(None)[1](options.text, [options.image]).visual)


def _named(way: Way) -> str:
    return f"{way.label}, {way.budget.tokens} visual tokens" if way.budget else way.label


def _point(
    loaded: LoadedModel, way: Way, options: CurveOptions, whole: Forced | None, clock: Clock
) -> tuple[dict[str, Any], Forced]:
    model, processor = loaded.at(way.resolution, way.budget)
    question = Question(options.image, options.text, MAX_TOKENS)
    runs = measure(model, processor, question, options.runs, clock=clock)
    inputs = processor(options.text, [options.image])
    led = forced(model, inputs, None if whole is None else whole.ids)
    agreed = agreement(whole or led, led)
    measured = figures(runs)
    wanted = ("ttft", "ttft_e2e", "stage: reduce", "stage: prefill", "peak_memory")
    return {
        "way": way.name,
        "label": way.label,
        "visual_tokens": len(inputs.visual),
        "prompt_tokens": int(inputs.input_ids.shape[1]),
        "positions": POSITIONS,
        "top1": agreed.top1,
        "kl": agreed.kl,
        "figures": {name: measured[name].record() for name in wanted if name in measured},
    }, led


def _accuracy(loaded: LoadedModel, way: Way, scenes: int) -> dict[str, float]:
    model, processor = loaded.at(way.resolution, way.budget)

    def answer(image: Any, question: str) -> str:
        return generate(model, processor, question, [image], max_tokens=questions.TOKENS)

    return questions.accuracy(answer, scenes)


def series(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ways of a record, in order, all tokens left out."""
    return [name for name in dict.fromkeys(p["way"] for p in points) if name != WHOLE]
