"""Measure the demo model on freshly drawn scenes: exact match per category, through the runtime.

python examples/demo_model/evaluate.py --scenes 400 --json examples/demo_model/evaluation.json

record.py puts that file's figures into the READMEs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from draw import KINDS, Scene, draw, scene
from PIL import Image
from questions import CATEGORIES, answers, phrase

ASKED_OF = {
    "read": ("text",),
    "count": ("shapes",),
    "shape": ("shapes", "position"),
    "position": ("position",),
    "colour": KINDS,
    "background": KINDS,
    "describe": KINDS,
}
REQUIRED = {
    "read": 0.90, "count": 0.95, "shape": 0.95, "position": 0.95, "colour": 0.95,
    "background": 0.95,
}  # fmt: skip
Answer = Callable[[Image.Image, str], str]


def drawn(category: str, index: int, name: str) -> Scene:
    """Scene number `index` of a category."""
    kinds = ASKED_OF[category]
    return scene(f"{name}-{category}-{index}", kinds[index % len(kinds)])


def measure(answer: Answer, scenes: int, size: int, name: str) -> dict[str, dict[str, object]]:
    """Per category: how many answers were right, of how many, and up to five wrong ones.

    Of texts also by their length: {length: [right, of]}.
    """
    table: dict[str, dict[str, object]] = {}
    for category in CATEGORIES:
        right, wrong = 0, []
        lengths: dict[int, list[int]] = {}
        for index in range(scenes):
            one = drawn(category, index, name)
            question = phrase(category, one, Random(f"{name}-{category}-{index}-question"))
            expected, said = answers(one)[category], answer(draw(one, size), question).strip()
            of_length = lengths.setdefault(len(one.text), [0, 0])
            of_length[1] += 1
            if said == expected:
                right += 1
                of_length[0] += 1
            else:
                wrong.append({"question": question, "expected": expected, "said": said})
        table[category] = {"right": right, "of": scenes, "share": right / scenes,
                           "wrong": wrong[:5]}  # fmt: skip
        if category == "read":
            table[category]["by_length"] = {str(n): lengths[n] for n in sorted(lengths)}
        print(f"{category:<12}{right:>6} of {scenes:<6}{right / scenes:>8.1%}", flush=True)
    return table


def runtime(model_name: str | None) -> Answer:
    """Answers of the mlx_vlm_edge runtime, greedy."""
    from mlx_vlm_edge import generate, load

    model, processor = load(model_name) if model_name else load("demo")

    def answer(image: Image.Image, question: str) -> str:
        return str(generate(model, processor, question, images=[image], max_tokens=40))

    return answer


def machine() -> dict[str, object]:
    """Where the answers were computed: system, cores, versions."""
    import mlx.core as mx

    from mlx_vlm_edge import __version__

    return {
        "system": platform.system(),
        "cores": os.cpu_count(),
        "device": str(mx.default_device().type).rpartition(".")[-1],
        "mlx": mx.__version__,
        "mlx-vlm-edge": __version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or alias; default: the bundled demo model")
    parser.add_argument("--scenes", type=int, default=200, help="scenes per category")
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--name", default="evaluation", help="seed of the scenes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args()
    start = time.time()
    table = measure(runtime(args.model), args.scenes, args.size, args.name)
    short = [c for c, least in REQUIRED.items() if float(str(table[c]["share"])) < least]
    print(f"{time.time() - start:.0f} s;", f"short of the mark: {', '.join(short) or 'none'}")
    if args.json:
        result = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": machine(),
            "scenes": args.scenes, "size": args.size, "name": args.name, "table": table,
        }  # fmt: skip
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
