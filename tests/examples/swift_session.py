"""Answers of edge-ask and of a session, and MLX's own to hold them against."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_vlm_edge import load
from mlx_vlm_edge.generation.conversation import Conversation

from ..demo import IMAGES
from .swift_build import Toolchain
from .swift_link import Link

QUESTIONS = ("Describe the image.", "What colour is it?", "How many shapes are there?")
MOST = 24  # tokens
CONTEXT = 192  # positions of the bundles: a picture, and three short turns
SIDE = 384  # pixels, of the bundles: smaller than the demo model's own, so that exporting is quick
VISUAL = (SIDE // 64) ** 2  # tokens of a picture


def answers(
    tools: Toolchain, ask: Path, bundle: Path, folder: Path, *arguments: str, spoils: bool = False
) -> tuple[list[dict[str, Any]], Link]:
    """What edge-ask says to each question, and the link with the calls.

    spoils: the logits are wrong, and only the token that the package names is right.
    """
    link = Link(tools, bundle, folder)
    link.spoils_logits = spoils
    done = link.run(ask, str(bundle), *arguments, "--json", "--no-trial")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], link


def mlx_answers(
    pictures: Sequence[str], questions: Sequence[str], context: int | None = None,
    every: bool = False, **options: Any,
) -> Iterator[tuple[list[int], int]]:  # fmt: skip
    """MLX's own greedy ids, question after question, and how many turns were dropped so far.

    context: of a bundle, in the place of the model's. every: question has the pictures, not only
    the first.
    """
    model, processor = load("demo", resolution=SIDE)
    if context is not None:
        object.__setattr__(model.config, "context", context)
    chat = Conversation(model, processor, **{"max_tokens": MOST, **options})
    ends = processor.eos_ids
    for number, question in enumerate(questions):
        images = [str(IMAGES / name) for name in pictures] if every or number == 0 else None
        tokens = [piece.token for piece in chat.stream(question, images)]
        yield [token for token in tokens if token not in (None, *ends)], chat.dropped // 2


def session(
    tools: Toolchain, checks: Path, bundle: Path, folder: Path, **more: Any
) -> tuple[dict[str, Any], Link]:
    """What the checks program tells of a session, and the link with the calls."""
    link = Link(tools, bundle, folder)
    request = {
        "ask": "session", "bundle": str(bundle), "picture": str(IMAGES / "shapes.png"),
        "question": QUESTIONS[0], "stop": "circles", **more,
    }  # fmt: skip
    (folder / "requests").write_text(json.dumps([request]))
    done = link.run(checks, str(folder / "requests"))
    assert done.returncode == 0, done.stderr
    (told,) = json.loads(done.stdout)
    assert "error" not in told, told
    return told, link
