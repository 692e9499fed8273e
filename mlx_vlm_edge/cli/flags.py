"""Flags that several verbs share, and what becomes of them."""

import argparse
import os
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..paths import expand
from .habits import ResizeShape

if TYPE_CHECKING:
    from ..generation.prefix import PrefixCache
    from ..loading.load import LoadOptions
    from ..models.base import VisionLanguageModel
    from ..text.prompt import Processor

DEFAULT_MODEL = "fastvlm-0.5b"
DEMO_NOTE = (
    "note: using the bundled demo model, which knows drawn shapes and printed text, "
    f"not photographs; `mlx-vlm-edge models pull {DEFAULT_MODEL}` gets a real one"
)
BACKENDS = (
    "mlx, or coreml: a package that is exported once, float16, for the Neural Engine and CPU; "
    "coreml:fp32, coreml:cpu-gpu and both together choose otherwise"
)

# Flags that are passed on to `stream_generate` as they are.
SAMPLING = {
    "max_tokens": (int, 256, "tokens to generate at most"),
    "top_p": (
        float,
        1.0,
        "nucleus sampling: fewest tokens with this probability; 0 or 1: all",
    ),
    "top_k": (int, 0, "sample from the k likeliest tokens; 0 for all"),
    "min_p": (float, 0.0, "leave out tokens below this share of the likeliest one"),
    "repetition_penalty": (float, 1.0, "above 1: make repeated tokens less likely"),
    "repetition_context_size": (int, 20, "tokens the repetition penalty looks back"),
    "seed": (int, None, "make sampling repeatable"),
    "max_kv_size": (int, None, "positions of a rotating KV cache"),
    "kv_bits": (int, None, "quantise the KV cache to 2, 3, 4, 5, 6 or 8 bits"),
    "kv_group_size": (int, 64, "group size of a quantised KV cache"),
    "quantized_kv_start": (int, 5000, "quantise the KV cache from this many positions on"),
    "prefill_step_size": (int, 2048, "prefill longer prompts in chunks of this size"),
}
# How KV caches are kept and filled.
CACHE = ("max_kv_size", "kv_bits", "kv_group_size", "quantized_kv_start", "prefill_step_size")


def add_model_arguments(group: argparse._ArgumentGroup, named_adapters: bool = False) -> None:
    group.add_argument(
        "-m", "--model", metavar="NAME",
        help=f"alias, Hub id or folder (default: $MLX_VLM_EDGE_MODEL, else {DEFAULT_MODEL} "
        "if it is here, else the bundled demo)",
    )  # fmt: skip
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")
    group.add_argument("--offline", action="store_true", help="never touch the network")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="of weights and activations (default: the checkpoint's on a GPU, float32 on a CPU)",
    )  # fmt: skip
    group.add_argument(
        "--bits", type=int, choices=(4, 8), help="quantise the language model while loading"
    )
    asked_by_name = "; with a NAME for requests that ask for the model MODEL:NAME alone"
    group.add_argument(
        "--adapter", action="append",
        metavar="[NAME=]DIR[:SCALE]" if named_adapters else "DIR[:SCALE]",
        help="answer with a fine-tune: a folder of PEFT's, mlx-lm's, mlx-vlm's or LLaVA's, and how "
        f"much of its update counts (default: 1){asked_by_name if named_adapters else ''}; may be "
        "given several times",
    )  # fmt: skip
    group.add_argument(
        "--max-memory", metavar="SIZE",
        help="take no more than this, as 6GB: what will not fit is refused before it is read "
        "(default: what the machine has)",
    )  # fmt: skip
    group.add_argument("--vision-backend", default="mlx", metavar="NAME", help=BACKENDS)


def _pixels_or_auto(text: str) -> int | str:
    if text.strip().lower() == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid value {text!r}: pixels or auto") from None


