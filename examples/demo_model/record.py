"""Write down what the bundled demo model knows, where tests and READMEs read it.

python examples/demo_model/record.py [--check]

The answers about the sample pictures go to tests/golden/demo_answers.json, three of them and their
pictures to mlx_vlm_edge/doctor/pictures, for `doctor --selftest`; the figures of
evaluation.json, which evaluate.py wrote, go into the tables of the READMEs. --check writes nothing:
it asks again, on this machine's device, and fails when an answer is another.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ANSWERS = ROOT / "tests" / "golden" / "demo_answers.json"
SHIPPED = ROOT / "mlx_vlm_edge" / "doctor" / "pictures"  # what `doctor --selftest` asks
EVALUATION = HERE / "evaluation.json"
READMES = (ROOT / "README.md", HERE / "README.md")
BEGIN, END = "<!-- demo: begin -->", "<!-- demo: end -->"

# Sample picture, category, one of the ways to ask.
ASKED = (
    ("text.png", "read", "What does it say?"),
    ("text.png", "background", "What color is the background?"),
    ("hello.png", "read", "Read the text."),
    ("hello.png", "describe", "Describe the image."),
    ("shapes.png", "count", "How many circles are there?"),
    ("shapes.png", "describe", "What is this?"),
    ("count.png", "count", "How many shapes are in the image?"),
    ("count.png", "shape", "What shape is it?"),
    ("position.png", "position", "Where is the star?"),
    ("position.png", "colour", "What color is the star?"),
    ("top.png", "position", "Where is it?"),
    ("top.png", "shape", "What shape is this?"),
    ("shapes.png", "describe", "Describe the image."),
    ("shapes.png", "shape", "What shape is it?"),
)
SELFTEST = (("hello.png", "read"), ("shapes.png", "count"), ("position.png", "position"))
HEADINGS = {
    "read": "reads text", "count": "counts", "shape": "names the shape", "colour": "the colour",
    "background": "the background", "position": "the position", "describe": "describes",
}  # fmt: skip


def asked(questions: Iterable[tuple[str, str]]) -> Iterator[str]:
    """What the model says, greedily, to (picture, question)."""
    from mlx_vlm_edge import generate, load

    model, processor = load("demo")
    for picture, question in questions:
        image = ROOT / "examples" / "images" / picture
        yield generate(model, processor, question, images=[image], max_tokens=40)


def known() -> list[dict[str, str]]:
    """Every answer beside what would be right."""
    from questions import answers
    from samples import samples

    scenes = samples()
    said = asked((picture, question) for picture, _, question in ASKED)
    return [
        {
            "picture": picture,
            "question": question,
            "answer": answer,
            "right": answers(scenes[picture])[category],
        }
        for (picture, category, question), answer in zip(ASKED, said, strict=True)
    ]


def ship(rows: list[dict[str, str]]) -> None:
    """Copy the pictures of a few rows to where the runtime has them, with their known answers."""
    chosen = [
        {name: row[name] for name in ("picture", "question", "answer")}
        for (picture, category, _), row in zip(ASKED, rows, strict=True)
        if (picture, category) in SELFTEST
    ]
    for row in chosen:
        picture = ROOT / "examples" / "images" / row["picture"]
        (SHIPPED / picture.name).write_bytes(picture.read_bytes())
    (SHIPPED / "answers.json").write_text(json.dumps(chosen, indent=1) + "\n")


def check() -> bool:
    """Whether the answers are those that are written down; prints each."""
    rows = json.loads(ANSWERS.read_text())
    same = True
    for row, answer in zip(
        rows, asked((row["picture"], row["question"]) for row in rows), strict=True
    ):
        same &= answer == row["answer"]
        verdict = "as recorded" if answer == row["answer"] else f"recorded: {row['answer']}"
        print(f"{row['picture']} {row['question']} {answer} ({verdict})")
    return same


def percent(right: int, of: int) -> str:
    share = 100 * right / of
    return "100 %" if right == of else f"{share:.1f} %"


def table(evaluation: dict[str, Any]) -> str:
    """The shares of right answers, and how they were measured."""
    shares = [
        percent(evaluation["table"][name]["right"], evaluation["table"][name]["of"])
        for name in HEADINGS
    ]
    rows = [list(HEADINGS.values()), ["---"] * len(HEADINGS), shares]
    drawn = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    lengths = evaluation["table"]["read"]["by_length"]
    by_length = ", ".join(percent(*counts) for counts in lengths.values())
    on = evaluation["machine"]
    return "\n".join([
        drawn,
        "",
        f"Right answers to {evaluation['scenes']} freshly drawn pictures of each kind, at "
        f"{evaluation['size']} px: exact",
        "match, greedy, weights as bundled. Texts by their length, "
        f"{min(lengths)} to {max(lengths)} characters: {by_length}.",
        f"Measured on {on['system']}, {on['cores']} CPU cores, MLX {on['mlx']}, by",
        f"`{evaluation['command']}`.",
    ])  # fmt: skip


def others_table(evaluation: dict[str, Any]) -> str:
    """The shares of right answers about what other programs draw, beside the targets."""
    from evaluate import DECLINED, target

    lines = ["| drawn by others, never trained on | right | target |", "| --- | --- | --- |"]
    for group, row in evaluation["others"].items():
        sign = "at most " if group == DECLINED else ""
        share = percent(row["right"], row["of"])
        lines.append(f"| {group} | {share} of {row['of']} | {sign}{target(group):.0%} |")
    return "\n".join(lines).replace("%", " %").replace("  %", " %")


def talks_table(evaluation: dict[str, Any]) -> str:
    """The shares of right answers about two pictures, and in talks of three turns."""
    lines = ["| two pictures, and talks | right |", "| --- | --- |"]
    for group, row in evaluation["talks"].items():
        lines.append(f"| {group} | {percent(row['right'], row['of'])} of {row['of']} |")
    return "\n".join(lines)


def figures(evaluation: dict[str, Any]) -> str:
    """What stands between the marks of the READMEs."""
    tables = table(evaluation), others_table(evaluation), talks_table(evaluation)
    return "\n\n".join(tables)


def put(readme: str, text: str) -> str:
    """The README with `text` between its two marks."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{BEGIN} and {END} must stand in the README, in this order")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> int:
    if "--check" in sys.argv[1:]:
        return 0 if check() else 1
    rows = known()
    ANSWERS.write_text(json.dumps(rows, indent=1) + "\n")
    ship(rows)
    text = figures(json.loads(EVALUATION.read_text()))
    for readme in READMES:
        readme.write_text(put(readme.read_text(), text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
