"""Stage 4: connector and decoder again, on stored features of the frozen tower.

Reading the fourth to sixth character out of the visual tokens is what the decoder learns last;
stored features make its steps three times cheaper, and long texts are drawn more often.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import torch
import torch.nn.functional as F
from decoder import DemoModel
from draw import Scene, draw, reading_scene
from language import VISUAL
from prompts import Prompter
from questions import answers, phrase
from torch import Tensor
from vision import DRAWN_AT, pixels_of, to_float

ASKED = {"read": 6.0, "describe": 2.5, "colour": 0.6, "background": 0.6}  # about a text


@torch.no_grad()
def store(model: DemoModel, count: int) -> tuple[list[Scene], Tensor]:
    """`count` scenes and their features[count, C, 2, 2], float16."""
    model.tower.eval()
    scenes, features = [reading_scene(f"cache-{i}") for i in range(count)], []
    for start in range(0, count, 64):
        images = [draw(s, DRAWN_AT[i % 3]) for i, s in enumerate(scenes[start : start + 64])]
        pixels = torch.stack([torch.from_numpy(pixels_of(image)) for image in images])
        features.append(model.tower(to_float(pixels))[0].half())
        if start % 6400 == 0:
            print(f"settle: stored {start} of {count}", flush=True)
    return scenes, torch.cat(features)


def row(one: Scene, prompter: Prompter, rng: Random) -> tuple[list[int], list[int]]:
    """Token ids of one question with its answer, and the targets (-100: none)."""
    found = answers(one)
    weights = [ASKED.get(c, 1.0) if one.text else 1.0 for c in found]
    category = rng.choices(list(found), weights)[0]
    ask = prompter.after(phrase(category, one, rng))
    say = [*prompter.ids(found[category]), prompter.end]
    ids = prompter.before + [0] * VISUAL + ask
    return ids + say[:-1], [-100] * (len(ids) - 1) + say


def stored_batches(
    scenes: list[Scene], features: Tensor, prompter: Prompter, size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """features, ids[B, L] and targets[B, L], epoch after epoch in random order."""
    rng = Random(f"settle-{seed}")
    while True:
        order = rng.sample(range(len(scenes)), len(scenes))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            rows = [row(scenes[i], prompter, rng) for i in chosen]
            longest = max(len(ids) for ids, _ in rows)
            ids = [ids + [0] * (longest - len(ids)) for ids, _ in rows]
            targets = [t + [-100] * (longest - len(t)) for _, t in rows]
            yield features[chosen].float(), torch.tensor(ids), torch.tensor(targets)


def stored_loss(
    model: DemoModel, batch: tuple[Tensor, Tensor, Tensor], start: int
) -> tuple[Tensor, Tensor]:
    """Mean loss over the answers' tokens, and the share of tokens that are right."""
    features, ids, targets = batch
    L = ids.shape[1]
    mask = torch.ones(L, L, dtype=torch.bool).tril()[None, None]
    embeddings = model.merge(model.connect(features), ids, start)
    hidden = model.decode(embeddings, torch.arange(L)[None].float(), mask)
    asked = targets >= 0
    logits = model.logits(hidden[asked])
    right = (logits.argmax(1) == targets[asked]).float().mean()
    return F.cross_entropy(logits, targets[asked]), right
