"""Train the demo model on drawn pictures in five stages, then write the checkpoint.

1. vision: the tower alone, on labels that the drawing knows; 2. align: connector and decoder on
questions and answers, tower frozen; 3. joint: everything; 4. settle: connector and decoder again,
on stored features; 5. polish: everything, gently. A stage that was stopped goes on from its last
checkpoint in --out; a finished stage is not repeated.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from decoder import DemoModel
from export import export
from language import answer_loss, exact_match, question_batches
from network import Shape, VisionTower
from prompts import Prompter, train_tokenizer
from settle import store, stored_batches, stored_loss
from torch import Tensor, nn
from vision import Heads, accuracy, batches, losses, to_float

Batch = dict[str, Tensor]
WEIGHTS = {"text": 1.0, "cells": 1.0, "order": 1.0}  # of the vision losses; others 0.5
TOWER_RATE = {"joint": 0.4, "polish": 1.0}  # the tower's learning rate, in the decoder's
JOINT_VISION = 0.5  # weight of the vision losses in stages 3 and 5
DECAY = {"polish": 0.985}  # of the averaged weights; other stages 0.998


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
    """The modules and optimiser of one of the stages 2 to 5."""
    joint = stage in TOWER_RATE
    model.tower.requires_grad_(joint)
    module = nn.ModuleDict({"model": model, "heads": heads}).to(memory_format=torch.channels_last)
    peak = float(getattr(args, f"{stage}_rate"))
    share = TOWER_RATE.get(stage, 0.0)
    tower, rest = groups(model.tower, peak * share, 0.05), []
    for part in (model.model.mm_projector, model.model.embed_tokens, model.model.layers):
        rest += groups(part, peak, 0.05)
    rest += groups(model.model.norm, peak, 0.0)
    tower += groups(heads, peak * share, 0.05)
    tuner = torch.optim.AdamW(rest + tower * joint, betas=(0.9, 0.98), fused=True)
    return Run(args.out / f"{stage}.pt", module, tuner, steps, DECAY.get(stage, 0.998))


def train_language(args: argparse.Namespace, run: Run, prompter: Prompter, stage: str) -> None:
    """Stages 2, 3 and 5, to the end of their steps."""
    model, heads, joint = run.module["model"], run.module["heads"], stage in TOWER_RATE
    start = len(prompter.before)
    questions = args.joint_questions if joint else args.questions
    size = args.batch if joint else args.align_batch
    source = question_batches(prompter, stage, run.step * size, size, questions)
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


def train_settle(args: argparse.Namespace, run: Run, prompter: Prompter) -> None:
    """Stage 4: connector and decoder on stored features, to the end of its steps."""
    model, start = run.module["model"], len(prompter.before)
    scenes, features = store(model, args.stored)
    source = stored_batches(scenes, features, prompter, args.batch, run.step)
    while run.step < run.steps:
        loss, right = stored_loss(model, next(source), start)
        run.update(loss, {"answers": loss.item(), "tokens": right.item()})
        if run.step % (2 * args.check) == 0 or run.step == run.steps:
            run.save()
            checkpoint(args, run, prompter, f"settle, step {run.step}", 150)


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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoints; export in OUT/export")
    parser.add_argument("--vision-steps", type=int, default=2400, help="batches of stage 1")
    parser.add_argument("--align-steps", type=int, default=600, help="batches of stage 2")
    parser.add_argument("--joint-steps", type=int, default=500, help="batches of stage 3")
    parser.add_argument("--settle-steps", type=int, default=2000, help="batches of stage 4")
    parser.add_argument("--polish-steps", type=int, default=350, help="batches of stage 5")
    parser.add_argument("--stored", type=int, default=25600, help="pictures of stage 4")
    parser.add_argument("--batch", type=int, default=64, help="pictures in a batch")
    parser.add_argument("--align-batch", type=int, default=32, help="the same in stage 2")
    parser.add_argument("--questions", type=int, default=4, help="per picture, stage 2")
    parser.add_argument("--joint-questions", type=int, default=2, help="the same in stages 3 and 5")
    parser.add_argument("--vision-rate", type=float, default=2e-3, help="peak rate, stage 1")
    parser.add_argument("--align-rate", type=float, default=2e-3, help="peak rate, stage 2")
    parser.add_argument("--joint-rate", type=float, default=1.2e-3, help="peak rate, stage 3")
    parser.add_argument("--settle-rate", type=float, default=1.5e-3, help="peak rate, stage 4")
    parser.add_argument("--polish-rate", type=float, default=4e-4, help="peak rate, stage 5")
    parser.add_argument("--check", type=int, default=250, help="batches between checks")
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
    for stage in ("align", "joint", "settle", "polish"):
        steps = int(getattr(args, f"{stage}_steps"))
        run = language_run(args, stage, model, heads, steps)
        if run.step < steps and stage == "settle":
            train_settle(args, run, prompter)
        elif run.step < steps:
            train_language(args, run, prompter, stage)
        run.averaged("model", model)
        run.averaged("heads", heads)
    if args.test:
        checkpoint(args, run, prompter, "final", args.test)


if __name__ == "__main__":
    main()
