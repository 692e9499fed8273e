"""`mlx-vlm-edge convert`: a published checkpoint -> a folder in the native layout."""

import argparse
import sys
from pathlib import Path

from ..errors import UsageError

HELP = "Convert a checkpoint (folder, Hub id or alias) to the MLX layout, optionally quantised."
_GROUP_SIZE = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("what and where")
    source.add_argument("source", nargs="?", metavar="SRC", help="folder, Hub id or alias")
    source.add_argument("--hf-path", metavar="SRC", help="the same, as mlx-lm spells it")
    source.add_argument("-o", "--out", "--mlx-path", metavar="DIR", help="folder to write")
    source.add_argument("--overwrite", action="store_true", help="replace a folder that is there")
    source.add_argument("--revision", help="branch, tag or commit of a Hub model")
    source.add_argument("--offline", action="store_true", help="never touch the network")
    form = parser.add_argument_group("form")
    form.add_argument(
        "--bits", "--q-bits", type=int, choices=(2, 3, 4, 5, 6, 8),
        help="quantise the language model",
    )  # fmt: skip
    form.add_argument("-q", "--quantize", action="store_true", help="the same as --bits 4")
    form.add_argument(
        "--group-size", "--q-group-size", type=int, choices=(32, 64, 128),
        help=f"weights that share a scale (default: {_GROUP_SIZE})",
    )  # fmt: skip
    form.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="of what stays unquantised (default: the source's)",
    )  # fmt: skip
    form.add_argument(
        "--adapter", action="append", metavar="DIR[:SCALE]",
        help="fuse a fine-tune (PEFT's, mlx-lm's, mlx-vlm's or LLaVA's folder) into the weights; "
        "may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true", help="compare the result with the source, part by part"
    )


def run(args: argparse.Namespace) -> int:
    source = args.source or args.hf_path
    if not source or (args.source and args.hf_path):
        raise UsageError("name one model to convert: mlx-vlm-edge convert SRC -o DIR")
    if not args.out:
        raise UsageError("name the folder to write: -o DIR")
    bits = args.bits or (4 if args.quantize else None)
    if args.group_size and bits is None:
        raise UsageError("--group-size is of quantised weights: give --bits with it")
    from mlx_vlm_edge_convert import convert

    from ..hub.models import obtain
    from ..text.saved_tokenizer import remember

    folder = obtain(source, revision=args.revision, offline=args.offline)
    target = convert(
        folder, args.out, bits=bits, group_size=args.group_size or _GROUP_SIZE, dtype=args.dtype,
        verify=args.verify, overwrite=args.overwrite, adapter=args.adapter, report=_report,
    )  # fmt: skip
    if args.dtype == "float16":
        _report(
            "note: float16 leaves a vision tower in its own dtype: its activations may overflow"
        )
    remember(Path(target))
    print(target)
    return 0


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
