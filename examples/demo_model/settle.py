"""The last stage: connector and decoder alone, on stored features of the finished tower.

Without the tower a batch costs a fourth. Yes and no are learned in batches of their own, one short
question to a row, at first without "not": in talks, among other questions, they stay a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from changes import Change
from decoder import DemoModel
from draw import Scene
from language import Row, padded_rows, row, said_of_pair, talk_row
from pictures import Batch, Pairs, Pictures, batches
from prompts import Prompter
from questions import phrase
from torch import Tensor
from vision import to_float

POOL = 8  # batches of rows drawn together, of which those of like length go together
PAIRED = 0.3  # share of the batches that ask what has changed
UNCHANGED = 0.3  # how many of their rows show one picture twice
SHAPES_WEIGHT, PLACED_WEIGHT = 2.0, 6.0  # how often shapes are asked about, for one text; the
# second of a shape that has a place, of which there are few
JUDGED = 0.4  # share of the others that ask only for a yes or a no
SIMPLE = 0.2  # share of the stage in which none of them asks "is it not"
NEGATED = 0.4  # how many of them ask it afterwards


@dataclass
class Store:
    """Features of pictures and pairs, float16, and what can be asked about them."""

    scenes: list[Scene]
    features: Tensor  # [count, 1, C, 8, 8]
    changes: list[Change]  # none of them nothing
    pair_features: Tensor  # [pairs, 2, C, 8, 8]


@torch.no_grad()
def encoded(model: DemoModel, source: Iterator[Batch], count: int) -> tuple[list[object], Tensor]:
    """What `count` pictures or pairs show, and the tower's features of them."""
    shown: list[object] = []
    features: list[Tensor] = []
    while len(shown) < count:
        pictures = next(source)
        pixels = pictures["pixels"]
        apart = pixels.flatten(0, -4)
        found = model.tower(to_float(apart)).half()
        features.append(found.unflatten(0, (len(pixels), -1)))
        shown += pictures["shown"]
    return shown[:count], torch.cat(features)[:count]


def store(model: DemoModel, prompter: Prompter, count: int) -> Store:
    """`count` pictures and a third as many pairs, seen by the tower as it is."""
    model.tower.eval()
    scenes, features = encoded(
        model, batches(Pictures("settle", 0, prompter, pages=False), 64), count
    )
    source = batches(Pairs("settle", 0, prompter, changed=True), 32, 2)
    changes, pairs = encoded(model, source, count // 3)
    return Store(scenes, features, changes, pairs)  # type: ignore[arg-type]


def batch(features: Tensor, places: Sequence[int], rows: Sequence[Row]) -> Batch:
    ids, targets = padded_rows(rows)
    return {"features": features[list(places)].float(), "ids": ids, "targets": targets}


def judged_batches(
    stored: Store, prompter: Prompter, size: int, seed: int, done: Callable[[], float]
) -> Iterator[Batch]:
    """Rows of one question each: is a thing there, and later also, is it not."""
    rng = Random(f"judged-{seed}")
    of_shapes = [i for i, one in enumerate(stored.scenes) if one.shape and one.colour]
    while True:
        places, rows = rng.choices(of_shapes, k=size), []
        for i in places:
            category = "is it not" if done() > SIMPLE and rng.random() < NEGATED else "is it"
            rows.append(row([(*phrase(category, stored.scenes[i], rng), "")], 1, prompter))
        yield batch(stored.features, places, rows)


def paired_batches(stored: Store, prompter: Prompter, size: int, seed: int) -> Iterator[Batch]:
    """What has changed: the stored pairs in either order, and single pictures shown twice."""
    rng = Random(f"paired-{seed}")
    known = [i for i, one in enumerate(stored.scenes) if one.text or one.shape]
    while True:
        rows, features = [], []
        for _ in range(size):
            if rng.random() < UNCHANGED:
                told, two = Change(), stored.features[rng.choice(known)].expand(2, -1, -1, -1)
            else:
                i = rng.randrange(len(stored.changes))
                told, two = stored.changes[i], stored.pair_features[i]
                if rng.random() < 0.5:
                    told, two = told.undone, two.flip(0)
            rows.append(said_of_pair(told, rng, prompter))
            features.append(two)
        yield batch(torch.stack(features), range(size), rows)


def weight(one: Scene) -> float:
    """How often a scene is asked about; a page of print never."""
    if one.place:
        return PLACED_WEIGHT
    return SHAPES_WEIGHT if one.shape else float(one.kind != "page")


def stored_batches(
    stored: Store, prompter: Prompter, size: int, seed: int, done: Callable[[], float]
) -> Iterator[Batch]:
    """features[B, pictures, C, 8, 8], ids and targets, in random order; new talks every time.

    done: the share of the stage that is over."""
    rng = Random(f"settle-{seed}")
    judged = judged_batches(stored, prompter, size, seed, done)
    paired = paired_batches(stored, prompter, size, seed)
    often = [weight(one) for one in stored.scenes]

    while True:
        chosen = rng.choices(range(len(often)), often, k=POOL * size)
        pool: list[tuple[int, Row]] = [
            (i, talk_row(stored.scenes[i], rng, prompter)) for i in chosen
        ]
        pool.sort(key=lambda item: len(item[1][0]))
        for start in rng.sample(range(0, POOL * size, size), POOL):
            while rng.random() < PAIRED:
                yield next(paired)
            while rng.random() < JUDGED:
                yield next(judged)
            places, rows = zip(*pool[start : start + size], strict=True)
            yield batch(stored.features, places, rows)
