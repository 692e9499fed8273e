"""Train the demo model on drawn pictures, then write the checkpoint.

For the first part of the time the tower alone, on labels that the drawing knows; then its lower
part stands, and the rest learns everything at once: the labels, talks about the pictures, and what
has changed between two; at last connector and decoder alone, on stored features. A run that was
stopped goes on from its last checkpoint in --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from decoder import DemoModel
from export import export
from language import answer_loss, exact_match
from network import Shape
from pictures import Batch, Pairs, Pictures, batches, drawn
from prompts import Prompter, train_tokenizer
from seen import Seen
from settle import store, stored_batches
from stage import Run, groups
from start import begin
from tokenizers import Tokenizer
from torch import Tensor, nn
from vision import Heads, accuracy, fine_losses, losses, to_float, weighted

PAIRS_EVERY = 8  # every eighth new batch has pairs of pictures, half as many
HELD_OUT = 192  # pictures of a check
KEPT = 2000  # pictures of them while it learns: their maps go stale
KEPT_FIXED = 16000  # pictures and pairs afterwards, 0.2 MB each
SAVED_EVERY = 250  # batches of the last stage
AVERAGED = 0.997  # decay of the averaged weights
Loss = Callable[[Batch, Tensor], tuple[Tensor, dict[str, float]]]  # of a batch and its fine maps


def print_figures(title: str, figures: dict[str, float]) -> None:
    print(title, " ".join(f"{k} {v:.3f}" for k, v in figures.items()), flush=True)


def modules(model: DemoModel, heads: Heads) -> nn.ModuleDict:
    module = nn.ModuleDict({"model": model, "heads": heads})
    return module.to(memory_format=torch.channels_last)


def decoder_groups(model: DemoModel, rate: float) -> list[dict[str, object]]:
    """Parameter groups of connector and decoder."""
    body = model.model
    parts = (body.mm_projector, body.embed_tokens, body.layers)
    trained = [group for part in parts for group in groups(part, rate, 0.05)]
    return [*trained, *groups(body.norm, rate, 0.0)]


def tuner(model: DemoModel, heads: Heads, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW; the tower and the decoder have rates of their own."""
    trained = groups(model.tower, args.tower_rate, 0.05) + groups(heads, args.heads_rate, 0.0)
    trained += decoder_groups(model, args.decoder_rate)
    return torch.optim.AdamW(trained, betas=(0.9, 0.98), fused=True)


