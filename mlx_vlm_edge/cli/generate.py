"""`mlx-vlm-edge generate`: a question and images in, the answer streamed out."""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from . import streams
from .cold import ColdTimer
from .flags import (
    add_model_group,
    add_picture_arguments,
    add_sampling_arguments,
    default_model,
    fit_into_memory,
    load_options,
    prefix_cache,
    sampling_options,
    within_budget,
)
from .progress import Shown, shown

if TYPE_CHECKING:
    from ..generation.answer import GenerationResult
    from ..generation.opening import Remembers
    from ..loading.load import LoadOptions

HELP = "Answer a question about images; the answer streams to standard output."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} PROMPT [--image FILE ...] [--model NAME] [options]"
    _add_prompt(parser.add_argument_group("prompt"))
    add_picture_arguments(parser.add_argument_group("pictures"))
    add_model_group(parser)
    add_sampling_arguments(parser.add_argument_group("generation"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object at the end")
    output.add_argument(
        "--verbose", action="store_true", help="stage timings, rates and peak memory to stderr"
    )


def _add_prompt(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "question", nargs="?", metavar="PROMPT", help="the question; - reads standard input"
    )
    group.add_argument(
        "-p", "--prompt", metavar="TEXT", help="the same, for behind --image FILE ..."
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
    group.add_argument("--system", "--system-prompt", metavar="TEXT", help="another system prompt")
    group.add_argument(
        "--raw", action="store_true", help="the prompt is used as it stands, <image> for images"
    )


def _from_arguments(args: argparse.Namespace) -> tuple[str, list[Any]]:
    """The question and the images, what is - from standard input."""
    _one_prompt(args)
    if args.prompt == "-" and "-" in args.image:
        raise UsageError("--prompt - and --image - cannot both read standard input")
    if args.image.count("-") > 1:
        raise UsageError("--image - can read standard input only once")
    if streams.input_closed() and "-" in (args.prompt, *args.image):
        raise UsageError("standard input is closed: name a file or a text instead of -")
    if "-" in args.image and sys.stdin.isatty():
        raise UsageError("--image - reads a picture from standard input: pipe or redirect one in")
    text = _piped(args.raw) if args.prompt == "-" else args.prompt
    images = [streams.piped() if name == "-" else name for name in args.image]
    return text, _pages(images, args.page) if args.page else images


def _piped(raw: bool) -> str:
    """The question from standard input; unless it is raw, without the end of its last line."""
    text = streams.piped_text()
    if raw:
        return text
    return text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")


def _one_prompt(args: argparse.Namespace) -> None:
    """The question as `prompt`, whichever way it was typed."""
    if args.question is not None and args.prompt is not None:
        raise UsageError("the question is there twice: as an argument and as --prompt")
    if args.question is None and args.prompt is None:
        last = args.image[-1] if args.image else ""
        taken = f"; {last!r} was taken for a picture" if " " in last or "?" in last else ""
        raise UsageError(f"no question: put it before the flags, or behind --prompt{taken}")
    args.prompt = args.question if args.prompt is None else args.prompt


def _pages(images: list[Any], numbers: list[int]) -> list[Any]:
    """The images, each PDF among them as those of its pages that were asked for."""
    from ..picture.pdf import Page, is_pdf

    if not any(map(is_pdf, images)):
        raise UsageError("--page is for PDFs: name one with --image")
    pages = [[Page(item, n) for n in numbers] if is_pdf(item) else [item] for item in images]
    return [item for part in pages for item in part]


def run(args: argparse.Namespace) -> int:
    text, images = _from_arguments(args)
    prompt, options, loading = _prompt(text, args), sampling_options(args), load_options(args)
    images = _checked(images, args)
    from ..generation.loop import Options, stream_inputs
    from ..generation.opening import Opening
    from ..loading.load import start_loading

    name = args.model or default_model()
    loading = within_budget(args, name, loading)
    _check_pictures(name, loading, images)
    fit_into_memory(args, name, loading)
    timer = ColdTimer(args.verbose)
    timer.part("imports")
    model, processor = start_loading(name, loading, timer.part)
    if args.verbose or args.json:
        model.finish_loading()  # so that no time of loading is taken for one of answering
    timer.part("weights")
    remembers: Remembers | None = prefix_cache(args) if args.cache_dir else None
    ahead = None
    if images and remembers is None:
        opening = Opening(model, options["prefill_step_size"])
        if ahead := opening.ahead(args.verbose, options.get("max_kv_size")):
            remembers = opening  # of a single prompt nothing is taken up but what was begun
    with shown() as line:
        timer.progress, started = line.progress, timer.restart()
        inputs = timer.run(processor.steps(prompt, images, raw=args.raw, opening=ahead))
        results = stream_inputs(
            model, processor, inputs, Options(**options), timer, started, remembers
        )
        return _print(results, args, line, timer)


def _checked(images: list[Any], args: argparse.Namespace) -> list[Any]:
    """The images, then the videos, with all told that can be told before a model is read."""
    if args.fps is not None and not args.video:
        raise UsageError("--fps is for videos: give one with --video")
    from ..picture.check import checked
    from ..picture.video import Video

    videos = [Video(path, args.fps) for path in args.video]
    return [checked(source, args.offline) for source in (*images, *videos)]


def _check_pictures(name: str, loading: "LoadOptions", images: list[Any]) -> None:
    """Raises UsageError for a picture that has not as many visual tokens as were asked for."""
    if loading.visual_tokens is None:
        return
    from ..loading.fitting import check_pictures
    from ..picture.image import check_header
    from ..picture.video import Video

    sizes = (check_header(image) for image in images if not isinstance(image, Video))
    check_pictures(name, loading, [size for size in sizes if size is not None])


def _prompt(text: str, args: argparse.Namespace) -> Any:
    from ..text.messages import check_question

    check_question(text)
    if args.system is None:
        return text
    if args.raw:
        raise UsageError("--raw takes the prompt as it stands: put the system prompt into it")
    return [{"role": "system", "content": args.system}, {"role": "user", "content": text}]


def _print(
    results: Iterator["GenerationResult"], args: argparse.Namespace, line: Shown, timer: ColdTimer
) -> int:
    """Show pieces as they come. Ctrl-C ends with what there is and exit code 130."""
    pieces: list[GenerationResult] = []
    code = 0
    try:
        for result in results:
            line.end()
            pieces.append(result)
            if not args.json:
                print(result.text, end="", flush=True)
    except KeyboardInterrupt:
        code = 130
    line.end()
    if not args.json:
        print(flush=True)
    if pieces and (args.json or args.verbose):
        _report(pieces, args, timer)
    return code


def _sizes(last: "GenerationResult") -> list[str]:
    shown = [f"{width} x {height}" for width, height in last.picture_sizes]
    return [f"images as the model sees them: {', '.join(shown)}"] if shown else []


def _report(pieces: list["GenerationResult"], args: argparse.Namespace, timer: ColdTimer) -> None:
    from dataclasses import asdict

    from ..generation.answer import whole

    if args.json:
        told = asdict(whole(pieces)) | {"ttft_cold": timer.ttft, "cold": timer.parts}
        del told["token"]  # a piece's
        print(json.dumps(told, ensure_ascii=False))
        return
    last = pieces[-1]
    lines = [
        f"prompt: {last.prompt_tokens} tokens ({last.visual_tokens} visual), "
        f"{last.prompt_tps:.1f} tokens/s",
        f"generation: {last.generation_tokens} tokens, {last.generation_tps:.1f} tokens/s",
        f"ttft_e2e: {last.ttft_e2e * 1000:.1f} ms (image and prompt in, first token out)",
        *([_drafts(last)] if args.draft else []),
        *_sizes(last),
        *(["images: JPEG draft, not pixel-exact"] if last.jpeg_draft else []),
        *(f"  {name}: {seconds * 1000:.1f} ms" for name, seconds in (last.stages or {}).items()),
        f"peak memory: {last.peak_memory:.3f} GB",
    ]
    print("\n".join(lines), file=sys.stderr)


def _drafts(last: "GenerationResult") -> str:
    return f"drafts: {last.accepted_tokens} of {last.drafted_tokens} tokens were right"
