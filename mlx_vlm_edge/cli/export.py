"""`mlx-vlm-edge export`: a model -> a bundle of Core ML packages that an app can embed."""

import argparse
import sys
from typing import Any

from ..errors import UsageError
from .flags import sides

HELP = (
    "Export a model to Core ML: packages and what an app needs beside them, each package run and "
    "compared with the MLX model (needs the extra coreml)."
)
CONTEXT = 2048
_TABLES: dict[str | None, Any] = {None: None, "4": 4, "8": 8}  # --embedding-bits
_HEADS: dict[str | None, Any] = {None: None, "6": 6}  # --head-bits
PARTS = ("vision", "connector", "decoder", "all")
_PICTURES = ("is for pictures", ("vision", "connector"))
_DECODER = ("is the decoder's", ("decoder",))
# Flag -> its default, what it does, and the parts that it does it for.
_OF_PARTS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "bits": (None, "compresses the decoder", ("decoder",)),
    "embedding_bits": (None, *_DECODER),
    "head_bits": (None, *_DECODER),
    "context": (None, *_DECODER),
    "device": (None, "chooses for the decoder", ("decoder",)),
    "image_size": (None, *_PICTURES),
    "resolution": (None, *_PICTURES),
    "image_strategy": (None, *_PICTURES),
    "image": (None, *_PICTURES),
    "input": ("image", "is the vision part's", ("vision",)),
    "format": ("mlpackage", "is the vision part's", ("vision",)),
    "separate_connector": (False, "parts vision and connector", ("vision", "connector")),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what and where")
    what.add_argument("model", metavar="MODEL", help="folder, Hub id or alias")
    what.add_argument("-o", "--out", metavar="DIR", help="folder to write")
    what.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")
    what.add_argument("--offline", action="store_true", help="never touch the network")
    what.add_argument("--part", choices=PARTS, default="all", help="what to export")
    what.add_argument(
        "--separate-connector", action="store_true",
        help="the vision part ends at image features; the connector is a package of its own",
    )  # fmt: skip
    form = parser.add_argument_group("form")
    sizes = form.add_mutually_exclusive_group()
    sizes.add_argument(
        "--image-size", metavar="N|WxH,...",
        help="of pictures, pixels (default: the model's); several share their weights",
    )  # fmt: skip
    sizes.add_argument(
        "--resolution", metavar="N|HxW,...", help="the same; of two sides the height comes first"
    )
    form.add_argument(
        "--precision", choices=("fp16", "fp32", "mixed"), default="fp16",
        help="mixed: float16, but for what leaves its range",
    )  # fmt: skip
    form.add_argument(
        "--compute", choices=("cpu-gpu", "cpu-ne"), default="cpu-gpu",
        help="compute units that the packages are shaped for",
    )  # fmt: skip
    form.add_argument(
        "--input", choices=("image", "tensor"), default="image",
        help="what the vision part takes: a picture, or a tensor of its values 0..255",
    )  # fmt: skip
    form.add_argument(
        "--format", choices=("mlpackage", "coreai"), default="mlpackage",
        help="coreai: the vision part as a Core AI asset as well (experimental, macOS and iOS 27)",
    )  # fmt: skip
    form.add_argument(
        "--image-strategy", metavar="S", help="pad, center_crop, ... (default: the model's)"
    )
    form.add_argument(
        "--bits", choices=("4", "8", "palette4"),
        help="compress the decoder (default: as the model's weights are)",
    )  # fmt: skip
    form.add_argument(
        "--head-bits", choices=("6",),
        help="of the output head beside --bits palette4: palettes of 64 values (default: the same)",
    )  # fmt: skip
    form.add_argument(
        "--embedding-bits", choices=("4", "8"),
        help="compress the table of input embeddings (default: dense)",
    )  # fmt: skip
    form.add_argument(
        "--context", metavar="N,...",
        help="positions of the decoder's cache (default: 2048); several share their weights",
    )  # fmt: skip
    form.add_argument(
        "--device", metavar="NAME",
        help="iphone-15, m1, ...: choose --bits and --context so that the model fits its memory, "
        "by `estimate`",
    )  # fmt: skip
    check = parser.add_argument_group("checks")
    check.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True,
        help="run every package, compare it with MLX and repair what leaves float16",
    )  # fmt: skip
    check.add_argument(
        "--image", metavar="FILE", help="picture to verify on (default: a drawn one)"
    )
    check.add_argument(
        "--lint", action="store_true", help="print which rules for the Neural Engine are broken"
    )


