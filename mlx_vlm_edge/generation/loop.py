"""A prompt with images -> text, one token at a time: prefill, then decode with a KV cache.

The next token is computed while the last one is shown. Timings end where text comes out.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from ..errors import UsageError
from ..language.cache import Cache, KVCache, RotatingKVCache
from ..models.base import VisionLanguageModel
from ..text.prompt import Inputs, Message, Processor
from ..text.tokenizer import Detokenizer
from ..timings import Clock, Stages
from .sampling import Sampling, StopStrings, check_number, make_logits_processors, make_sampler

if TYPE_CHECKING:
    from .prefix import PrefixCache

KV_BITS = (None, 2, 3, 4, 5, 6, 8)
KV_GROUP_SIZES = (32, 64, 128)
KEPT_POSITIONS = 4  # of a text-only prompt in a rotating cache, as mlx-lm


@dataclass(frozen=True)
class Options(Sampling):
    """How to generate; names and defaults as in mlx-lm."""

    max_tokens: int = 256
    stop: Sequence[str] = ()
    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 0
    prefill_step_size: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("max_tokens", 1), ("prefill_step_size", 1), ("quantized_kv_start", 0)):
            check_number(name, getattr(self, name), least, whole=True)
        if self.max_kv_size is not None:
            check_number("max_kv_size", self.max_kv_size, 1, whole=True)
        if self.kv_bits not in KV_BITS:
            raise UsageError(f"kv_bits must be 2, 3, 4, 5, 6 or 8, not {self.kv_bits!r}")
        if self.kv_group_size not in KV_GROUP_SIZES:
            raise UsageError(f"kv_group_size must be 32, 64 or 128, not {self.kv_group_size!r}")
        if not isinstance(self.stop, str | Sequence):
            raise UsageError(f"stop must be a text or a list of texts, not {self.stop!r}")
        if self.kv_bits and self.max_kv_size:
            raise UsageError("a rotating cache cannot be quantised: set max_kv_size or kv_bits")


@dataclass(frozen=True)
class GenerationResult:
    """One streamed piece, or (from `generate(full=True)`) the whole answer.

    ttft_e2e: seconds from the call, image bytes and prompt in, to the first token. Rates are
    tokens per second; prompt_tokens includes the visual tokens, and reused_tokens are those that a
    prefix cache knew. jpeg_draft: pixels may be other than those of the whole picture.
    peak_memory is in GB (1e9 bytes).
    finish_reason is None until the end, then "stop" or "length". stages: seconds per stage, when
    they were asked for.
    """

    text: str
    token: int | None
    prompt_tokens: int
    visual_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    ttft_e2e: float
    peak_memory: float
    finish_reason: str | None = None
    stages: dict[str, float] | None = None
    reused_tokens: int = 0
    jpeg_draft: bool = False


def generate(
    model: VisionLanguageModel,
    processor: Processor,
    prompt: str | list[Message],
    images: Sequence[Any] | None = None,
    *,
    full: bool = False,
    **options: Any,
) -> Any:
    """The whole answer as text, or with `full` a GenerationResult. Options: `stream_generate`."""
    pieces = list(stream_generate(model, processor, prompt, images, **options))
    text = "".join(piece.text for piece in pieces)
    return replace(pieces[-1], text=text) if full else text


def stream_generate(
    model: VisionLanguageModel,
    processor: Processor,
    prompt: str | list[Message],
    images: Sequence[Any] | None = None,
    *,
    image: Any = None,
    raw: bool = False,
    verbose: bool = False,
    clock: Clock = time.perf_counter,
    prefix_cache: "PrefixCache | None" = None,
    **options: Any,
) -> Iterator[GenerationResult]:
    """Yield one result per token; text is empty until a character is whole.

    prompt: a question, or chat messages; with `raw` the text as it stands, one <image> per picture.
    images: paths, URLs, bytes, PIL images or arrays; `image` is the same for one or a list.
    verbose: measure the stages. clock: what all times are taken from, in seconds. prefix_cache:
    takes over what earlier prompts have in common with this one, images and conversation, and
    remembers it in turn. options: the fields of Options.
    Raises UsageError for a bad image or option, and for a prompt longer than the context.
    """
    known = {field.name for field in fields(Options)}
    if unknown := options.keys() - known:
        raise TypeError(f"unknown option {min(unknown)!r}; known are {', '.join(sorted(known))}")
    chosen = Options(**options)
    started, stages = clock(), Stages(verbose, clock)
    inputs = processor(prompt, _as_list(images) + _as_list(image), raw=raw, stages=stages)
    return _stream(model, processor, inputs, chosen, stages, started, prefix_cache)


def _as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def _stream(
    model: VisionLanguageModel,
    processor: Processor,
    inputs: Inputs,
    options: Options,
    stages: Stages,
    started: float,
    prefix_cache: "PrefixCache | None",
) -> Iterator[GenerationResult]:
    budget = _budget(model, inputs, options)
    cache = make_cache(model, inputs, options)
    mx.reset_peak_memory()
    inputs = _encoded(model, inputs, stages)
    if prefix_cache is None:
        meter = _Meter(inputs, stages, started)
        tokens = decode(model, inputs, cache, options, stages, budget)
        yield from _results(processor, tokens, meter, options)
        return
    run = prefix_cache.begin(model, processor, inputs, cache, stages)
    meter = _Meter(inputs, stages, started, run.start)
    tokens = decode(model, inputs, cache, options, stages, budget, run.rest)
    said: list[int] = []
    try:
        for result in _results(processor, tokens, meter, options):
            if result.token is not None:
                said.append(result.token)
            yield result
    finally:  # of a stream that is abandoned as well
        if said:
            run.end(said)


def _encoded(model: VisionLanguageModel, inputs: Inputs, stages: Stages) -> Inputs:
    """While the language model's weights are still being read, the images are encoded."""
    if model.arriving is None:
        return inputs
    tokens = [model.encode_image(pixels, stages) for pixels in inputs.pixels]
    mx.async_eval(tokens)
    model.arrive()
    return replace(inputs, tokens=tokens)