def milliseconds(text: str) -> float:
    """A time as it was written: "200ms" or "200" -> 200.0, "0.2s" -> 200.0.

    Raises UsageError for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|)", text.strip().lower())
    value = float(match[1]) * (1000 if match[2] == "s" else 1) if match else 0
    if not value:
        raise UsageError(f"--ttft-budget {text!r}: give a time, as 200ms or 0.5s")
    return value


def sides(flag: str, text: str, order: str) -> tuple[int, int]:
    """Two sides in pixels as they were written, "1920x1080" -> (1920, 1080); of a square its one.

    order: what comes first, for the message. Raises UsageError for anything else.
    """
    match = re.fullmatch(r"([1-9]\d{0,4})(?:[xX×]([1-9]\d{0,4}))?", text.strip())
    if not match:
        raise UsageError(f"{flag} {text!r}: give pixels, as 1024 or {order}, such as 1920x1080")
    return int(match[1]), int(match[2] or match[1])


def default_model() -> str:
    """$MLX_VLM_EDGE_MODEL, else FastVLM-0.5B when it is on this machine, else the demo model.

    Nothing that was not named is fetched: where an update was stopped, the folder of the older one.
    """
    from ..hub.cache import local_snapshot, usable_snapshot
    from ..hub.models import ALIASES, obtain

    if name := os.environ.get("MLX_VLM_EDGE_MODEL"):
        return name
    repo = ALIASES[DEFAULT_MODEL]
    if local_snapshot(repo):
        return DEFAULT_MODEL
    if usable_snapshot(repo):
        return str(obtain(DEFAULT_MODEL, offline=True))
    print(DEMO_NOTE, file=sys.stderr)
    return "demo"


def add_cache_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--cache-dir", metavar="DIR",
        help="remember pictures and prompts in this folder (up to 4 GiB), so that later runs skip "
        "them; it holds what was asked",
    )  # fmt: skip


def add_model_group(parser: argparse.ArgumentParser, named_adapters: bool = False) -> None:
    """What every verb that answers takes of a model: which one, how, and where it remembers."""
    group = parser.add_argument_group("model")
    add_model_arguments(group, named_adapters)
    add_cache_argument(group)


def prefix_cache(args: argparse.Namespace) -> "PrefixCache":
    """What remembers prompts, on the disk as well where `add_cache_argument`'s flag says so."""
    from ..generation.prefix import PrefixCache

    return PrefixCache(disk=args.cache_dir)


def add_picture_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--image-strategy", metavar="NAME",
        help="how a picture becomes square: pad, center_crop or stretch, or as the family has it "
        "(default: the checkpoint's)",
    )  # fmt: skip
    group.add_argument(
        "--resolution", type=_pixels_or_auto, metavar="PX|auto",
        help="side the picture is resized to, or its longest edge before it is cut into tiles; "
        "less is faster (default: the checkpoint's); auto: by the picture's size and detail "
        "(FastVLM)",
    )  # fmt: skip
    group.add_argument(
        "--ttft-budget", metavar="TIME",
        help="with --resolution auto: the first token within that, as 200ms or 0.2s (a number "
        "alone is milliseconds), by the last bench of the model here or, on a Mac, by `estimate`",
    )  # fmt: skip
    group.add_argument(
        "--resize-shape", dest="resolution", type=int, nargs="+", action=ResizeShape,
        help=argparse.SUPPRESS,
    )  # fmt: skip
    group.add_argument(
        "--max-tiles", type=int, metavar="N",
        help="cut a picture into at most N tiles; fewer are faster (Idefics3, SmolVLM, ...)",
    )  # fmt: skip
    add_token_arguments(group)
    group.add_argument(
        "--jpeg-draft", action="store_true",
        help="decode large JPEGs at a part of their size: faster, not the same pixels",
    )  # fmt: skip


def add_token_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--visual-tokens", metavar="N|RATIO",
        help="have the language model see that many tokens of each picture, or that share, as 0.25 "
        "(default: all)",
    )  # fmt: skip
    group.add_argument(
        "--token-method",
        metavar="NAME",
        help="which these are: divprune (the default), dpp, pool, random, hiprune or visionzip; "
        'models have some of them each, as `models show NAME` says under "fewer of them by"',
    )


def tokens_asked(args: argparse.Namespace) -> int | float | None:
    """What --visual-tokens says. Raises UsageError for what is no number."""
    if args.visual_tokens is None:
        return None
    from ..picture.token_budget import parse_tokens

    return parse_tokens(args.visual_tokens)


def add_sampling_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--temperature", "--temp", type=float, default=0.0, metavar="N", help="0 is greedy"
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer at this text"
    )
    group.add_argument(
        "--eos-tokens", dest="stop", nargs="+", action="extend", default=[], metavar="TOKEN",
        help="tokens that end the answer as well, as mlx-vlm has it",
    )  # fmt: skip
    group.add_argument(
        "--skip-special-tokens", action=argparse.BooleanOptionalAction, default=True,
        help="leave special tokens out of the answer's text",
    )  # fmt: skip
    group.add_argument(
        "--schema", metavar="FILE", help="answers follow the JSON schema in this file"
    )
    group.add_argument(
        "--choices", metavar="A,B,C", help="the answer is one of these, commas between them"
    )
    add_draft_argument(group)
    add_options(group, SAMPLING)


