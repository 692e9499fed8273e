"""One stage of training: optimiser, averaged weights, and a checkpoint file to go on from."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

AVERAGED_EVERY = 4  # batches; the averaged weights take in every fourth state


def rate(step: int, done: float, warmup: int) -> float:
    """Share of the peak rate: linear warm-up, then a cosine down to 2 % where `done` is 1."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * (1 + math.cos(math.pi * min(1.0, done))) / 2


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
    """One stage: its modules, optimiser, averaged weights, step, and their checkpoint file.

    The stage is over after `steps` batches, or, with `minutes`, after so much time of training.
    """

    path: Path
    module: nn.ModuleDict
    tuner: torch.optim.Optimizer
    steps: int
    decay: float = 0.998
    minutes: float = 0.0
    step: int = 0
    seconds: float = 0.0  # of training before this start
    average: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)
    started: tuple[float, int] = (0.0, 0)

    def __post_init__(self) -> None:
        self.average = {k: v.clone() for k, v in self.module.state_dict().items()}
        if self.path.exists():
            saved = torch.load(self.path)
            self.module.load_state_dict(saved["model"])
            asked = [group["peak"] for group in self.tuner.param_groups]
            self.tuner.load_state_dict(saved["tuner"])
            for group, peak in zip(self.tuner.param_groups, asked, strict=True):
                group["peak"] = peak  # this start's, not the checkpoint's
            self.average, self.step = saved["average"], saved["step"]
            self.seconds = saved.get("seconds", 0.0)
        self.started = time.time(), self.step

    def begun(self) -> None:
        """Count this start's time from now."""
        self.started = time.time(), self.step

    @property
    def spent(self) -> float:
        """Seconds of training, this start's and earlier ones'."""
        return self.seconds + time.time() - self.started[0]

    @property
    def done(self) -> float:
        """Share of the stage that is over."""
        return self.spent / (60 * self.minutes) if self.minutes else self.step / max(1, self.steps)

    @property
    def over(self) -> bool:
        return self.done >= 1

    def save(self) -> None:
        """Write under a temporary name, then rename."""
        part = self.path.with_suffix(".part")
        state = {"model": self.module.state_dict(), "tuner": self.tuner.state_dict()}
        state |= {"average": self.average, "step": self.step, "seconds": self.spent}
        torch.save(state, part)
        part.rename(self.path)

    def update(self, loss: Tensor, parts: dict[str, float]) -> None:
        """One step of the optimiser and of the averaged weights."""
        share = rate(self.step, self.done, min(300, self.steps // 12))
        for group in self.tuner.param_groups:
            group["lr"] = group["peak"] * share
        self.tuner.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 5.0)
        self.tuner.step()
        self.step += 1
        if self.step % AVERAGED_EVERY == 0:
            self.take_average()
        for name, part in parts.items():
            self.means[name] = 0.95 * self.means.get(name, part) + 0.05 * part
        if self.step % 50 == 0:
            pace = (time.time() - self.started[0]) / (self.step - self.started[1])
            figures = " ".join(f"{k} {v:.3f}" for k, v in self.means.items())
            print(f"{self.path.stem} {self.step} {pace:.2f} s/step | {figures}", flush=True)

    @torch.no_grad()
    def take_average(self) -> None:
        """Move the averaged weights towards the present ones."""
        decay = min(self.decay, self.step / (self.step + 9)) ** AVERAGED_EVERY
        state = self.module.state_dict()
        real = [key for key, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.average[k] for k in real], [state[k] for k in real], 1 - decay)
        for key in state.keys() - set(real):
            self.average[key].copy_(state[key])

    def averaged(self, name: str, target: nn.Module) -> nn.Module:
        """`target` filled with the averaged weights of the module `name`."""
        start = len(name) + 1
        state = {k[start:]: v for k, v in self.average.items() if k.startswith(f"{name}.")}
        target.load_state_dict(state)
        return target
