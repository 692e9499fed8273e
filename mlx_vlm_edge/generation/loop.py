"""A prompt with images -> text, one token at a time: prefill, then decode with a KV cache.

The next token is computed while the last one is shown. Timings end where text comes out.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast, overload

import mlx.core as mx

from .. import forked
from ..errors import UsageError, check_keywords
from ..language.cache import (
    KV_GROUP_SIZE,
    QUANTIZED_KV_START,
    Cache,
    QuantizingCaches,
    RotatingKVCache,
)
from ..language.decoder import PREFILL_STEP
from ..models.base import VisionLanguageModel
from ..picture.token_budget import TokenBudget, token_budget
from ..text.prompt import Inputs, Message, Processor
from ..timings import Clock, Steps, Timer
from .ahead import Ahead
from .answer import Answer, whole
from .answer import GenerationResult as GenerationResult
from .choosing import TokenSampler
from .drafting import DRAFTS, decode_drafted, prompt_lookup
from .keywords import AnswerKeywords, OptionKeywords
from .opening import Opening
from .sampling import Sampling, StopStrings, check_number

if TYPE_CHECKING:
    from .grammar import Grammar
    from .opening import Begun, Remembers
    from .prefix import PrefixCache

KV_BITS = (None, 2, 3, 4, 5, 6, 8)
KV_GROUP_SIZES = (32, 64, 128)
MAX_LOGPROBS = 20
KEPT_POSITIONS = 4  # of a text-only prompt in a rotating cache, as mlx-lm


@dataclass(frozen=True)
class Options(Sampling):
    """How to generate; names and defaults as in mlx-lm.

    stop: texts that end an answer, special tokens among them. skip_special_tokens: whether those
    of an answer have no text; docling's models answer in them. schema: a JSON schema, or its text,
    that the answer must follow; choices: texts of which it must be one. logprobs: tell every
    token's log-probability, and those of this many of the likeliest ones. visual_tokens and
    token_method: as `load` has them, for one prompt; None leaves what the processor was made with.
    draft: "prompt-lookup" answers the same in fewer passes where it repeats what was said before.
    """

    max_tokens: int = 256
    stop: Sequence[str] = ()
    skip_special_tokens: bool = True
    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = KV_GROUP_SIZE
    quantized_kv_start: int = QUANTIZED_KV_START
    prefill_step_size: int = PREFILL_STEP
    schema: Mapping[str, Any] | str | None = None
    choices: Sequence[str] | None = None
    logprobs: int | None = None
    visual_tokens: int | float | None = None
    token_method: str | None = None
    draft: str | None = None

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
        StopStrings(self.stop)  # or a clear line
        if self.kv_bits and self.max_kv_size:
            raise UsageError("a rotating cache cannot be quantised: set max_kv_size or kv_bits")
        if self.draft not in DRAFTS:
            raise UsageError(f"draft must be 'prompt-lookup' or left out, not {self.draft!r}")
        if self.draft and self.max_kv_size:
            raise UsageError("a rotating cache cannot go back: set max_kv_size or draft")
        if self.logprobs is not None:
            check_number("logprobs", self.logprobs, 0, MAX_LOGPROBS, whole=True)
        if self.schema is not None and self.choices is not None:
            raise UsageError("an answer follows a schema or is one of the choices: set one of them")
        _ = self.grammar, self.budget  # or a clear line, before anything is loaded

    @property
    def budget(self) -> TokenBudget | None:
        return token_budget(self.visual_tokens, self.token_method)

    @cached_property
    def grammar(self) -> "Grammar | None":
        """What the answer must look like, None for anything."""
        if self.choices is None and self.schema is None:
            return None
        from .grammar import Grammar

        if self.choices is not None:
            return Grammar.choices(self.choices)
        return Grammar.json_schema(self.schema or {})


@overload
def generate(
    model: VisionLanguageModel,
    processor: Processor,
    prompt: str | list[Message],
    images: Sequence[Any] | None = None,
    *,
    full: Literal[False] = False,
    **options: Unpack[AnswerKeywords],
) -> str: ...


@overload
def generate(
    model: VisionLanguageModel,
    processor: Processor,
    prompt: str | list[Message],
    images: Sequence[Any] | None = None,
    *,
    full: Literal[True],
    **options: Unpack[AnswerKeywords],
) -> GenerationResult: ...


def generate(
    model: VisionLanguageModel,
    processor: Processor,
    prompt: str | list[Message],
    images: Sequence[Any] | None = None,
    *,
    full: bool = False,
    **options: Unpack[AnswerKeywords],
) -> str | GenerationResult:
    """The whole answer as text, or with `full` a GenerationResult. Options: `stream_generate`."""
    pieces = list(stream_generate(model, processor, prompt, images, **options))
    return whole(pieces) if full else "".join(piece.text for piece in pieces)


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
    prefix_cache: "PrefixCache | Literal[False] | None" = None,
    **options: Unpack[OptionKeywords],
) -> Iterator[GenerationResult]:
    """Yield one result per token; text is empty until a character is whole.

    prompt: a question, or chat messages; with `raw` the text as it stands, one <image> per picture.
    images: paths, URLs, bytes, PIL images or arrays; `image` is the same for one or a list.
    verbose: measure the stages. clock: what all times are taken from, in seconds. prefix_cache:
    takes over what earlier prompts have in common with this one, images and conversation, and
    remembers it in turn. None does the same for the text before the first picture alone, for
    each model (generation/opening.py); False for nothing. options: the fields of Options.
    Raises UsageError for a bad image or option, and for a prompt longer than the context.
    """
    check_keywords("generate", options, Options)
    chosen = Options(**options)
    started, timer = clock(), Timer(verbose, clock)
    pictures = as_list(images) + as_list(image)
    remembers: Remembers | None = prefix_cache or None
    more: dict[str, Any] = {}
    if prefix_cache is None and pictures:
        remembers = opening = Opening(model, chosen.prefill_step_size)
        if ahead := opening.ahead(verbose, chosen.max_kv_size):
            more["opening"] = ahead
    if len(pictures) > 1 and not prefix_cache and not verbose:
        encoder = Ahead(model, processor)
        more["seen"] = encoder.begin
    inputs = timer.run(processor.steps(prompt, pictures, raw=raw, budget=chosen.budget, **more))
    if "seen" in more:
        inputs = encoder.complete(inputs)
    return stream_inputs(model, processor, inputs, chosen, timer, started, remembers)


def as_list(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def stream_inputs(
    model: VisionLanguageModel,
    processor: Processor,
    inputs: Inputs,
    options: Options,
    timer: Timer,
    started: float,
    remembers: "Remembers | None",
) -> Iterator[GenerationResult]:
    forked.check()
    limit = budget(model, inputs, options)
    cache = make_cache(model, inputs, options)
    sample = token_sampler(model, processor, inputs, options)
    if inputs.tokens is None:
        mx.reset_peak_memory()
    run = None if remembers is None else remembers.begin(model, processor, inputs, cache)
    said: list[int] = []
    try:
        if timer.progress is not None:
            start, length = 0 if run is None else run.start, inputs.input_ids.shape[1]
            timer.progress.expect(inputs.pixels, start, length, options.prefill_step_size)
        logits = timer.run(prompt_logits(model, run or inputs, cache, options.prefill_step_size))
        reused = 0 if run is None else run.reused
        answer = answer_to(processor, inputs, options, timer, started, reused)
        if options.draft is None:
            tokens = decode(model, logits, cache, limit, sample)
        else:
            answer.drafts = prompt_lookup(model, inputs, processor.eos_ids)
            tokens = decode_drafted(model, logits, cache, limit, sample, answer.drafts)
        for result in _results(tokens, answer, sample):
            if result.token is not None:
                said.append(result.token)
            yield result
            if run is not None and len(said) == 1:
                run.keep_images()
    finally:  # of a stream that is abandoned as well, and of a prompt that fails on its way
        if run is not None:
            run.end(said)


def prompt_logits(
    model: VisionLanguageModel, prompt: "Inputs | Begun", cache: list[Cache], step_size: int
) -> Steps[mx.array]:
    """A prompt, or what of it is not known, into `cache`: logits [1, V] of its last position.

    Its images are computed while the language model may still be being read.
    """
    if not isinstance(prompt, Inputs):
        inputs = yield from prompt.encode()
    elif prompt.tokens is None:
        inputs = replace(prompt, tokens=(yield from model.encode(prompt.pixels)))
    else:
        inputs = prompt
    if model.unread is not None:
        mx.async_eval(inputs.tokens)
        model.finish_loading()
    return (yield from model.prefilling(inputs, cache, step_size))


def _results(
    tokens: Iterator[int], answer: Answer, sample: TokenSampler
) -> Iterator[GenerationResult]:
    """Token ids as pieces of text, up to the end of the answer."""
    for token in tokens:
        piece = answer.add(token, sample.told())
        yield piece
        if piece.finish_reason is not None:
            return
    yield answer.cut()


def budget(model: VisionLanguageModel, inputs: Inputs, options: Options) -> int:
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
    if options.kv_bits:
        _check_groups(model.language_model.config.head_dim, options.kv_group_size)
        kind = options.kv_bits, options.kv_group_size, options.quantized_kv_start
        return QuantizingCaches(caches, *kind)
    if options.max_kv_size is None:
        return caches
    keep = int(inputs.visual[-1]) + 1 if len(inputs.visual) else KEPT_POSITIONS
    return [RotatingKVCache(options.max_kv_size, keep) for _ in caches]


def _check_groups(head_dim: int, group_size: int) -> None:
    """Raises UsageError unless groups of a quantised cache divide a head."""
    if head_dim % group_size:
        fitting = [size for size in KV_GROUP_SIZES if head_dim % size == 0]
        remedy = (
            f"set --kv-group-size to {fitting[-1]}" if fitting
            else "no --kv-group-size fits: leave --kv-bits out"
        )  # fmt: skip
        raise UsageError(
            f"this model's heads of {head_dim} values cannot be cached in groups of {group_size}: "
            f"{remedy}"
        )


def decode(
    model: VisionLanguageModel,
    logits: mx.array,
    cache: list[Cache],
    budget: int,
    sample: TokenSampler,
) -> Iterator[int]:
    """Yield up to `budget` token ids; each next one is under way while the last is handed out.

    logits: of the last position of the prompt, which is in `cache`.
    """
    token = sample(logits)
    mx.async_eval(token)
    for index in range(budget):
        following = token
        if index + 1 < budget:
            if isinstance(cache, QuantizingCaches):
                cache.quantize()
            following = sample(model.step(token, cache))
            mx.async_eval(following)
        yield cast(int, token.item())
        token = following


def answer_to(
    processor: Processor,
    inputs: Inputs,
    options: Options,
    timer: Timer,
    started: float,
    reused: int,
) -> Answer:
    """The answer to one prompt, which has no token yet."""
    unspaced = _begins_spaced(processor, inputs, options)
    detokenizer = processor.tokenizer.detokenizer(options.skip_special_tokens, unspaced)
    return Answer(processor, inputs, options.stop, timer, started, reused, detokenizer)


def _begins_spaced(processor: Processor, inputs: Inputs, options: Options) -> bool:
    """Whether a space may come before what an answer must look like."""
    if options.grammar is None:
        return False
    from .grammar import begins_spaced

    return begins_spaced(options.grammar, processor.tokenizer, inputs)


def token_sampler(
    model: VisionLanguageModel, processor: Processor, inputs: Inputs, options: Options
) -> TokenSampler:
    """What chooses the tokens of one answer. Raises UsageError for a schema that cannot be met."""
    sampling = Sampling(**{f.name: getattr(options, f.name) for f in fields(Sampling)})
    rows, matcher = processor.rows, None
    if options.grammar is not None:
        from .grammar import Matcher

        ends, spaced = sorted(processor.eos_ids), _begins_spaced(processor, inputs, options)
        matcher = Matcher(options.grammar, processor.tokenizer, ends, rows, spaced)
    prompt = mx.array(inputs.input_ids[0])
    return TokenSampler(sampling, prompt, options.logprobs, matcher, rows)
