"""`mlx-vlm-edge generate`: a question and images in, the answer streamed out."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from ..generation.answer import GenerationResult

HELP = "Answer a question about images; the answer streams to standard output."
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
    "top_p": (float, 1.0, "nucleus sampling: smallest set of tokens with this probability"),
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} --prompt TEXT [--image FILE ...] [--model NAME] [options]"
    _add_prompt(parser.add_argument_group("prompt"))
    _add_model(parser.add_argument_group("model"))
    sampling = parser.add_argument_group("generation")
    sampling.add_argument(
        "--temperature", "--temp", type=float, default=0.0, metavar="N", help="0 is greedy"
    )
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer at this text"
    )
    for name, (kind, default, text) in SAMPLING.items():
        flag = "--" + name.replace("_", "-")
        sampling.add_argument(flag, type=kind, default=default, metavar="N", help=text)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object at the end")
    output.add_argument(
        "--verbose", action="store_true", help="stage timings, rates and peak memory to stderr"
    )


def _add_prompt(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-p", "--prompt", required=True, metavar="TEXT", help="the question; - reads standard input"
    )
    group.add_argument(
        "--image", nargs="+", action="extend", default=[], metavar="FILE",
        help="images or their URLs, in order; - reads standard input",
    )  # fmt: skip
    group.add_argument(
        "--page", type=int, nargs="+", action="extend", default=[], metavar="N",
        help="pages of a PDF given with --image, each as a picture",
    )  # fmt: skip
    group.add_argument(
        "--video", action="append", default=[], metavar="PATH",
        help="an animated GIF, a film or a folder of frames, after the images (SmolVLM2)",
    )  # fmt: skip
    group.add_argument(
        "--fps", type=float, metavar="N",
        help="frames to take per second of video (default: the checkpoint's); of a folder, "
        "how many a second has",
    )  # fmt: skip
    group.add_argument("--system", metavar="TEXT", help="another system prompt")
    group.add_argument(
        "--raw", action="store_true", help="the prompt is used as it stands, <image> for images"
    )
    group.add_argument(
        "--image-strategy", metavar="NAME",
        help="how a picture becomes square: pad, center_crop or stretch, or as the family has it "
        "(default: the checkpoint's)",
    )  # fmt: skip
    group.add_argument(
        "--resolution", type=int, metavar="PX",
        help="side the picture is resized to, or its longest edge before it is cut into tiles; "
        "less is faster (default: the checkpoint's)",
    )  # fmt: skip
    group.add_argument(
        "--max-tiles", type=int, metavar="N",
        help="cut a picture into at most N tiles; fewer are faster (Idefics3, SmolVLM, ...)",
    )  # fmt: skip
    group.add_argument(
        "--jpeg-draft", action="store_true",
        help="decode large JPEGs at a part of their size: faster, not the same pixels",
    )  # fmt: skip


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model", metavar="NAME",
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
    group.add_argument("--vision-backend", default="mlx", metavar="NAME", help=BACKENDS)


def default_model() -> str:
    """$MLX_VLM_EDGE_MODEL, else FastVLM-0.5B when it is on this machine, else the demo model."""
    from ..hub.cache import local_snapshot
    from ..hub.models import ALIASES

    if name := os.environ.get("MLX_VLM_EDGE_MODEL"):
        return name
    if local_snapshot(ALIASES[DEFAULT_MODEL], None):
        return DEFAULT_MODEL
    print(DEMO_NOTE, file=sys.stderr)
    return "demo"


def _read(args: argparse.Namespace) -> tuple[str, list[Any]]:
    """The question and the images, what is - from standard input."""
    if args.prompt == "-" and "-" in args.image:
        raise UsageError("--prompt - and --image - cannot both read standard input")
    if args.image.count("-") > 1:
        raise UsageError("--image - can read standard input only once")
    if sys.stdin is None and "-" in (args.prompt, *args.image):
        raise UsageError("standard input is closed: name a file or a text instead of -")
    if "-" in args.image and sys.stdin.isatty():
        raise UsageError("--image - reads a picture from standard input: pipe or redirect one in")
    text = args.prompt
    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    images = [sys.stdin.buffer.read() if name == "-" else name for name in args.image]
    return text, _pages(images, args.page) if args.page else images


def _pages(images: list[Any], numbers: list[int]) -> list[Any]:
    """The images, each PDF among them as those of its pages that were asked for."""
    from ..picture.pdf import Page, is_pdf

    if not any(map(is_pdf, images)):
        raise UsageError("--page is for PDFs: name one with --image")
    pages = [[Page(item, n) for n in numbers] if is_pdf(item) else [item] for item in images]
    return [item for part in pages for item in part]


def run(args: argparse.Namespace) -> int:
    text, images = _read(args)
    if args.fps is not None and not args.video:
        raise UsageError("--fps is for videos: give one with --video")
    from ..generation.loop import stream_generate
    from ..loading.load import Options, load_ahead
    from ..picture.video import Video

    images += [Video(path, args.fps) for path in args.video]
    loading = Options(
        dtype=args.dtype, revision=args.revision, quantize=args.bits, offline=args.offline,
        image_strategy=args.image_strategy, resolution=args.resolution, max_tiles=args.max_tiles,
        jpeg_draft=args.jpeg_draft, vision_backend=args.vision_backend,
    )  # fmt: skip
    model, processor = load_ahead(args.model or default_model(), loading)
    if args.verbose or args.json:
        model.arrive()  # so that no time of loading is taken for one of answering
    options = {name: getattr(args, name) for name in SAMPLING}
    results = stream_generate(
        model, processor, _prompt(text, args), images, raw=args.raw, verbose=args.verbose,
        temperature=args.temperature, stop=args.stop, **options,
    )  # fmt: skip
    return _print(results, args)


def _prompt(text: str, args: argparse.Namespace) -> Any:
    if args.system is None:
        return text
    if args.raw:
        raise UsageError("--raw takes the prompt as it stands: put the system prompt into it")
    return [{"role": "system", "content": args.system}, {"role": "user", "content": text}]


def _print(results: Iterator["GenerationResult"], args: argparse.Namespace) -> int:
    """Show pieces as they come. Ctrl-C ends with what there is and exit code 130."""
    pieces: list[GenerationResult] = []
    code = 0
    try:
        for result in results:
            pieces.append(result)
            if not args.json:
                print(result.text, end="", flush=True)
    except KeyboardInterrupt:
        code = 130
    if not args.json:
        print(flush=True)
    if pieces and (args.json or args.verbose):
        _report(pieces, args)
    return code


def _report(pieces: list["GenerationResult"], args: argparse.Namespace) -> None:
    from dataclasses import asdict

    last = pieces[-1]
    if args.json:
        whole = asdict(last) | {"text": "".join(piece.text for piece in pieces)}
        whole["token"] = [piece.token for piece in pieces if piece.token is not None]
        print(json.dumps(whole, ensure_ascii=False))
        return
    lines = [
        f"prompt: {last.prompt_tokens} tokens ({last.visual_tokens} visual), "
        f"{last.prompt_tps:.1f} tokens/s",
        f"generation: {last.generation_tokens} tokens, {last.generation_tps:.1f} tokens/s",
        f"ttft_e2e: {last.ttft_e2e * 1000:.1f} ms (image and prompt in, first token out)",
        *(["images: JPEG draft, not pixel-exact"] if last.jpeg_draft else []),
        *(f"  {name}: {seconds * 1000:.1f} ms" for name, seconds in (last.stages or {}).items()),
        f"peak memory: {last.peak_memory:.3f} GB",
    ]
    print("\n".join(lines), file=sys.stderr)
