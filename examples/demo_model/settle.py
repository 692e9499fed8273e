"""The last stage: connector and decoder alone, on stored features of the finished tower.

Without the tower a batch costs a fourth, so that what the decoder learns slowly (whether the thing
that is asked for is the thing that is there) is asked often enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from decoder import DemoModel
from draw import Scene
from language import Row, padded_rows, said_of_pair, talk_row
from pictures import Batch, Pairs, Pictures, batches
from prompts import Prompter
from torch import Tensor
from vision import to_float

POOL = 8  # batches of rows drawn together, of which those of like length go together
PAIRS_EVERY = 10  # so many batches of single pictures for one of pairs
SHAPES_WEIGHT = 2.0  # how often a picture of shapes is asked about, for one of text
ASKED = {"is it": 8.0, "is it not": 5.0, "count": 2.5, "describe": 2.0}  # about shapes


@dataclass
class Store:
    """Features of pictures and pairs, float16, and what can be asked about them."""

    scenes: list[Scene]
    features: Tensor  # [count, 1, C, 4, 4]
    changes: list[str]
    pair_features: Tensor  # [pairs, 2, C, 4, 4]


@torch.no_grad()
def seen(model: DemoModel, source: Iterator[Batch], count: int) -> tuple[list[object], Tensor]:
    """What `count` pictures or pairs show, and the tower's features of them."""
    shown: list[object] = []
    features: list[Tensor] = []
    while len(shown) < count:
        batch = next(source)
        pixels = batch["pixels"]
        apart = pixels.flatten(0, -4)
        found = model.tower(to_float(apart))[0].half()
        features.append(found.unflatten(0, (len(pixels), -1)))
        shown += batch["shown"]
    return shown[:count], torch.cat(features)[:count]


def store(model: DemoModel, prompter: Prompter, count: int) -> Store:
    """`count` pictures and an eighth as many pairs, seen by the tower as it is."""
    model.tower.eval()
    scenes, features = seen(model, batches(Pictures("settle", 0, prompter), 64), count)
    changes, pairs = seen(model, batches(Pairs("settle", 0, prompter), 32), count // 8)
    return Store(scenes, features, changes, pairs)  # type: ignore[arg-type]


def stored_batches(stored: Store, prompter: Prompter, size: int, seed: int) -> Iterator[Batch]:
    """features[B, pictures, C, 4, 4], ids and targets, in random order; new talks every time."""
    rng = Random(f"settle-{seed}")
    often = [SHAPES_WEIGHT if one.shape else float(one.kind != "page") for one in stored.scenes]
    number = 0

    def batch(features: Tensor, places: Sequence[int], rows: Sequence[Row]) -> Batch:
        ids, targets = padded_rows(rows)
        return {"features": features[list(places)].float(), "ids": ids, "targets": targets}

    while True:
        chosen = rng.choices(range(len(often)), often, k=POOL * size)
        pool: list[tuple[int, Row]] = [
            (i, talk_row(stored.scenes[i], rng, prompter, ASKED)) for i in chosen
        ]
        pool.sort(key=lambda item: len(item[1][0]))
        for start in rng.sample(range(0, POOL * size, size), POOL):
            places, rows = zip(*pool[start : start + size], strict=True)
            yield batch(stored.features, places, rows)
            number += 1
            if number % PAIRS_EVERY == 0:
                two = [rng.randrange(len(stored.changes)) for _ in range(size)]
                rows = [said_of_pair(stored.changes[i], rng, prompter) for i in two]
                yield batch(stored.pair_features, two, rows)