def add_draft_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--draft", choices=("prompt-lookup",),
        help="answer the same in fewer passes where prompt or answer repeat themselves",
    )  # fmt: skip


def add_options(group: argparse._ArgumentGroup, named: Mapping[str, tuple[Any, Any, str]]) -> None:
    """A flag for each option of a number: its type, default and help."""
    for name, (kind, default, text) in named.items():
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, default=default, metavar="N", help=text)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_sampling_arguments`' flags ask for, as keywords of `stream_generate`.

    Raises UsageError for a value out of range.
    """
    from ..generation.loop import Options

    names = ("temperature", "stop", "skip_special_tokens", "draft", *SAMPLING)
    chosen = {name: getattr(args, name) for name in names}
    if args.schema is not None:
        chosen["schema"] = _read_schema(args.schema)
    if args.choices is not None:
        chosen["choices"] = [choice.strip() for choice in args.choices.split(",")]
    Options(**chosen)  # or a clear line, before a model is looked for
    return chosen


def _read_schema(name: str) -> str:
    try:
        return expand(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UsageError(f"--schema {name}: cannot be read ({reason})") from None


def load_options(args: argparse.Namespace) -> "LoadOptions":
    """What the flags about the model and about pictures ask for.

    Raises UsageError for what no model takes.
    """
    from ..loading.load import LoadOptions

    options = LoadOptions(
        dtype=args.dtype, revision=args.revision, bits=args.bits, offline=args.offline,
        image_strategy=args.image_strategy, resolution=args.resolution, max_tiles=args.max_tiles,
        jpeg_draft=args.jpeg_draft, vision_backend=args.vision_backend,
        visual_tokens=tokens_asked(args), token_method=args.token_method, adapter=args.adapter,
    )  # fmt: skip
    options.check()
    if args.ttft_budget is not None:
        milliseconds(args.ttft_budget)  # or a clear line
        if args.resolution != "auto":
            raise UsageError("--ttft-budget chooses among sizes: give --resolution auto with it")
    return options


def within_budget(args: argparse.Namespace, name: str, options: "LoadOptions") -> "LoadOptions":
    """The same with the largest size that --ttft-budget leaves, where there is one.

    Raises UsageError where none does, and where nothing is known of this machine.
    """
    if args.ttft_budget is None:
        return options
    from dataclasses import replace

    from mlx_vlm_edge_bench.budget import largest_within

    side, told = largest_within(name, options, milliseconds(args.ttft_budget))
    print(f"note: {told}", file=sys.stderr)
    return replace(options, max_resolution=side)


def memory_limit(args: argparse.Namespace) -> int | None:
    """Bytes that --max-memory says. Raises UsageError for what is no size."""
    if args.max_memory is None:
        return None
    from ..loading.memory import parse_size

    return parse_size(args.max_memory)


def fit_into_memory(
    args: argparse.Namespace, name: str, options: "LoadOptions", adapters: int = 0, rows: int = 1
) -> int:
    """How many of `rows` answers may be under way together; fewer than asked for are told of. Also
    limits what MLX takes. Raises UsageError for a model and an answer that do not fit.

    adapters: bytes of those that requests name.
    """
    from ..loading.fitting import check_fits, limit_buffers

    limit, caches = memory_limit(args), {name: getattr(args, name) for name in CACHE}
    fitting, tokens = check_fits(name, options, limit, args.max_tokens, adapters, rows, caches)
    if fitting < rows:
        least = (
            f", of a picture and {tokens:,} tokens each; --max-tokens below that leave more room"
        )
        print(
            f"note: {fitting} of {rows} are answered together: memory has no room for more KV "
            f"caches{least if tokens else ''}",
            file=sys.stderr,
        )
    limit_buffers(limit)
    return fitting


def load_model(args: argparse.Namespace, name: str) -> "tuple[VisionLanguageModel, Processor]":
    """The whole model that the same flags ask for, where it fits into memory."""
    options = within_budget(args, name, load_options(args))
    fit_into_memory(args, name, options)
    return load_whole(name, options)


def load_whole(name: str, options: "LoadOptions") -> "tuple[VisionLanguageModel, Processor]":
    """A model with nothing of it left to be read."""
    from ..loading.load import start_loading

    model, processor = start_loading(name, options)
    model.finish_loading()
    return model, processor