def _sizes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(height, width) of the pictures, the usual one first; none for the model's own."""
    if args.image_size is not None:
        pairs = _several("--image-size", args.image_size, "WIDTHxHEIGHT")
        return [(height, width) for width, height in pairs]
    if args.resolution is None:
        return []
    pairs = _several("--resolution", args.resolution, "HEIGHTxWIDTH")
    if any(height != width for height, width in pairs):
        told = ",".join(f"{width}x{height}" for height, width in pairs)
        print(f"note: taken as --image-size {told}, as other verbs say", file=sys.stderr)
    return pairs


def _several(flag: str, text: str, order: str) -> list[tuple[int, int]]:
    return [sides(flag, each, order) for each in text.split(",")]


def _contexts(text: str | None) -> list[int]:
    """Those that were asked for, the usual one first. Raises UsageError for what is no number."""
    numbers: list[int] = []
    for each in text.split(",") if text is not None else []:
        if not each.strip().isdecimal() or int(each) < 1:
            raise UsageError(f"context {each}: give a number of positions above zero")
        numbers.append(int(each))
    return numbers


def _weights_and_contexts(args: argparse.Namespace) -> tuple[Any, list[int]]:
    """What was asked for, or what fits the device, which the largest context must."""
    bits, contexts = {"4": 4, "8": 8}.get(args.bits, args.bits), _contexts(args.context)
    if args.device is None:
        return bits, contexts or [CONTEXT]
    from ..wording import gigabytes
    from .device import choose

    largest, table = max(contexts, default=None), _TABLES[args.embedding_bits]
    choice = choose(args.model, args.device, bits, largest, table)
    told = f"--bits {choice.bits}" if choice.bits in (4, 8) else "weights as they are"
    _report(
        f"for {args.device}: {told}, --context {choice.context}: about {gigabytes(choice.nbytes)} "
        f"of {gigabytes(choice.room)} (an estimate)"
    )
    return bits or _asked(args.model, choice.bits), contexts or [choice.context]


def _asked(model: str, bits: int) -> int | None:
    """None where the model has no others, or is to be exported in full."""
    from ..loading.cost import config_of

    return None if bits not in (4, 8) or config_of(model).get("quantization") else bits


def _refuse_unused(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that would be ignored, or counted wrongly."""
    for name, (default, does, parts) in _OF_PARTS.items():
        value = getattr(args, name)
        if value != default and args.part not in ("all", *parts):
            said = f" {value}" if isinstance(default, str) else ""
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag}{said} {does}, which --part {args.part} leaves out")
    if args.image is not None and not args.verify:
        raise UsageError("--image is what packages are verified on, which --no-verify leaves out")
    if args.device and (args.compute == "cpu-ne" or args.bits == "palette4"):
        raise UsageError("--device chooses for the GPU: leave --compute cpu-ne and palettes out")
    if args.device and args.precision == "fp32":
        raise UsageError("--device counts float16: leave --precision fp32 out")


def run(args: argparse.Namespace) -> int:
    if not args.out:
        raise UsageError("name the folder to write: -o DIR")
    _contexts(args.context)
    _refuse_unused(args)
    sizes = _sizes(args)
    bits, (context, *more_contexts) = _weights_and_contexts(args)
    from mlx_vlm_edge_convert.coreml.export import export, precheck
    from mlx_vlm_edge_convert.coreml.part import Options

    from ..hub.models import expanded, obtain

    parts = ("vision", "connector", "decoder") if args.part == "all" else (args.part,)
    options = Options(
        precision=args.precision, compute=args.compute,
        size=sizes[0] if sizes else None, more_sizes=tuple(sizes[1:]),
        strategy=args.image_strategy, bits=bits,
        embedding_bits=_TABLES[args.embedding_bits], head_bits=_HEADS[args.head_bits],
        context=context, more_contexts=tuple(more_contexts),
        fused=not args.separate_connector, image_input=args.input == "image",
        coreai=args.format == "coreai",
    )  # fmt: skip
    precheck(expanded(args.out), options, args.image, args.overwrite)
    target = export(
        obtain(args.model, offline=args.offline), args.out, parts=parts, options=options,
        image=args.image, verify=args.verify, show_lint=args.lint, overwrite=args.overwrite,
        report=_report,
    )  # fmt: skip
    print(target)
    return 0


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
