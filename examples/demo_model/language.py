"""Stage 3: questions and answers about drawn scenes, packed several to a picture.

A row holds the prompt up to the image, the visual tokens, and then one branch per question; a
branch sees the shared beginning and itself, at the positions it would have alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import numpy as np
import plain
import torch
import torch.nn.functional as F
from decoder import DemoModel
from draw import KINDS, asked_scene, scene
from prompts import Prompter
from questions import answers, pairs, phrase
from render import draw
from settle import ASKED_TEXT, VISUAL
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from vision import cells, drawn_at, facts, labelled, pixels_of, to_float, yielding

Sample = dict[str, np.ndarray]


class Questions(IterableDataset[Sample]):
    """`count` packed questions about each of the scenes `stage-start`, `stage-(start+1)`, ..."""

    def __init__(self, prompter: Prompter, stage: str, start: int, count: int) -> None:
        self.prompter, self.stage, self.start, self.count = prompter, stage, start, count

    def __iter__(self) -> Iterator[Sample]:
        index, before = self.start, self.prompter.before
        while True:
            seed = f"{self.stage}-{index}"
            if index % 2:
                flat = plain.reading_scene(seed) if index % 4 == 1 else plain.scene(seed)
                one, image = labelled(flat), plain.draw(flat, drawn_at(seed))
            else:
                one = asked_scene(seed, ASKED_TEXT)
                image = draw(one, drawn_at(seed))
            rng = Random(f"{seed}-questions")
            ids, branch = before + [0] * VISUAL, [0] * (len(before) + VISUAL)
            positions, targets = list(range(len(ids))), [-100] * len(ids)
            shared = len(ids)
            for number, (question, answer) in enumerate(pairs(one, rng, self.count), 1):
                ask = self.prompter.after(question)
                say = self.prompter.spelled(answer, one.text)
                ids += ask + say[:-1]
                branch += [number] * (len(ask) + len(say) - 1)
                positions += range(shared, shared + len(ask) + len(say) - 1)
                targets += [-100] * (len(ask) - 1) + say
            yield {
                "pixels": pixels_of(image),
                "tokens": np.array([ids, branch, positions, targets], np.int64),
                "cells": cells(one),
                "facts": facts(one),
            }
            index += 1


def collate(samples: list[Sample]) -> dict[str, Tensor]:
    """Stack, padding tokens[4, L] to the longest row (branch -1 sees nothing but itself)."""
    longest = max(s["tokens"].shape[1] for s in samples)
    tokens = np.zeros((len(samples), 4, longest), np.int64)
    tokens[:, 1], tokens[:, 3] = -1, -100
    for row, s in zip(tokens, samples, strict=True):
        row[:, : s["tokens"].shape[1]] = s["tokens"]
    names = ("pixels", "cells", "facts")
    batch = {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in names}
    return batch | {"tokens": torch.from_numpy(tokens)}


def question_batches(
    prompter: Prompter, stage: str, start: int, size: int, count: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of `size` pictures with `count` questions each, drawn by a background process."""
    data = Questions(prompter, stage, start, count)
    loader = DataLoader(
        data, size, num_workers=1, prefetch_factor=4, collate_fn=collate, worker_init_fn=yielding
    )
    return iter(loader)


def answer_loss(
    model: DemoModel, features: Tensor, batch: dict[str, Tensor], start: int
) -> tuple[Tensor, Tensor]:
    """Mean loss over the answers' tokens, and the share of tokens that are right."""
    ids, branch, positions, targets = batch["tokens"].unbind(1)
    L = ids.shape[1]
    causal = torch.ones(L, L, dtype=torch.bool).tril()
    same = branch[:, :, None] == branch[:, None, :]
    mask = causal & (same | (branch[:, None, :] == 0))
    embeddings = model.merge(model.connect(features), ids, start)
    hidden = model.decode(embeddings, positions.float(), mask[:, None])
    asked = targets >= 0
    logits = model.logits(hidden[asked])
    loss = F.cross_entropy(logits, targets[asked])
    return loss, (logits.argmax(1) == targets[asked]).float().mean()


def say(model: DemoModel, prompter: Prompter, visual: Tensor, question: str, most: int = 40) -> str:
    before = prompter.before
    ids = torch.tensor([before + [0] * VISUAL + prompter.after(question)])
    out = model.answer(visual, ids, len(before), prompter.end, most)
    return prompter.tokenizer.decode(out)


def exact_match(model: DemoModel, prompter: Prompter, scenes: int) -> dict[str, float]:
    """Share of held-out questions per category that are answered exactly, greedy."""
    model.eval()
    right: dict[str, list[bool]] = {}
    for index in range(scenes):
        seed, kind = f"held-out-{index}", KINDS[index % len(KINDS)]
        one = asked_scene(seed) if index % 2 else scene(seed, kind)
        rng = Random(f"{seed}-questions")
        with torch.no_grad():
            pixels = torch.from_numpy(pixels_of(draw(one, drawn_at(seed))))[None]
            visual = model.connect(model.tower(to_float(pixels))[0])
        for category in answers(one):
            question, answer = phrase(category, one, rng)
            name = "no text" if category == "read" and not one.text else category
            if category == "read" and one.text:
                name = "read short" if len(one.text) < 7 else "read long"
            name = "decline" if one.kind == "unknown" else name
            right.setdefault(name, []).append(say(model, prompter, visual, question) == answer)
    return {name: sum(hits) / len(hits) for name, hits in sorted(right.items())}
