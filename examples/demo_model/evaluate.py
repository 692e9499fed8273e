"""Measure the demo model through the runtime: exact match, on plain drawings and on others'.

python examples/demo_model/evaluate.py --scenes 400 --others 120 --json \
    examples/demo_model/evaluation.json

The plain drawings are freshly drawn scenes of plain.py, which need the fonts of PyPI only. The
others' are drawn by other programs (others.py), which must be installed. With them go pairs of
pictures and what has changed, and talks of three turns (talks.py).

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
from typing import Any

from PIL import Image
from plain import KINDS, Scene, draw, scene
from questions import UNKNOWN, phrase

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
TARGETS = {
    "1 to 6": 0.90, "7 to 12": 0.75, "counts": 0.95, "colour": 0.97, "background": 0.97,
    "easy-vqa": 0.90, "photographs": 0.90,
}  # fmt: skip
DECLINED = "drawings declined"  # the share of drawings that the model says it does not know
MOST_DECLINED = 0.02
Answer = Callable[[Image.Image, str], str]
Counted = dict[str, dict[str, object]]  # row -> right, of, share, wrong


def drawn(category: str, index: int, name: str) -> Scene:
    """Scene number `index` of a category."""
    kinds = ASKED_OF[category]
    return scene(f"{name}-{category}-{index}", kinds[index % len(kinds)])


def measure(answer: Answer, scenes: int, size: int, name: str) -> Counted:
    """Per category: how many answers were right, of how many, and up to five wrong ones.

    Of texts also by their length: {length: [right, of]}.
    """
    table: Counted = {}
    for category in ASKED_OF:
        right, wrong = 0, []
        lengths: dict[int, list[int]] = {}
        for index in range(scenes):
            one = drawn(category, index, name)
            asked = phrase(category, one, Random(f"{name}-{category}-{index}-question"))
            question, expected = asked
            said = answer(draw(one, size), question).strip()
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


def measure_others(answer: Answer, pictures: int) -> Counted:
    """Per group of the others' drawings: how many answers were right, of how many, and wrong ones.

    The last row counts the drawings that were declined.
    """
    from others import PHOTOGRAPHS, cases

    right: dict[str, list[int]] = {}
    wrong: dict[str, list[dict[str, str]]] = {}
    declined = [0, 0]
    for case in cases(pictures):
        said = answer(case.picture, case.question).strip()
        count_up(right.setdefault(case.group, [0, 0]), said == case.right)
        if said != case.right:
            row = {"question": case.question, "expected": case.right, "said": said}
            wrong.setdefault(case.group, []).append(row)
        if case.group != PHOTOGRAPHS:
            count_up(declined, said == UNKNOWN)
    right[DECLINED] = declined
    return counted(right, wrong)


def measure_talks(loaded: tuple[Any, Any], count: int, name: str) -> Counted:
    """Per row of the pairs and of the talks: how many answers were right, of how many, wrong ones.

    A talk goes on from the model's own answers, right or not.
    """
    from talks import talks

    from mlx_vlm_edge import Conversation

    right: dict[str, list[int]] = {}
    wrong: dict[str, list[dict[str, str]]] = {}
    for one in talks(count, name):
        chat, pictures = Conversation(*loaded, max_tokens=40), list(one.pictures)
        for group, question, expected in zip(one.groups, one.questions, one.right, strict=True):
            said, pictures = chat.ask(question, images=pictures).strip(), []
            count_up(right.setdefault(group, [0, 0]), said == expected)
            if said != expected:
                row = {"question": question, "expected": expected, "said": said}
                wrong.setdefault(group, []).append(row)
    return counted(right, wrong)


def count_up(counts: list[int], right: bool) -> None:
    counts[0] += right
    counts[1] += 1


def counted(right: dict[str, list[int]], wrong: dict[str, list[dict[str, str]]]) -> Counted:
    """The rows, each with up to five wrong answers; prints them."""
    for group, (hits, of) in right.items():
        print(f"{group:<32}{hits:>6} of {of:<6}{hits / of:>8.1%}", flush=True)
    return {
        group: {"right": hits, "of": of, "share": hits / of, "wrong": wrong.get(group, [])[:5]}
        for group, (hits, of) in right.items()
    }


def target(group: str) -> float:
    """The share that the group should reach; of the drawings declined, at most."""
    if group == DECLINED:
        return MOST_DECLINED
    return next((share for words, share in TARGETS.items() if words in group), 0.95)


def short_of_target(group: str, share: float) -> bool:
    return share > MOST_DECLINED if group == DECLINED else share < target(group)


def runtime(loaded: tuple[Any, Any]) -> Answer:
    """Answers of the mlx_vlm_edge runtime, greedy."""
    from mlx_vlm_edge import generate

    model, processor = loaded

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
    parser.add_argument("--others", type=int, default=120, metavar="N",
                        help="pictures of each set that others draw; 0: none")  # fmt: skip
    parser.add_argument("--size", type=int, default=256, help="side of the pictures in pixels")
    parser.add_argument("--name", default="evaluation", help="seed of the scenes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args()
    from mlx_vlm_edge import load

    start = time.time()
    loaded = load(args.model or "demo")
    answer = runtime(loaded)
    table = measure(answer, args.scenes, args.size, args.name)
    others = measure_others(answer, args.others) if args.others else {}
    talks = measure_talks(loaded, args.others, args.name) if args.others else {}
    short = [c for c, least in REQUIRED.items() if float(str(table[c]["share"])) < least]
    short += [g for g, row in others.items() if short_of_target(g, float(str(row["share"])))]
    print(f"{time.time() - start:.0f} s;", f"short of the mark: {', '.join(short) or 'none'}")
    if args.json:
        result = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": machine(),
            "scenes": args.scenes, "size": args.size, "name": args.name, "table": table,
            "others": others, "talks": talks,
        }  # fmt: skip
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
