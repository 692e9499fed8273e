"""Stage 2: connector and decoder on stored features of the frozen tower.

Reading the later characters out of the visual tokens is what the decoder learns last; with stored
features its steps cost a third. Rows are single questions, talks of several turns, and pairs of
pictures with what has changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import plain
import torch
import torch.nn.functional as F
from changes import ASKED, pair
from decoder import DemoModel
from draw import Scene, asked_scene
from prompts import Prompter
from questions import answers, phrase
from render import draw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from vision import drawn_at, pixels_of, to_float

VISUAL = 4
ASKED_TEXT = 7  # characters of the wider drawings, at most
PLAIN_OF_NINE = 4  # so many of nine pictures are plain ones
POOL = 8  # batches drawn together; after them comes one with two pictures in a row
WEIGHTS = {"read": 7.0, "describe": 2.0, "colour": 1.0, "background": 1.0}  # about a text
SHAPE_WEIGHTS = {"count": 2.5, "describe": 2.0, "is it": 3.0, "is it not": 1.5, "read": 0.6}
Turn = tuple[str, str, str]  # question, answer, the printed text in the answer
AnyScene = Scene | plain.Scene


def turn(one: AnyScene, category: str, rng: Random) -> Turn:
    question, answer = phrase(category, one, rng)
    return question, answer, one.text


def talk(one: AnyScene, rng: Random) -> list[Turn]:
    """One question, or up to three different ones in turn."""
    fair = list(answers(one))
    table = WEIGHTS if one.text else SHAPE_WEIGHTS
    chosen: list[str] = []
    for _ in range(rng.choices((1, 2, 3), (6, 3, 1))[0]):
        left = [category for category in fair if category not in chosen]
        chosen += rng.choices(left, [table.get(category, 1.0) for category in left]) if left else []
    return [turn(one, category, rng) for category in chosen]


def row(turns: Sequence[Turn], pictures: int, prompter: Prompter) -> tuple[list[int], list[int]]:
    """Token ids of a talk about pictures, and the targets (-100: none)."""
    ids = list(prompter.before)
    for number in range(pictures):
        ids += prompter.ids("\n") * (number > 0) + [0] * VISUAL
    targets = [-100] * (len(ids) - 1)
    for number, (question, answer, text) in enumerate(turns):
        ask = prompter.again(question) if number else prompter.after(question)
        say = prompter.spelled(answer, text)
        ids += ask + say
        targets += [-100] * len(ask) + say
    return ids[:-1], targets


def said_of_pair(said: str, rng: Random, prompter: Prompter) -> tuple[list[int], list[int]]:
    """The row of a pair; the texts in the answer are spelled too."""
    ids, targets = row([(rng.choice(ASKED), "", "")], 2, prompter)
    say: list[int] = []
    for number, part in enumerate(said.split('"')):
        quote = prompter.ids('"') * (number > 0)
        spelled = [i for char in part for i in prompter.ids(char)]
        say += quote + (spelled if number % 2 else prompter.ids(part))
    say.append(prompter.end)
    return ids + say[:-1], targets[:-1] + say


@dataclass
class Store:
    """Scenes and pairs with the tower's features of their pictures, float16."""

    scenes: list[AnyScene]
    features: Tensor  # [count, C, 2, 2]
    changes: list[str]
    pair_features: Tensor  # [pairs, 2, C, 2, 2]


def stored_scene(index: int) -> AnyScene:
    if index % 9 < PLAIN_OF_NINE:
        return plain.reading_scene(f"cache-{index}") if index % 3 else plain.scene(f"cache-{index}")
    return asked_scene(f"cache-{index}", ASKED_TEXT)


def picture(one: AnyScene, seed: str) -> Tensor:
    """uint8[128, 128, 3]."""
    size = drawn_at(seed)
    image = plain.draw(one, size) if isinstance(one, plain.Scene) else draw(one, size)
    return torch.from_numpy(pixels_of(image))


class Drawn(Dataset[Tensor]):
    """The pictures that are stored, and after them those of the pairs, two by two."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count + 2 * (self.count // 10)

    def __getitem__(self, index: int) -> Tensor:
        if index < self.count:
            return picture(stored_scene(index), f"cache-{index}")
        number, second = divmod(index - self.count, 2)
        return picture(pair(f"pair-{number}")[second], f"pair-{number}-{second}")


@torch.no_grad()
def store(model: DemoModel, count: int) -> Store:
    """`count` pictures and a tenth as many pairs, seen by the tower as it is."""
    model.tower.eval()
    loader = DataLoader(Drawn(count), 64, num_workers=1, prefetch_factor=8)
    parts = []
    for number, pixels in enumerate(loader):
        parts.append(model.tower(to_float(pixels))[0].half())
        if number % 50 == 0:
            print(f"settle: stored {64 * number} of {len(loader.dataset)}", flush=True)
    features = torch.cat(parts)
    scenes = [stored_scene(index) for index in range(count)]
    changes = [pair(f"pair-{index}")[2] for index in range(count // 10)]
    return Store(scenes, features[:count], changes, features[count:].unflatten(0, (-1, 2)))


def padded(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """ids[B, L] and targets[B, L] of rows of unequal length."""
    longest = max(len(ids) for ids, _ in rows)
    ids = [ids + [0] * (longest - len(ids)) for ids, _ in rows]
    targets = [t + [-100] * (longest - len(t)) for _, t in rows]
    return torch.tensor(ids), torch.tensor(targets)


def stored_batches(
    stored: Store, prompter: Prompter, size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """features[B, pictures, C, 2, 2], ids[B, L] and targets[B, L], in random order.

    Rows of like length go together: of POOL batches, so that little is padding.
    """
    rng = Random(f"settle-{seed}")
    while True:
        pool = [
            (i, row(talk(stored.scenes[i], rng), 1, prompter))
            for i in rng.choices(range(len(stored.scenes)), k=POOL * size)
        ]
        pool.sort(key=lambda item: len(item[1][0]))
        for start in rng.sample(range(0, POOL * size, size), POOL):
            chosen, rows = zip(*pool[start : start + size], strict=True)
            yield stored.features[list(chosen), None].float(), *padded(rows)
        two = [rng.randrange(len(stored.changes)) for _ in range(size)]
        pair_rows = [said_of_pair(stored.changes[i], rng, prompter) for i in two]
        yield stored.pair_features[two].float(), *padded(pair_rows)


def embedded(model: DemoModel, features: Tensor, ids: Tensor, start: int) -> Tensor:
    """Embeddings of ids[B, L] with the visual tokens of each picture in their places."""
    text = model.model.embed_tokens(ids)
    parts, place = [text[:, :start]], start
    for number in range(features.shape[1]):
        if number:
            parts.append(text[:, place : place + 1])  # the line break between two pictures
            place += 1
        parts.append(model.connect(features[:, number]))
        place += VISUAL
    return torch.cat([*parts, text[:, place:]], 1)


def stored_loss(
    model: DemoModel, batch: tuple[Tensor, Tensor, Tensor], start: int
) -> tuple[Tensor, Tensor]:
    """Mean loss over the answers' tokens, and the share of tokens that are right."""
    features, ids, targets = batch
    L = ids.shape[1]
    mask = torch.ones(L, L, dtype=torch.bool).tril()[None, None]
    hidden = model.decode(
        embedded(model, features, ids, start), torch.arange(L)[None].float(), mask
    )
    asked = targets >= 0
    logits = model.logits(hidden[asked])
    right = (logits.argmax(1) == targets[asked]).float().mean()
    return F.cross_entropy(logits, targets[asked]), right
