"""What the decoder is taught: talks about a picture, and what has changed between two.

A row is the prompt with the pictures' visual tokens in their places, the questions and the
answers; the loss is the answers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
import torch.nn.functional as F
from changes import ASKED, Change
from decoder import DemoModel
from draw import Scene
from network import Shape
from prompts import Prompter
from questions import answers, phrase
from torch import Tensor

VISUAL = Shape().visual
TEXT_WEIGHTS = {"read": 8.0, "describe": 2.0}  # how often what is asked about a text
SHAPE_WEIGHTS = {
    "count": 2.5, "describe": 4.0, "position": 4.0, "is it": 2.0, "is it not": 1.5, "read": 0.5,
}  # fmt: skip
JUDGEMENT = 8.0  # weight of a yes or a no in the loss: one token among many, and learned last
TURNS = (7, 3, 0.7)  # how often a talk has 1, 2, 3 turns
Turn = tuple[str, str, str]  # question, answer, the printed text in the answer
Row = tuple[list[int], list[int]]  # token ids, and the targets (-100: none)


def talk(one: Scene, rng: Random) -> list[Turn]:
    """One question, or up to three different ones in turn; one about what is unknown."""
    fair = list(answers(one))
    table = TEXT_WEIGHTS if one.text else SHAPE_WEIGHTS
    chosen: list[str] = []
    turns = 1 if one.kind == "unknown" else rng.choices((1, 2, 3), TURNS)[0]
    for _ in range(turns):
        left = [category for category in fair if category not in chosen]
        chosen += rng.choices(left, [table.get(category, 1.0) for category in left]) if left else []
    return [(*phrase(category, one, rng), one.text) for category in chosen]


def row(turns: Sequence[Turn], pictures: int, prompter: Prompter) -> Row:
    """A talk about pictures."""
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


def talk_row(one: Scene, rng: Random, prompter: Prompter) -> Row:
    """A talk about a scene; about a page of small print nothing is asked."""
    if one.kind == "page":
        ids = [*prompter.before, *[0] * VISUAL]
        return ids, [-100] * len(ids)
    return row(talk(one, rng), 1, prompter)


def said_of_pair(told: Change, rng: Random, prompter: Prompter) -> Row:
    """The row of a pair; the texts in the answer are spelled too."""
    ids, targets = row([(rng.choice(ASKED), "", "")], 2, prompter)
    say: list[int] = []
    for number, part in enumerate(told.said.split('"')):
        quote = prompter.ids('"') * (number > 0)
        spelled = [i for char in part for i in prompter.ids(char)]
        say += quote + (spelled if number % 2 else prompter.ids(part))
    say.append(prompter.end)
    return ids + say[:-1], targets[:-1] + say


def padded_rows(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """ids[B, L] and targets[B, L] of rows of unequal length."""
    longest = max(len(ids) for ids, _ in rows)
    ids = [ids + [0] * (longest - len(ids)) for ids, _ in rows]
    targets = [t + [-100] * (longest - len(t)) for _, t in rows]
    return torch.tensor(ids), torch.tensor(targets)


def judgements(targets: Tensor, prompter: Prompter) -> Tensor:
    """bool[B, L]: where an answer that is yes or no begins, or a text that is just that."""
    found = torch.zeros_like(targets, dtype=torch.bool)
    for word in ("yes", "no"):
        answer = [-100, *prompter.ids(word), prompter.end]
        windows = targets.unfold(1, len(answer), 1)
        found[:, 1 : windows.shape[1] + 1] |= (windows == torch.tensor(answer)).all(2)
    return found


def answer_loss(
    model: DemoModel, features: Tensor, batch: dict[str, Tensor], prompter: Prompter
) -> tuple[Tensor, Tensor]:
    """Loss of an answers' token, weighted, and the share of tokens that are right.

    features[B, pictures, C, 8, 8].
    """
    start = len(prompter.before)
    ids, targets = batch["ids"], batch["targets"]
    L = ids.shape[1]
    mask = torch.ones(L, L, dtype=torch.bool).tril()[None, None]
    visual = model.connect(features.flatten(0, 1)).unflatten(0, features.shape[:2])
    hidden = model.decode(model.merge(visual, ids, start), torch.arange(L)[None].float(), mask)
    asked = targets >= 0
    logits = model.logits(hidden[asked])
    right = (logits.argmax(1) == targets[asked]).float().mean()
    each = F.cross_entropy(logits, targets[asked], reduction="none")
    weight = 1 + (JUDGEMENT - 1) * judgements(targets, prompter)[asked].float()
    return (weight * each).sum() / weight.sum(), right


def say(model: DemoModel, prompter: Prompter, visual: Tensor, question: str, most: int = 40) -> str:
    before = prompter.before
    ids = torch.tensor([before + [0] * VISUAL + prompter.after(question)])
    out = model.answer(visual, ids, len(before), prompter.end, most)
    return prompter.tokenizer.decode(out)


def category_of(category: str, one: Scene) -> str:
    """The row of a table that a question about a scene counts in."""
    if one.kind == "unknown":
        return "decline"
    if category != "read":
        return category
    if not one.text:
        return "no text"
    return "read short" if len(one.text) < 7 else "read long"


@torch.no_grad()
def exact_match(
    model: DemoModel, prompter: Prompter, scenes: Sequence[tuple[Scene, Tensor]]
) -> dict[str, float]:
    """Share of questions per category that are answered exactly, greedy, about scenes and their
    pixels[3, 512, 512]."""
    model.eval()
    right: dict[str, list[bool]] = {}
    for index, (one, pixels) in enumerate(scenes):
        rng = Random(f"exact-{index}")
        visual = model.connect(model.tower(pixels[None]))
        for category in answers(one):
            question, answer = phrase(category, one, rng)
            hit = say(model, prompter, visual, question) == answer
            right.setdefault(category_of(category, one), []).append(hit)
    return {name: sum(hits) / len(hits) for name, hits in sorted(right.items())}
