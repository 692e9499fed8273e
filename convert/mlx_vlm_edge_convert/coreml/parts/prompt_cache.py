"""A verified decoder package and the ids that prompts begin with -> the bundle's prompt cache.

The package itself computes it, so that a host which takes it over goes on with the very numbers
that it would have computed; that is run, from the file, and compared.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..check.interpreter import Package
from ..package.save import save_arrays
from ..parity import Parity, distance
from ..run.host import DecoderHost
from ..run.prompt_cache import PROMPT_CACHE_FILE
from .decoder import DecoderPart

STEPS = 3  # that are run behind it, with and without
SAME = 1e-6  # relative: the same numbers go into the same operations


def write_prompt_cache(
    part: DecoderPart, package: Path, ids: Sequence[int]
) -> tuple[dict[str, Any], Parity]:
    """Write the file beside the package: the manifest's entry, and how logits behind it compare
    with those of a prompt that was run from its first id, infinite where another token leads."""
    runs = Package(package)
    whole = DecoderHost(runs, part.geometry, part.table)
    whole.prefill(whole.embed(ids))
    save_arrays(whole.cached(), package.with_name(PROMPT_CACHE_FILE))
    entry = {"file": PROMPT_CACHE_FILE, "ids": [*ids]}
    described = {**part.describe(), "prompt_cache": entry}
    begun = DecoderHost.open(package.parent, described, runs)
    error = float("inf")
    if begun.begin(ids) == len(ids):
        expected, logits = (_stepped(host, ids[0]) for host in (whole, begun))
        if np.array_equal(expected.argmax(-1), logits.argmax(-1)):
            error = distance(logits, expected)
    return entry, Parity(part.name, f"{STEPS} steps behind the prompt cache", error, SAME)


def _stepped(host: DecoderHost, token: int) -> np.ndarray:
    """Logits [STEPS, V] behind a token, and behind those that lead."""
    logits = []
    for _ in range(STEPS):
        logits.append(host.step(token))
        token = int(logits[-1].argmax())
    return np.stack(logits)
