"""Train the demo model on drawn pictures in three stages, then write the checkpoint.

1. vision: the tower alone, on labels that the drawing knows; 2. align: connector and decoder on
questions and answers, tower frozen; 3. joint: everything. A stage that was stopped goes on from
its last checkpoint in --out; a finished stage is not repeated.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from decoder import DemoModel
from draw import KINDS, draw, scene
from export import export
from language import answer_loss, exact_match, question_batches, say
from network import Shape, VisionTower
from prompts import Prompter, train_tokenizer
from torch import Tensor, nn
from vision import Heads, accuracy, batches, losses, pixels_of, to_float

Batch = dict[str, Tensor]
WEIGHTS = {"text": 1.0, "cells": 1.0, "order": 1.0}  # of the vision losses; others 0.5
JOINT_TOWER_RATE = 0.4  # learning rate of the tower in stage 3, as a share of the decoder's
JOINT_VISION = 0.5  # weight of the vision losses in stage 3


def rate(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, then a cosine down to 2 %."""
    warmup = min(300, steps // 12)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2


def groups(module: nn.Module, peak: float, decay: float) -> list[dict[str, object]]:
    """Parameter groups: matrices and kernels decay; norms, biases and layer scales do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.squeeze().ndim > 1], "peak": peak,
         "weight_decay": decay},
        {"params": [p for p in trained if p.squeeze().ndim <= 1], "peak": peak,
         "weight_decay": 0.0},
    ]  # fmt: skip


@dataclass
class Run:
    """One stage: its modules, optimiser, averaged weights, step, and their checkpoint file."""

    path: Path
    module: nn.ModuleDict
    tuner: torch.optim.Optimizer
    steps: int
    decay: float = 0.998
    step: int = 0
    average: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)
    started: tuple[float, int] = (0.0, 0)

    def __post_init__(self) -> None:
        self.average = {k: v.clone() for k, v in self.module.state_dict().items()}
        if self.path.exists():
            saved = torch.load(self.path)
            self.module.load_state_dict(saved["model"])
            self.tuner.load_state_dict(saved["tuner"])
            self.average, self.step = saved["average"], saved["step"]
        self.started = time.time(), self.step

    def save(self) -> None:
        """Write under a temporary name, then rename."""
        part = self.path.with_suffix(".part")
        state = {"model": self.module.state_dict(), "tuner": self.tuner.state_dict()}
        torch.save(state | {"average": self.average, "step": self.step}, part)
        part.rename(self.path)

    def update(self, loss: Tensor, parts: dict[str, float]) -> None:
        """One step of the optimiser and of the averaged weights."""
        for group in self.tuner.param_groups:
            group["lr"] = group["peak"] * rate(self.step, self.steps)
        self.tuner.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 5.0)
        self.tuner.step()
        self.step += 1
        decay = min(self.decay, self.step / (self.step + 9))
        with torch.no_grad():
            for key, value in self.module.state_dict().items():
                if value.is_floating_point():
                    self.average[key].lerp_(value, 1 - decay)
                else:
                    self.average[key].copy_(value)
        for name, part in parts.items():
            self.means[name] = 0.95 * self.means.get(name, part) + 0.05 * part
        if self.step % 50 == 0:
            pace = (time.time() - self.started[0]) / (self.step - self.started[1])
            figures = " ".join(f"{k} {v:.3f}" for k, v in self.means.items())
            print(f"{self.path.stem} {self.step} {pace:.2f} s/step | {figures}", flush=True)

    def averaged(self, name: str, target: nn.Module) -> nn.Module:
        """`target` filled with the averaged weights of the module `name`."""
        start = len(name) + 1
        state = {k[start:]: v for k, v in self.average.items() if k.startswith(f"{name}.")}
        target.load_state_dict(state)
        return target


def vision_loss(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack([WEIGHTS.get(k, 0.5) * v for k, v in parts.items()]).sum()


def first(source: Iterator[Batch], count: int) -> list[Batch]:
    return [next(source) for _ in range(count)]


def train_vision(args: argparse.Namespace, shape: Shape) -> Run:
    """Stage 1: the tower on direct labels."""
    both = nn.ModuleDict({"tower": VisionTower(shape), "heads": Heads(shape)})
    both = both.to(memory_format=torch.channels_last)
    tuner = torch.optim.AdamW(groups(both, args.vision_rate, 0.05), betas=(0.9, 0.98), fused=True)
    run = Run(args.out / "vision.pt", both, tuner, args.vision_steps)
    if run.step >= run.steps:
        return run
    held_out = first(batches("held-out", 0, 64), 8)
    source = batches("train", run.step * args.batch, args.batch)
    while run.step < run.steps:
        batch = next(source)
        parts = losses(both["heads"], *both["tower"](to_float(batch["pixels"])), batch)
        run.update(vision_loss(parts), {k: v.item() for k, v in parts.items()})
        if run.step % 250 == 0 or run.step == run.steps:
            run.save()
            check = run.averaged("tower", VisionTower(shape)), run.averaged("heads", Heads(shape))
            print_figures("held-out", accuracy(*check, held_out))
    return run


def print_figures(title: str, figures: dict[str, float]) -> None:
    print(title, " ".join(f"{k} {v:.3f}" for k, v in figures.items()), flush=True)


def language_run(
    args: argparse.Namespace, stage: str, model: DemoModel, heads: Heads, steps: int
) -> Run:
    """The modules and optimiser of stage 2 ("align") or 3 ("joint")."""
    joint = stage == "joint"
    model.tower.requires_grad_(joint)
    module = nn.ModuleDict({"model": model, "heads": heads}).to(memory_format=torch.channels_last)
    peak = args.joint_rate if joint else args.align_rate
    tower, rest = groups(model.tower, peak * JOINT_TOWER_RATE, 0.05), []
    for part in (model.model.mm_projector, model.model.embed_tokens, model.model.layers):
        rest += groups(part, peak, 0.05)
    rest += groups(model.model.norm, peak, 0.0)
    tower += groups(heads, peak * JOINT_TOWER_RATE, 0.05)
    tuner = torch.optim.AdamW(rest + tower * joint, betas=(0.9, 0.98), fused=True)
    return Run(args.out / f"{stage}.pt", module, tuner, steps)


def train_language(args: argparse.Namespace, run: Run, prompter: Prompter, stage: str) -> None:
    """Stages 2 and 3, to the end of their steps."""
    model, heads, joint = run.module["model"], run.module["heads"], stage == "joint"
    start, offset = len(prompter.before), 10_000_000 if joint else 0
    questions = args.joint_questions if joint else args.questions
    size = args.batch if joint else args.align_batch
    source = question_batches(prompter, offset + run.step * size, size, questions)
    model.train()
    model.tower.train(joint)
    while run.step < run.steps:
        batch = next(source)
        with torch.set_grad_enabled(joint):
            features, middle = model.tower(to_float(batch["pixels"]))
        loss, right = answer_loss(model, features, batch, start)
        parts = {"answers": loss.item(), "tokens": right.item()}
        if joint:
            vision = losses(heads, features, middle, batch)
            loss = loss + JOINT_VISION * vision_loss(vision)
            parts["text"] = vision["text"].item()
        run.update(loss, parts)
        if run.step % args.check == 0 or run.step == run.steps:
            run.save()
            checkpoint(args, run, prompter, f"{stage}, step {run.step}", 150)
            model.train()
            model.tower.train(joint)


def checkpoint(
    args: argparse.Namespace, run: Run, prompter: Prompter, title: str, scenes: int
) -> None:
    """Measure the averaged weights on held-out scenes and export them."""
    model = DemoModel(run.module["model"].shape)
    run.averaged("model", model)
    figures = exact_match(model, prompter, scenes)
    print_figures(f"exact match, {scenes} scenes, {title}:", figures)
    lines = [f"{title}; exact match on {scenes} held-out scenes:"]
    lines += [f"  {name}: {share:.1%}" for name, share in figures.items()]
    export(model, prompter, args.out / "export", "\n".join(lines))
    rng = Random(run.step)
    for kind in KINDS:
        one = scene(f"look-{run.step}-{kind}", kind)
        with torch.no_grad():
            pixels = torch.from_numpy(pixels_of(draw(one)))[None]
            visual = model.connect(model.tower(to_float(pixels))[0])
        question = rng.choice(("Describe the image.", "What does it say?", "How many are there?"))
        said = say(model, prompter, visual, question)
        print(f"  {kind} {one.text or one.shape} {one.count} | {question} -> {said}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoints; export in OUT/export")
    parser.add_argument("--vision-steps", type=int, default=3000, help="batches of stage 1")
    parser.add_argument("--align-steps", type=int, default=1500, help="batches of stage 2")
    parser.add_argument("--joint-steps", type=int, default=1000, help="batches of stage 3")
    parser.add_argument("--batch", type=int, default=64, help="pictures in a batch, stages 1 and 3")
    parser.add_argument("--align-batch", type=int, default=32, help="the same, stage 2")
    parser.add_argument("--questions", type=int, default=4, help="per picture, stage 2")
    parser.add_argument("--joint-questions", type=int, default=2, help="the same, stage 3")
    parser.add_argument("--vision-rate", type=float, default=2e-3, help="peak rate, stage 1")
    parser.add_argument("--align-rate", type=float, default=2e-3, help="peak rate, stage 2")
    parser.add_argument("--joint-rate", type=float, default=1e-3, help="peak rate, stage 3")
    parser.add_argument("--check", type=int, default=250, help="batches between checks, 2 and 3")
    parser.add_argument("--test", type=int, default=0, metavar="N",
                        help="scenes of a last evaluation in PyTorch")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of PyTorch")
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = Shape()
    prompter = Prompter(train_tokenizer(shape.vocab))
    vision = train_vision(args, shape)
    model, heads = DemoModel(shape), Heads(shape)
    vision.averaged("tower", model.tower)
    vision.averaged("heads", heads)
    run = vision
    for stage, steps in (("align", args.align_steps), ("joint", args.joint_steps)):
        run = language_run(args, stage, model, heads, steps)
        if run.step < steps:
            train_language(args, run, prompter, stage)
        run.averaged("model", model)
        run.averaged("heads", heads)
    if args.test:
        checkpoint(args, run, prompter, "final", args.test)


if __name__ == "__main__":
    main()