class Training:
    """The run, its pictures, and what is measured on the way."""

    def __init__(self, args: argparse.Namespace, prompter: Prompter, run: Run) -> None:
        self.args, self.prompter, self.run = args, prompter, run
        self.model, self.heads = run.module["model"], run.module["heads"]
        start, size = run.step * args.batch, args.batch
        self.pictures = batches(Pictures("train", start, prompter), size)
        self.asked = batches(Pictures("asked", start, prompter, pages=False), size)
        self.pairs = batches(Pairs("train", start, prompter), size // 2, 2)
        self.seen = Seen(prompter, start, KEPT // size)
        self.seen_pairs = Seen(prompter, start, KEPT_FIXED // size)
        held_out = Pictures("held-out", 0, prompter, again=False, pages=False)
        self.held_out = list(islice(batches(held_out, 64), HELD_OUT // 64))

    def loss_of_pairs(self, batch: Batch, fine: Tensor) -> tuple[Tensor, dict[str, float]]:
        """What has changed; fine[2 B, ...], the two pictures of a pair one after the other."""
        features = self.model.tower.upper(fine)[0].unflatten(0, (-1, 2))
        loss, right = answer_loss(self.model, features, batch, self.prompter)
        return self.args.answers * loss, {"pairs": loss.item(), "same": right.item()}

    def loss_of_pictures(
        self, batch: Batch, fine: Tensor, talking: bool
    ) -> tuple[Tensor, dict[str, float]]:
        features, middle = self.model.tower.upper(fine)
        parts = losses(self.heads, features, middle, batch)
        if fine.requires_grad:
            parts |= fine_losses(self.heads, fine, batch)
        loss, shown = weighted(parts), {k: v.item() for k, v in parts.items()}
        if talking:
            answers, right = answer_loss(self.model, features[:, None], batch, self.prompter)
            loss = self.args.labels * loss + self.args.answers * answers
            shown |= {"answers": answers.item(), "tokens": right.item()}
        return loss, shown

    def learn(self, batch: Batch, seen: Seen, loss: Loss) -> None:
        """A new batch, of pictures or of pairs, then one seen before."""
        fine = self.model.tower.lower(to_float(batch["pixels"].flatten(0, -4)))
        self.run.update(*loss(batch, fine))
        seen.add(batch, fine)
        self.run.update(*loss(*seen.pick()))

    def fix_lower(self) -> None:
        """From here on the lower part of the tower stands, at its averaged weights."""
        averaged = DemoModel(self.model.shape)
        self.run.averaged("model", averaged)
        lower = self.model.tower.lower_part
        lower.load_state_dict(averaged.tower.lower_part.state_dict())
        lower.requires_grad_(False)
        lower.eval()
        self.seen = Seen(self.prompter, self.run.step, KEPT_FIXED // self.args.batch)

    def to_the_end(self) -> None:
        run, args = self.run, self.args
        over, checked, talking = run.over, run.step, False
        for turn in count():
            if over:
                return
            if not talking and run.done >= args.alone:
                talking = True
                self.fix_lower()
            if talking and turn % PAIRS_EVERY == 0:
                self.learn(next(self.pairs), self.seen_pairs, self.loss_of_pairs)
            else:
                pictures = self.asked if talking and turn % 2 else self.pictures
                loss = partial(self.loss_of_pictures, talking=talking)
                self.learn(next(pictures), self.seen, loss)
            over = run.over
            if run.step - checked >= args.check or over:
                checked = run.step
                run.save()
                self.check(talking)

    def check(self, talking: bool) -> None:
        """Measure the averaged weights on held-out pictures and export them."""
        run, args = self.run, self.args
        model = DemoModel(self.model.shape)
        run.averaged("model", model)
        heads = run.averaged("heads", Heads(model.shape))
        print_figures(f"held-out, {run.done:.0%}", accuracy(model.tower, heads, self.held_out))
        measure_and_export(args, self.prompter, model, f"step {run.step}", talking)


def settle(args: argparse.Namespace, prompter: Prompter, model: DemoModel, step: int) -> None:
    """The last stage, from `model` as it is after `step` batches; exports what comes of it."""
    model.tower.requires_grad_(False)
    module = nn.ModuleDict({"model": model})
    trained = decoder_groups(model, args.settle_rate)
    steps = torch.optim.AdamW(trained, betas=(0.9, 0.98), fused=True)
    run = Run(
        args.out / f"settle-{step}.pt", module, steps, args.steps, AVERAGED, args.settle_minutes
    )
    if run.over:
        return
    path = args.out / f"features-{step}.pt"
    if not path.exists():
        torch.save(store(model, prompter, args.stored), path)
    run.begun()
    stored = torch.load(path, weights_only=False)
    source = stored_batches(stored, prompter, 64, run.step, lambda: run.done)
    while not run.over:
        batch = next(source)
        loss, right = answer_loss(model, batch["features"], batch, prompter)
        pair = batch["features"].shape[1] == 2
        run.update(loss, {"pairs" if pair else "answers": loss.item(), "tokens": right.item()})
        if run.step % SAVED_EVERY == 0:
            run.save()
    run.save()
    run.averaged("model", model)
    measure_and_export(args, prompter, model, "settled", True)


def measure_and_export(
    args: argparse.Namespace, prompter: Prompter, model: DemoModel, note: str, talks: bool
) -> None:
    """Write the checkpoint; where it talks, with its exact match on held-out scenes."""
    if talks:
        scenes = [drawn(f"held-out-{i}", i, pages=False) for i in range(args.test)]
        pixels = [(one, to_float(torch.from_numpy(shown)[None])[0]) for one, shown in scenes]
        figures = exact_match(model, prompter, pixels)
        print_figures(f"exact match, {args.test} scenes:", figures)
        note += "".join(f"\n  {name}: {share:.1%}" for name, share in figures.items())
    export(model, prompter, args.out / "export", note)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoints; export in OUT/export")
    parser.add_argument("--start", type=Path, metavar="FOLDER",
                        help="native checkpoint to begin from, as mlx_vlm_edge/demo; "
                             "default: from scratch")  # fmt: skip
    parser.add_argument("--steps", type=int, default=12000, help="batches")
    parser.add_argument("--minutes", type=float, default=0.0, metavar="N",
                        help="end after N minutes of training instead")  # fmt: skip
    parser.add_argument("--alone", type=float, default=0.4, metavar="SHARE",
                        help="of the time, for the tower alone; "
                             "then its lower part stands")  # fmt: skip
    parser.add_argument("--settle-minutes", type=float, default=10.0, metavar="N",
                        help="of the decoder alone at the end")  # fmt: skip
    parser.add_argument("--settle-rate", type=float, default=6e-4, help="its peak rate")
    parser.add_argument(
        "--stored",
        type=int,
        default=16000,
        help="pictures it is asked about, pages of print among them, which are not",
    )
    parser.add_argument("--batch", type=int, default=32, help="pictures in a batch")
    parser.add_argument("--tower-rate", type=float, default=3e-4, help="peak rate of the tower")
    parser.add_argument("--heads-rate", type=float, default=1e-3, help="peak rate of the heads")
    parser.add_argument("--decoder-rate", type=float, default=6e-4, help="peak rate of the rest")
    parser.add_argument("--labels", type=float, default=1.0, help="weight of the labels' losses")
    parser.add_argument("--answers", type=float, default=1.5, help="weight of the answers' loss")
    parser.add_argument("--check", type=int, default=1500, help="batches between checks")
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
        first = next(batches(Pictures("calibrate", 0, prompter, again=False), 64))
        begin(args.start, model, to_float(first["pixels"]))
    else:
        prompter = Prompter(train_tokenizer(shape.vocab))
    module = modules(model, heads)
    run = Run(args.out / "run.pt", module, tuner(model, heads, args), args.steps, AVERAGED,
              args.minutes)  # fmt: skip
    if args.start:
        model.tower.fix_statistics()
    if not run.over:
        Training(args, prompter, run).to_the_end()
    run.averaged("model", model)
    if args.settle_minutes:
        settle(args, prompter, model, run.step)


if __name__ == "__main__":
    main()