def _results(
    processor: Processor, tokens: Iterator[int], meter: "_Meter", options: Options
) -> Iterator[GenerationResult]:
    """Token ids as pieces of text, up to the end of the answer."""
    detokenizer, stops = Detokenizer(processor.tokenizer), StopStrings(options.stop)
    for token in tokens:
        meter.count()
        if token in processor.eos_ids:
            text, reason = stops.feed(detokenizer.finish()) + stops.flush(), "stop"
            yield meter.result(text, token, reason)
            return
        text = stops.feed(detokenizer.add(token))
        if stops.stopped:
            yield meter.result(text, token, "stop")
            return
        yield meter.result(text, token)
    yield meter.result(stops.feed(detokenizer.finish()) + stops.flush(), None, "length")


class _Meter:
    """Counts tokens and time, and makes the results."""

    def __init__(self, inputs: Inputs, stages: Stages, started: float, reused: int = 0) -> None:
        self._prompt, self._visual = inputs.input_ids.shape[1], len(inputs.visual)
        self._reused, self._draft = reused, inputs.jpeg_draft
        self._stages, self._started = stages, started
        self._first = self._tokens = 0.0

    def count(self) -> None:
        self._tokens += 1
        if self._tokens == 1:
            self._stages.mark("first sample")
            self._first = self._stages.clock()

    def result(self, text: str, token: int | None, reason: str | None = None) -> GenerationResult:
        decoding = self._stages.clock() - self._first
        ttft = self._first - self._started
        return GenerationResult(
            text=text,
            token=token,
            prompt_tokens=self._prompt,
            visual_tokens=self._visual,
            prompt_tps=self._prompt / ttft,
            generation_tokens=int(self._tokens),
            generation_tps=(self._tokens - 1) / decoding if self._tokens > 1 else 0.0,
            ttft_e2e=ttft,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=reason,
            stages=dict(self._stages.seconds) if self._stages.measured else None,
            reused_tokens=self._reused,
            jpeg_draft=self._draft,
        )


def _budget(model: VisionLanguageModel, inputs: Inputs, options: Options) -> int:
    """How many tokens may be generated. Raises UsageError when the prompt fills the context."""
    length, context = inputs.input_ids.shape[1], model.config.context
    if length >= context:
        raise UsageError(
            f"the prompt takes {length:,} positions ({len(inputs.visual):,} of them visual), "
            f"{length - context + 1:,} more than the context of {context:,} leaves room for: "
            "shorten the text or give fewer or smaller images"
        )
    return min(options.max_tokens, context - length)


def make_cache(model: VisionLanguageModel, inputs: Inputs, options: Options) -> list[Cache]:
    """The caches the options ask for. A rotating one keeps all up to the last visual token."""
    caches = model.make_cache()
    if options.max_kv_size is None:
        return caches
    keep = int(inputs.visual[-1]) + 1 if len(inputs.visual) else KEPT_POSITIONS
    return [RotatingKVCache(options.max_kv_size, keep) for _ in caches]


def _quantize(cache: list[Cache], options: Options) -> None:
    """Turn plain caches into quantised ones, in place, once they are long enough."""
    for index, layer in enumerate(cache):
        if isinstance(layer, KVCache) and layer.offset > options.quantized_kv_start:
            cache[index] = layer.to_quantized(options.kv_group_size, options.kv_bits or 8)


def decode(
    model: VisionLanguageModel,
    inputs: Inputs,
    cache: list[Cache],
    options: Options,
    stages: Stages,
    budget: int,
    rest: Inputs | None = None,
) -> Iterator[int]:
    """Yield up to `budget` token ids; each next one is under way while the last is handed out.

    rest: what of the prompt is not in `cache` yet; all of it by default.
    """
    sample = _sampler(inputs, options)
    token = sample(model.prefill(rest or inputs, cache, options.prefill_step_size, stages))
    mx.async_eval(token)
    for index in range(budget):
        following = token
        if index + 1 < budget:
            if options.kv_bits:
                _quantize(cache, options)
            following = sample(model.step(token, cache))
            mx.async_eval(following)
        yield cast(int, token.item())
        token = following


def _sampler(inputs: Inputs, options: Options) -> Callable[[mx.array], mx.array]:
    """Logits [1, V] -> token int[1], with the penalties that look at the tokens so far."""
    sampling = Sampling(**{f.name: getattr(options, f.name) for f in fields(Sampling)})
    draw, processors = make_sampler(sampling), make_logits_processors(sampling)
    if not processors:
        return draw
    history: list[mx.array] = [mx.array(inputs.input_ids[0])]

    def sample(logits: mx.array) -> mx.array:
        tokens = mx.concatenate(history)
        for process in processors:
            logits = process(tokens, logits)
        token = draw(logits)
        history.append(token)
        return token

    return sample
