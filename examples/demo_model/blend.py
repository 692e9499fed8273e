"""Between two checkpoints of a training: weights share of the way from the first to the second.

python examples/demo_model/blend.py demo-run/run.pt demo-run/settle-5950.pt 0.5 --out export

The decoder's own stage forgets a little of what it was not asked; a blend keeps most of both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from decoder import DemoModel
from export import export
from network import Shape
from prompts import Prompter
from tokenizers import Tokenizer
from torch import Tensor

PREFIX = "model."  # of the model's weights beside the heads'


def blend(one: Path, other: Path, share: float) -> dict[str, Tensor]:
    """The averaged weights of the two stages, blended."""
    first, second = (torch.load(path)["average"] for path in (one, other))
    return {
        name.removeprefix(PREFIX): torch.lerp(value, second[name], share)
        if value.is_floating_point()
        else value
        for name, value in first.items()
        if name.startswith(PREFIX)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("share", type=float, help="0: the first, 1: the second")
    parser.add_argument("--tokenizer", type=Path, default=Path("mlx_vlm_edge/demo"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = DemoModel(Shape())
    model.load_state_dict(blend(args.one, args.other, args.share))
    prompter = Prompter(Tokenizer.from_file(str(args.tokenizer / "tokenizer.json")))
    export(model, prompter, args.out, f"{args.share} of the way from {args.one} to {args.other}")


if __name__ == "__main__":
    main()
