"""What the bundled demo model is known to answer: tests/golden/demo_answers.json, row by row.

The file is written by examples/demo_model/record.py, so that the model can be trained anew; no test
quotes an answer of its own.
"""

import json
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "examples" / "images"
ANSWERS = ROOT / "tests" / "golden" / "demo_answers.json"
TOWER = json.loads((ROOT / "mlx_vlm_edge" / "demo" / "config.json").read_text())["vision_config"]
SIDE: int = TOWER["image_size"]  # pixels
VISUAL = (SIDE // TOWER["patch_size"]) ** 2  # visual tokens of a picture


class Known(NamedTuple):
    picture: str  # a file of examples/images
    question: str
    answer: str  # what the model says, greedily
    right: str  # what would be right


KNOWN = [Known(**row) for row in json.loads(ANSWERS.read_text())]


def known(picture: str, question: str) -> Known:
    """The row of one question."""
    return next(row for row in KNOWN if (row.picture, row.question) == (picture, question))
