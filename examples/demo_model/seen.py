"""Pictures that were seen before, as the lower part of the tower saw them.

The stride-16 map costs three quarters of a step. From stored maps the upper part, the heads and the
decoder go through the same pictures again, with other questions.
"""

from __future__ import annotations

from collections import deque
from random import Random

import torch
from changes import Change
from language import padded_rows, said_of_pair, talk_row
from pictures import Batch
from prompts import Prompter
from torch import Tensor


class Seen:
    """The latest `most` batches: their stride-16 maps in float16, labels, and what they show."""

    def __init__(self, prompter: Prompter, seed: int, most: int) -> None:
        self.prompter, self.rng = prompter, Random(f"seen-{seed}")
        self.batches: deque[Batch] = deque(maxlen=most)

    def add(self, batch: Batch, fine: Tensor) -> None:
        kept = {name: batch[name] for name in ("facts", "held", "parts") if name in batch}
        kept |= {"shown": batch["shown"], "fine": fine.detach().half()}
        self.batches.append(kept)

    def pick(self) -> tuple[Batch, Tensor]:
        """One of the batches, with new questions, and its map."""
        kept = self.rng.choice(self.batches)
        rows = [
            said_of_pair(one, self.rng, self.prompter) if isinstance(one, Change)
            else talk_row(one, self.rng, self.prompter)
            for one in kept["shown"]
        ]  # fmt: skip
        ids, targets = padded_rows(rows)
        return kept | {"ids": ids, "targets": targets}, kept["fine"].to(torch.float32)
