"""Train the demo model on drawn pictures in three stages, then write the checkpoint.

1. vision: the tower alone, on labels that the drawing knows; 2. settle: connector and decoder on
stored features of the tower; 3. polish: everything, gently. A stage that was stopped goes on from
its last checkpoint in --out; a finished stage is not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from decoder import DemoModel
from export import export
from language import answer_loss, exact_match, question_batches
from network import Shape, VisionTower
from prompts import Prompter, train_tokenizer
from settle import store, stored_batches, stored_loss
from stage import Run, groups
from start import begin
from tokenizers import Tokenizer
from torch import Tensor, nn
from vision import Heads, accuracy, batches, losses, to_float, twice

Batch = dict[str, Tensor]
WEIGHTS = {"text": 1.0, "cells": 1.0, "order": 1.0, "colour": 0.8}  # of vision losses; others 0.5
POLISHED = ("background", "colour", "shape", "count")  # the vision losses of stage 3
POLISH_VISION = 0.3  # their weight
HEADS_RATE = 2e-3  # peak rate of the heads in stage 3: they may be new
DECAY = {"vision": 0.995, "settle": 0.998, "polish": 0.985}  # of the averaged weights


def vision_loss(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack([WEIGHTS.get(k, 0.5) * v for k, v in parts.items()]).sum()


def first(source: Iterator[Batch], count: int) -> list[Batch]:
    return [next(source) for _ in range(count)]


def print_figures(title: str, figures: dict[str, float]) -> None:
    print(title, " ".join(f"{k} {v:.3f}" for k, v in figures.items()), flush=True)


def train_vision(args: argparse.Namespace, model: DemoModel, heads: Heads) -> Run:
    """Stage 1: the tower on direct labels."""
    both = nn.ModuleDict({"tower": model.tower, "heads": heads})
    both = both.to(memory_format=torch.channels_last)
    tuner = torch.optim.AdamW(groups(both, args.vision_rate, 0.05), betas=(0.9, 0.98), fused=True)
    run = Run(args.out / "vision.pt", both, tuner, args.vision_steps, DECAY["vision"],
              args.vision_minutes)  # fmt: skip
    if run.over:
        return run
    held_out = first(batches("held-out", 0, 64), 6)
    source = twice(batches("train", run.step * args.batch, args.batch), run.step)
    over = False
    while not over:
        batch = next(source)
        parts = losses(both["heads"], *both["tower"](to_float(batch["pixels"])), batch)
        run.update(vision_loss(parts), {k: v.item() for k, v in parts.items()})
        over = run.over
        if run.step % args.check == 0 or over:
            run.save()
            tower = run.averaged("tower", VisionTower(model.shape))
            figures = accuracy(tower, run.averaged("heads", Heads(model.shape)), held_out)
            print_figures("held-out", figures)
    return run


def language_run(args: argparse.Namespace, stage: str, model: DemoModel, heads: Heads) -> Run:
    """The modules and optimiser of stage 2 or 3."""
    polish = stage == "polish"
    model.tower.requires_grad_(polish)
    module = nn.ModuleDict({"model": model, "heads": heads}).to(memory_format=torch.channels_last)
    peak, trained = float(getattr(args, f"{stage}_rate")), []
    for part in (model.model.mm_projector, model.model.embed_tokens, model.model.layers):
        trained += groups(part, peak, 0.05)
    trained += groups(model.model.norm, peak, 0.0)
    if polish:
        trained += groups(model.tower, peak, 0.05) + groups(heads, HEADS_RATE, 0.0)
    tuner = torch.optim.AdamW(trained, betas=(0.9, 0.98), fused=True)
    steps = int(getattr(args, f"{stage}_steps"))
    minutes = getattr(args, f"{stage}_minutes")
    return Run(args.out / f"{stage}.pt", module, tuner, steps, DECAY[stage], minutes)


def train_settle(args: argparse.Namespace, run: Run, prompter: Prompter) -> None:
    """Stage 2, to the end of its steps."""
    model, start = run.module["model"], len(prompter.before)
    path = args.out / "features.pt"
    if not path.exists():
        torch.save(store(model, args.stored), path)
    stored = torch.load(path, weights_only=False)
    source = stored_batches(stored, prompter, args.batch, run.step)
    over = False
    while not over:
        loss, right = stored_loss(model, next(source), start)
        run.update(loss, {"answers": loss.item(), "tokens": right.item()})
        over = run.over
        if run.step % (2 * args.check) == 0 or over:
            run.save()
            checkpoint(args, run, prompter, f"settle, step {run.step}")


def train_polish(args: argparse.Namespace, run: Run, prompter: Prompter) -> None:
    """Stage 3, to the end of its steps."""
    model, heads, start = run.module["model"], run.module["heads"], len(prompter.before)
    source = question_batches(prompter, "polish", run.step * args.batch, args.batch, args.questions)
    model.train()
    over = False
    while not over:
        batch = next(source)
        features, middle = model.tower(to_float(batch["pixels"]))
        loss, right = answer_loss(model, features, batch, start)
        vision = losses(heads, features, middle, batch)
        parts = {"answers": loss.item(), "tokens": right.item()}
        attributes = torch.stack([vision[name] for name in POLISHED]).sum()
        run.update(loss + POLISH_VISION * attributes, parts)
        over = run.over
        if run.step % args.check == 0 or over:
            run.save()
            checkpoint(args, run, prompter, f"polish, step {run.step}")
            model.train()


def checkpoint(args: argparse.Namespace, run: Run, prompter: Prompter, title: str) -> None:
    """Measure the averaged weights on held-out scenes and export them."""
    model = DemoModel(run.module["model"].shape)
    run.averaged("model", model)
    figures = exact_match(model, prompter, args.test)
    print_figures(f"exact match, {args.test} scenes, {title}:", figures)
    lines = [f"{title}; exact match on {args.test} held-out scenes:"]
    lines += [f"  {name}: {share:.1%}" for name, share in figures.items()]
    export(model, prompter, args.out / "export", "\n".join(lines))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoints; export in OUT/export")
    parser.add_argument("--start", type=Path, metavar="FOLDER",
                        help="native checkpoint to begin from, as mlx_vlm_edge/demo; "
                             "default: from scratch")  # fmt: skip
    parser.add_argument("--vision-steps", type=int, default=2600, help="batches of stage 1")
    parser.add_argument("--settle-steps", type=int, default=4000, help="batches of stage 2")
    parser.add_argument("--polish-steps", type=int, default=500, help="batches of stage 3")
    for stage in ("vision", "settle", "polish"):
        parser.add_argument(f"--{stage}-minutes", type=float, default=0.0, metavar="N",
                            help="end the stage after N minutes of training instead")  # fmt: skip
    parser.add_argument("--stored", type=int, default=25600, help="pictures of stage 2")
    parser.add_argument("--batch", type=int, default=64, help="pictures in a batch")
    parser.add_argument("--questions", type=int, default=2, help="per picture, stage 3")
    parser.add_argument("--vision-rate", type=float, default=1.5e-3, help="peak rate, stage 1")
    parser.add_argument("--settle-rate", type=float, default=1.5e-3, help="peak rate, stage 2")
    parser.add_argument("--polish-rate", type=float, default=4e-4, help="peak rate, stage 3")
    parser.add_argument("--check", type=int, default=250, help="batches between checks")
    parser.add_argument("--test", type=int, default=100, metavar="N", help="scenes of a check")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of PyTorch")
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = Shape()
    model, heads = DemoModel(shape), Heads(shape)
    if args.start:
        prompter = Prompter(Tokenizer.from_file(str(args.start / "tokenizer.json")))
        begin(args.start, model, to_float(next(batches("calibrate", 0, 64))["pixels"]))
    else:
        prompter = Prompter(train_tokenizer(shape.vocab))
    vision = train_vision(args, model, heads)
    vision.averaged("tower", model.tower)
    vision.averaged("heads", heads)
    for stage, train in (("settle", train_settle), ("polish", train_polish)):
        run = language_run(args, stage, model, heads)
        if not run.over:
            train(args, run, prompter)
        run.averaged("model", model)
        run.averaged("heads", heads)


if __name__ == "__main__":
    main()
